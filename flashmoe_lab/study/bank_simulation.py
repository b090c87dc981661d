"""A recorded run, gone over again with banks of other sizes and policies: what would they have hit?

The same policy objects and the same order as in the engine's bank, without memory or reading, so
the simulation of the bank that a run had gives that run's own hits, if its layers are packed alike
(the engine keeps blocks of each size apart) and nothing was read ahead of the router. What differs
from a real run: the experts are those of this text, and nothing is said about time.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Container, Hashable, Iterator, Sequence

import numpy as np
import pandas as pd

from flashmoe_lab.storage.policy import POLICIES, CachePolicy
from flashmoe_lab.trace import Trace
from flashmoe_lab.trace.export import requests

Key = tuple[int, int]  # (layer, expert)
Group = list[Key]  # what one layer asked for in one pass


class Belady(CachePolicy):
    """Gives up the key that is asked for again last. It knows what will be asked, in order, so no
    engine can have it: it is the bound for all others.

    Args:
        keys: every request to come; each is then admitted or touched once.
    """

    name = "belady"

    def __init__(self, keys: Sequence[Hashable]) -> None:
        self._uses: dict[Hashable, deque[int]] = defaultdict(deque)
        for place, key in enumerate(keys):
            self._uses[key].append(place)
        self._never = len(keys)
        self._next: dict[Hashable, int] = {}  # of the keys that are held
        self._heap: list[tuple[int, Hashable]] = []  # the farthest first; old entries stay in it

    def admit(self, key: Hashable) -> None:
        """See CachePolicy."""
        self._uses[key].popleft()
        self._next[key] = self._uses[key][0] if self._uses[key] else self._never
        heapq.heappush(self._heap, (-self._next[key], key))

    touch = admit

    def victim(self, pinned: Container[Hashable]) -> Hashable:
        """See CachePolicy."""
        aside: list[tuple[int, Hashable]] = []
        try:
            while self._heap:
                entry = heapq.heappop(self._heap)
                if self._next.get(entry[1]) != -entry[0]:
                    continue
                if entry[1] not in pinned:
                    del self._next[entry[1]]
                    return entry[1]
                aside.append(entry)
        finally:
            for entry in aside:
                heapq.heappush(self._heap, entry)
        raise LookupError("every key in the cache is in use")

    def discard(self, key: Hashable) -> None:
        """See CachePolicy."""
        self._next.pop(key, None)

    def __len__(self) -> int:
        return len(self._next)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._next)


def simulate(
    trace: Trace,
    slots: Sequence[int],
    policies: Sequence[str] = ("lru", "belady"),
) -> pd.DataFrame:
    """policy, slots, hits, hit_rate: what banks that are empty at first would hit.

    Raises:
        ValueError: a bank smaller than K, an unknown policy, or a trace without requests.
    """
    groups = _groups(trace)
    if not groups:
        raise ValueError("the trace has no requests: no pass went through the model")
    least, total = trace.facts["num_experts_per_tok"], sum(map(len, groups))
    makers = _makers(groups)
    if unknown := set(policies) - set(makers):
        raise ValueError(f"policy {min(unknown)!r} is unknown; there are {', '.join(makers)}")
    rows: list[dict[str, object]] = []
    for size in slots:
        if size < least:
            raise ValueError(f"slots is {size}; a layer needs at least K = {least} at once")
        for name in policies:
            hits = _hits(groups, size, makers[name]())
            rows.append({"policy": name, "slots": size, "hits": hits, "hit_rate": hits / total})
    return pd.DataFrame(rows)


def _makers(groups: list[Group]) -> dict[str, Callable[[], CachePolicy]]:
    keys = [key for group in groups for key in group]
    return {**POLICIES, "belady": lambda: Belady(keys)}


def _groups(trace: Trace) -> list[Group]:
    asked = requests(trace)
    layers, experts = asked.layer.to_numpy(), asked.expert.to_numpy()
    passes = asked["pass"].to_numpy()
    keys = list(zip(layers.tolist(), experts.tolist(), strict=True))
    ends = np.flatnonzero((np.diff(layers) != 0) | (np.diff(passes) != 0)) + 1
    starts = [0, *ends.tolist()]
    return [keys[a:b] for a, b in zip(starts, [*starts[1:], len(keys)], strict=True) if a < b]


def _hits(groups: list[Group], slots: int, policy: CachePolicy) -> int:
    """As ExpertBank.place, and as its waves where a chunk names more experts than there are
    slots."""
    held, hits = set[Hashable](), 0
    for group in groups:
        order = sorted(group, key=lambda key: (key not in held, key))
        for start in range(0, len(order), slots):
            wave = sorted(order[start : start + slots])
            pinned, misses = set(wave), [key for key in wave if key not in held]
            for key in wave:
                if key in held:
                    policy.touch(key)
            for key in misses:
                if len(held) == slots:
                    held.discard(policy.victim(pinned))
                held.add(key)
                policy.admit(key)
            hits += len(wave) - len(misses)
    return hits
