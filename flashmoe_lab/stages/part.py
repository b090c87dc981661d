"""Part: what stages and their matrices have in common. It computes nothing.

Whoever keeps something made of many parts, as a layer does of its own for the native kernels, sees
by one number whether any was changed since. What is written into an array in place is not a change
of a part: `native.Places` tells that.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import mlx.core as mx


class Part:
    """An object that others keep something made of.

    Attributes:
        changes: how often an attribute of a part was set, any part's in this process.
    """

    changes: ClassVar[int] = 0

    def arrays(self) -> Iterator[mx.array]:
        """All arrays of it and of its own parts."""
        for value in vars(self).values():
            if isinstance(value, mx.array):
                yield value
            elif isinstance(value, Part):
                yield from value.arrays()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name != "_kept":  # their own
            Part.changes += 1
