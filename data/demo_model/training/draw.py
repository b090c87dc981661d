"""Seeded random choices, and the rule that keeps training and evaluation apart.

Every generator takes a `Draw` and nothing else that is random, so a seed fixes what it makes.
Content that an evaluation prompt may ask for has a key (the operands of a sum, the items of a
list); `Draw.allows` gives one key in ten to the held-out side and the others to training, by a hash
of the key. So the two sides are disjoint whatever their seeds are.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

HELD_OUT_SHARE = 10


def is_held_out(key: str) -> bool:
    """Whether `key` belongs to evaluation; about one in `HELD_OUT_SHARE` does."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


@dataclass(slots=True)
class Draw:
    """Random choices of one side of the split."""

    rng: random.Random
    held_out: bool = False

    @classmethod
    def of(cls, seed: int | str, held_out: bool = False) -> "Draw":
        """A draw whose choices the seed fixes."""
        return cls(random.Random(f"demo model {seed}"), held_out)

    def pick(self, *options: T) -> T:
        """One of the arguments."""
        return options[int(self.rng.random() * len(options))]

    def choice(self, options: Sequence[T]) -> T:
        """One of a sequence."""
        return options[int(self.rng.random() * len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different places of a sequence, in random order."""
        return self.rng.sample(options, count)

    def number(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self.rng.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def allows(self, key: str) -> bool:
        """Whether this side of the split may ask for `key`."""
        return is_held_out(key) == self.held_out

    def until(self, make: Callable[[], T], key: Callable[[T], str]) -> T:
        """Makes things until one is on this side of the split."""
        for _ in range(10_000):
            made = make()
            if self.allows(key(made)):
                return made
        side = "held-out" if self.held_out else "training"
        raise ValueError(f"10000 tries gave no {side} item; are there so few?")
