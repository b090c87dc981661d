"""The command line: `flashmoe-lab COMMAND`. Every command is a thin cover over the package.

Text goes to standard output, progress and summaries to standard error. What cannot be done ends
with one line and exit code 2; an interrupt with 130, a closed pipe with 141. One module a group of
commands; each names its commands in `COMMANDS`.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from flashmoe_lab.cli import chat, checkpoints, evaluate, generate, lab, machine, serve, trace, tune
from flashmoe_lab.version import __version__

EXPECTED_ERRORS = (ValueError, OSError, MemoryError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _show_warning
            return options.run(options)
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except EXPECTED_ERRORS as error:
        print(f"flashmoe-lab: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nflashmoe-lab: interrupted; run the same command to go on", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="flashmoe-lab",
        description="Run Mixture-of-Experts models larger than memory, experts streamed from SSD.",
    )
    top.add_argument("--version", action="version", version=f"flashmoe-lab {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for module in (checkpoints, generate, chat, trace, evaluate, machine, tune, serve, lab):
        for add in module.COMMANDS:
            add(commands)
    return top


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"flashmoe-lab: {message}", file=sys.stderr)
