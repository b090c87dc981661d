"""Cache policies: which expert to give up when a slot is needed.

A policy sees keys (any hashable; the engine uses (layer, expert)) and the order in which they are
used. It holds no memory and reads nothing, so a simulator runs the same objects as the engine. It
never decides whether an expert is read: a routed expert always is.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterator


class CachePolicy(ABC):
    """The order in which keys leave a cache; the cache itself knows its capacity."""

    name: str

    @abstractmethod
    def admit(self, key: Hashable) -> None:
        """`key` was brought in."""

    @abstractmethod
    def touch(self, key: Hashable) -> None:
        """`key` was found in the cache and used."""

    @abstractmethod
    def victim(self, pinned: Container[Hashable]) -> Hashable:
        """Take out and return the key to give up, none of `pinned`; LookupError if all are
        pinned."""

    @abstractmethod
    def discard(self, key: Hashable) -> None:
        """Forget `key`, whose content was lost."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Hashable]:
        """All keys, the next victim first where the policy has such an order."""


class LRU(CachePolicy):
    """Gives up the key whose last use is longest ago."""

    name = "lru"

    def __init__(self) -> None:
        self._keys: OrderedDict[Hashable, None] = OrderedDict()

    def admit(self, key: Hashable) -> None:
        """See CachePolicy."""
        self._keys[key] = None
        self._keys.move_to_end(key)

    def touch(self, key: Hashable) -> None:
        """See CachePolicy."""
        self._keys.move_to_end(key)

    def victim(self, pinned: Container[Hashable]) -> Hashable:
        """See CachePolicy."""
        for key in self._keys:
            if key not in pinned:
                del self._keys[key]
                return key
        raise LookupError("every key in the cache is in use")

    def discard(self, key: Hashable) -> None:
        """See CachePolicy."""
        self._keys.pop(key, None)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Hashable]:
        """From the first to be given up to the last."""
        return iter(self._keys)


POLICIES: dict[str, type[CachePolicy]] = {"lru": LRU}


def make_policy(name: str) -> CachePolicy:
    """A new policy by name; ValueError lists the names."""
    if name not in POLICIES:
        raise ValueError(f"policy is {name!r}; known are {', '.join(POLICIES)}")
    return POLICIES[name]()
