"""Options that several commands have, and how their values are read."""

import argparse
from typing import TypeAlias

from flashmoe_lab.config import Quantization
from flashmoe_lab.demo import DEFAULT_BITS

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_model(command: argparse.ArgumentParser) -> None:
    """The model that a command runs."""
    command.add_argument(
        "model", help="a packed checkpoint, or demo: the bundled model (a directory is ./demo)"
    )
    command.add_argument(
        "--bits",
        type=demo_bits,
        help=f"of demo: what it is packed to, once (default {DEFAULT_BITS}); none: as published",
    )


def add_k(command: argparse.ArgumentParser) -> None:
    """K, the number of experts of a token."""
    command.add_argument(
        "-K",
        "--num-experts-per-tok",
        type=int,
        help="experts of a token (default: the model's own)",
    )


def add_quiet(command: argparse.ArgumentParser) -> None:
    """No progress line."""
    command.add_argument("--quiet", action="store_true", help="draw no progress line")


def bits(text: str) -> int | None:
    """Bits to quantise to; None is "none"."""
    if text == "none":
        return None
    if text.isdecimal() and int(text) in Quantization.BITS:
        return int(text)
    allowed = ", ".join(map(str, Quantization.BITS))
    raise argparse.ArgumentTypeError(f"{text!r}; allowed are {allowed} and none")


def demo_bits(text: str) -> int | str:
    """The same with the word kept, where None says that none were asked for."""
    return bits(text) or "none"


def auto_or_bits(text: str) -> int | str | None:
    """The same, or "auto"."""
    return text if text == "auto" else bits(text)


def ids(text: str) -> list[int]:
    """Token ids like 1,2,3."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers like 1,2,3") from None
