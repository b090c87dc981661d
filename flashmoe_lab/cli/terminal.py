"""Showing a run's text in a terminal as it is made."""

from flashmoe_lab.run import Run

# What a model writes must not steer the terminal.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160))}
for _kept in "\t\n":
    del _CONTROLS[ord(_kept)]


def follow(run: Run, ids: bool = False) -> bool:
    """Print the text, or with `ids` the token ids, and say whether it was interrupted: what was
    made until then is kept."""
    try:
        for step in run:
            text = f"{step.token} " if ids else step.text
            print(text.translate(_CONTROLS), end="", flush=True)
    except KeyboardInterrupt:
        return True
    finally:
        print(flush=True)
    return False
