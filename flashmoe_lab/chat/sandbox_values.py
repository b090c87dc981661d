"""The values that templates work with, and how large they are: what sandbox.py counts with.

Its own forms of what Jinja's grow without a bound or show too much: namespaces, dict, tojson,
round and divisibleby.
"""

import json
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

ITEM = 32  # what a place in a list counts, as against a character
_INT_BITS, _INDENT = 4096, 16
_COLLECTIONS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TooLarge(ValueError):
    """A template builds more than it may."""


class TemplateNamespace(Namespace):
    """Shows nothing of what it holds: it can change after it was weighed."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        held = dict(*rest, **kwargs)
        for name in held:
            _check_name(name)
        Namespace.__init__(self, held)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class TemplateDict:
    """`dict` without the class's own attributes. Keys are entered one by one, where a deadline can
    act: those of the same hash take quadratic time."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """A dictionary, as dict() makes it."""
        given = args[0] if args else {}
        pairs = given.items() if isinstance(given, Mapping) else given
        made: dict[Any, Any] = {}
        for key, value in pairs:
            made[key] = value
        return made | kwargs

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """A dictionary with one value for all keys."""
        made: dict[Any, Any] = {}
        for key in keys:
            made[key] = value
        return made


def divisible(value: int, num: int) -> bool:
    """The test divisibleby."""
    check_bits(value, num)
    return value % num == 0


def check_bits(*values: Any, bits: int = 0) -> None:
    """TooLarge where one of the values is an integer that takes long to compute with, or `bits` of
    one that is to come say so."""
    bits = max([bits, *(value.bit_length() for value in values if isinstance(value, int))])
    if bits > _INT_BITS:
        raise TooLarge(f"it computes with integers of more than {_INT_BITS} bits")


def texts_of(parts: Iterable[Any]) -> list[str]:
    """The parts as a list; TypeError if one is not text."""
    texts = list(parts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"join: item {number} is a {type(text).__name__}, not text")
    return texts


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no name that starts with an underscore: {name!r}")


def to_json(
    x: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers renders it: letters as they are, nothing escaped for HTML."""
    for size in (
        indent if isinstance(indent, int) else len(indent or ""),
        *map(len, separators or ()),
    ):
        if size > _INDENT:
            raise TooLarge(f"it indents JSON by more than {_INDENT}")
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def bounded_round(original: Callable[..., Any]) -> Callable[..., Any]:
    """The filter round, for a precision that means something."""

    def bounded(value: float, precision: int = 0, method: str = "common") -> float:
        if abs(precision) > 100:
            raise TooLarge(f"it rounds to {precision} digits")
        return original(value, precision, method)

    return bounded


def weight(value: Any, largest: int) -> int:
    """Characters and places of a value, everything within it counted as often as it is there."""
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        total += len(item) if isinstance(item, str) else ITEM
        if isinstance(item, Mapping):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, _COLLECTIONS):
            waiting.extend(item)
        if total + ITEM * len(waiting) > largest:
            raise TooLarge(largest_text(largest))
    return total


def largest_text(size: int) -> str:
    """What is said where a value is too large."""
    return f"it builds a value of more than {size} characters"
