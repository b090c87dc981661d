"""Showing a run's text in a terminal as it is made."""

import sys

from flashmoe_lab.printable import printable
from flashmoe_lab.run import Run


def follow(run: Run, ids: bool = False) -> bool:
    """Print the text, or with `ids` the token ids, and say whether it was interrupted: what was
    made until then is kept."""
    try:
        for step in run:
            text = f"{step.token} " if ids else step.text
            print(printable(text), end="", flush=True)
    except KeyboardInterrupt:
        return True
    finally:
        print(flush=True)
    return False


def show_prefill(done: int, total: int) -> None:
    """A line on standard error that says how much of a long prompt is read, and goes away."""
    end = "\r" if done < total else "\r\x1b[K"
    words = f"prefill {done} of {total} tokens" if done < total else ""
    print(words, end=end, file=sys.stderr, flush=True)
