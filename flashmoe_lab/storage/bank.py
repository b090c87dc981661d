"""ExpertBank: which expert lies in which slot, and which slot is given up for the next one.

The bank is bookkeeping over slot pools: it reads no files (the fetch stage does, into the memory
that the bank names) and computes nothing. Slots are shared by all layers whose blocks have the same
layout, so a small bank is as useful to one layer as to sixty. With no capacity at all it keeps
nothing between requests: every expert is read each time, and the operating system's page cache is
the only cache.

Threads: a run's and a caller's may share a bank. Whoever places and reads, or checks and computes,
holds `lock` meanwhile.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from flashmoe_lab.checkpoint.layer_file import BlockLayout, LayerFile
from flashmoe_lab.storage.free_memory import available_memory_nbytes
from flashmoe_lab.storage.policy import CachePolicy, make_policy
from flashmoe_lab.storage.slot_pool import SlotPool
from flashmoe_lab.units import format_nbytes

Key = tuple[int, int]  # (layer, expert)
# Announced products, and their bytes, before the bank waits for them of its own accord.
_MAX_BUSY, _MAX_BUSY_NBYTES = 256, 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Slots for some experts of a layer: those in `misses` have still to be read.

    Attributes:
        slots: expert -> slot, for every expert asked for.
        misses: the experts that were not in the bank, in file order.
    """

    layer: int
    slots: dict[int, int]
    misses: tuple[int, ...]


class UnderWay(Protocol):
    """Reads into slots that were placed.

    Attributes:
        keys: whose slots they write.
        is_ahead: whether nobody had asked for them when they began.
    """

    keys: frozenset[Key]
    is_ahead: bool

    @property
    def has_ended(self) -> bool:
        """Whether `settle` waits for nothing."""
        ...

    def settle(self) -> None:
        """Wait for them and forget what did not come; does not raise for a failed read."""
        ...


@dataclass(slots=True)
class BankCounts:
    """What the bank was asked since it was made: experts found, experts not, and the bytes read for
    those."""

    hits: int = 0
    misses: int = 0
    read_nbytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits over all, 0 before the first."""
        total = self.hits + self.misses
        return self.hits / total if total else 0.0


class _Shelf:
    """One pool with what lies in its slots; `is_enough` if none of `experts` ever has to go."""

    def __init__(self, pool: SlotPool, policy: CachePolicy, experts: int) -> None:
        self.pool, self.policy, self.is_enough = pool, policy, pool.slots >= experts
        self.slot_of: dict[Key, int] = {}
        self.free = list(range(pool.slots - 1, -1, -1))

    def take_slot(self, pinned: Collection[Key]) -> int:
        if self.free:
            return self.free.pop()
        key = self.policy.victim(pinned)
        return self.slot_of.pop(key)  # pyright: ignore[reportArgumentType]


class ExpertBank:
    """Slots for the experts of all layers.

    Args:
        layers: the layer files whose experts will be asked for.
        capacity_nbytes: memory for slots; 0 keeps nothing between requests, None holds every
            expert.
        workspace: slots there are at least, whatever the capacity (a layer needs K at once; with
            fewer it works in several waves).
        policy: name of the cache policy.
        form: memory form of the pools (see slot_pool).
    """

    def __init__(
        self,
        layers: Sequence[LayerFile],
        capacity_nbytes: int | None,
        *,
        workspace: int = 1,
        policy: str | Callable[[], CachePolicy] = "lru",
        form: str = "block",
    ) -> None:
        if capacity_nbytes is not None and capacity_nbytes < 0:
            raise ValueError(f"bank capacity is {capacity_nbytes} bytes; it must be 0 or more")
        self.keeps = capacity_nbytes != 0
        self.counts = BankCounts()
        experts = _experts_by_layout(layers)
        slots = _slots_by_layout(experts, capacity_nbytes, workspace)
        _check_memory(sum(layout.block_nbytes * count for layout, count in slots.items()))
        self.policy_name = policy if isinstance(policy, str) else policy().name
        make = (lambda: make_policy(policy)) if isinstance(policy, str) else policy
        shelves = {
            layout: _Shelf(SlotPool(layout, count, form), make(), experts[layout])
            for layout, count in slots.items()
        }
        self._shelves = list(shelves.values())
        self._shelf_of = {layer.layer: shelves[layer.layout] for layer in layers}
        self.lock = threading.RLock()
        self._landing: list[UnderWay] = []
        self._busy: list[mx.array] = []
        self._busy_nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(shelf.pool.nbytes for shelf in self._shelves)

    @property
    def slots(self) -> int:
        """Slots of all pools."""
        return sum(shelf.pool.slots for shelf in self._shelves)

    def pool(self, layer: int) -> SlotPool:
        """The pool that holds a layer's experts."""
        return self._shelf_of[layer].pool

    def __contains__(self, key: Key) -> bool:
        return key in self._shelf_of[key[0]].slot_of

    def contents(self) -> list[Key]:
        """(layer, expert) of everything held, in no order."""
        return [key for shelf in self._shelves for key in shelf.slot_of]

    def waves(self, layer: int, experts: Iterable[int]) -> list[list[int]]:
        """Experts in groups that fit the pool together: those held already first, the rest in file
        order."""
        shelf = self._shelf_of[layer]
        wanted = sorted(experts, key=lambda expert: ((layer, expert) not in shelf.slot_of, expert))
        size = shelf.pool.slots
        return [sorted(wanted[i : i + size]) for i in range(0, len(wanted), size)]

    def has_room(self, layer: int, experts: int) -> bool:
        """Whether that many of a layer's experts are kept beside each other."""
        return self.keeps and self._shelf_of[layer].pool.slots >= experts

    def place_early(self, layer: int, experts: Iterable[int]) -> Placement:
        """Give slots to some of the experts of a chunk, while the others are not known.

        The whole chunk's `place` comes next and has the same outcome as without this: only slots
        are given that are free, or those of another layer's experts, which would go anyway. So
        `slots` may lack some; all that it has are to be read. Waits for no reads under way.
        """
        shelf = self._shelf_of[layer]
        own = {key for key in shelf.slot_of if key[0] == layer}
        pinned = own.union(self._under_way())
        slots: dict[int, int] = {}
        self._finish()
        for key in sorted({(layer, expert) for expert in experts}.difference(own)):
            if not shelf.free and next(iter(shelf.policy)) in pinned:
                break  # it may be one that the chunk needs
            slots[key[1]] = shelf.slot_of[key] = shelf.take_slot(pinned)
            shelf.policy.admit(key)
            pinned.add(key)
        return Placement(layer=layer, slots=slots, misses=tuple(slots))

    def may_place_ahead(self, layer: int, experts: int) -> bool:
        """Whether `place_ahead` may give a slot where layers ask for so many experts: the pool may
        lack some, and has room for those of two layers."""
        shelf = self._shelf_of[layer]
        lacks = bool(shelf.free) or not shelf.is_enough
        return lacks and self.keeps and shelf.pool.slots > 2 * experts

    def place_ahead(self, layer: int, expert: int, busy: Collection[Key]) -> Placement | None:
        """Give a slot to an expert that the bank does not hold and that nobody has asked for yet.

        Unlike after `place_early` the bank is another one if nobody asks for it. Slots of `busy`
        and of reads under way stay theirs, and as many as `busy` has are left to the next `place`;
        None where the pool is too small for that. Waits for no reads under way.
        """
        shelf, coming = self._shelf_of[layer], self._under_way()
        if not self.keeps or shelf.pool.slots <= 2 * len(busy) + len(coming.difference(busy)):
            return None
        self._finish()
        key = (layer, expert)
        slot = shelf.slot_of[key] = shelf.take_slot(coming.union(busy))
        shelf.policy.admit(key)
        return Placement(layer=layer, slots={expert: slot}, misses=(expert,))

    def place(
        self, layer: int, experts: Sequence[int], early: Sequence[UnderWay] = ()
    ) -> Placement:
        """Find or give every expert a slot; the caller reads the misses before anybody computes
        with them.

        Waits for reads that were announced with `landing`, so nothing is found that has not come,
        but not for those that were begun ahead of other experts; and for products that were
        announced with `in_use`, so no slot is overwritten under a reader.

        Args:
            early: reads that are announced, of experts that `place_early` or `place_ahead` gave
                slots: those are misses too, and are not waited for.

        Raises:
            ValueError: more experts than the pool has slots.
        """
        shelf = self._shelf_of[layer]
        if len(experts) > shelf.pool.slots:
            raise ValueError(
                f"layer {layer}: {len(experts)} experts at once, "
                f"the bank has {shelf.pool.slots} slots; use waves()"
            )
        keys = [(layer, expert) for expert in experts]
        self._settle_for(keys, early)
        if not self.keeps:
            self.forget(list(shelf.slot_of))
        begun = frozenset[Key]().union(*(reads.keys for reads in early))
        misses = sorted(key for key in keys if key not in shelf.slot_of or key in begun)
        if misses:
            self._finish()
        missed, pinned = set(misses), self._under_way().union(keys)
        for key in keys:
            if key not in missed:
                shelf.policy.touch(key)
        try:
            for key in misses:
                if key in begun:
                    shelf.policy.discard(key)  # its turn among the misses is now
                else:
                    shelf.slot_of[key] = shelf.take_slot(pinned)
                shelf.policy.admit(key)
        except BaseException:  # Ctrl-C: nobody will read them, so nobody may find them
            self.forget(misses)
            raise
        self.counts.hits += len(keys) - len(misses)
        self.counts.misses += len(misses)
        return Placement(
            layer=layer,
            slots={key[1]: shelf.slot_of[key] for key in keys},
            misses=tuple(expert for _, expert in misses),
        )

    def find(self, layer: int, experts: Sequence[int]) -> list[int] | None:
        """The slots of experts that the bank holds, each asked for once; None if it does not hold
        them all, and they are to be placed."""
        if not self.keeps:
            return None
        if self._landing:
            self._settle_for([(layer, expert) for expert in experts])
        shelf = self._shelf_of[layer]
        slot_of = shelf.slot_of
        try:
            slots = [slot_of[layer, expert] for expert in experts]
        except KeyError:
            return None
        if not shelf.is_enough:
            for expert in sorted(experts):  # as `place` is asked
                shelf.policy.touch((layer, expert))
        self.counts.hits += len(experts)
        return slots

    def holds(self, placement: Placement) -> bool:
        """Whether every expert of a placement still lies in its slot, or is on its way to it."""
        slot_of = self._shelf_of[placement.layer].slot_of
        return all(slot_of.get((placement.layer, e)) == slot for e, slot in placement.slots.items())

    def forget(self, keys: Iterable[Key]) -> None:
        """Drop experts whose content is not to be used again; their slots become free, once
        nothing is read into them any more."""
        keys = list(keys)
        for reads in list(self._landing):
            if not reads.keys.isdisjoint(keys):
                self._settle(reads)
        for key in keys:
            shelf = self._shelf_of[key[0]]
            slot = shelf.slot_of.pop(key, None)
            if slot is not None:
                shelf.policy.discard(key)
                shelf.free.append(slot)

    def landing(self, reads: UnderWay) -> None:
        """Announce reads under way into slots that were just placed; see `place` for how long
        they may go on."""
        self._landing.append(reads)

    def is_announced(self, reads: UnderWay) -> bool:
        """Whether nobody has settled them since; until then their slots are theirs."""
        return any(one is reads for one in self._landing)

    def settle(self) -> None:
        """Wait for the reads that were announced with `landing`."""
        while self._landing:
            self._settle(self._landing[0])

    def _settle(self, reads: UnderWay) -> None:
        self._landing.remove(reads)
        reads.settle()

    def _settle_for(self, keys: Sequence[Key], early: Sequence[UnderWay] = ()) -> None:
        """The same but for `early`, and for reads of others than `keys` that were begun ahead, if
        the pool has slots for all."""
        others = [reads for reads in self._landing if not any(reads is one for one in early)]
        for reads in others:
            if not reads.is_ahead or reads.has_ended or not reads.keys.isdisjoint(keys):
                self._settle(reads)
        if keys and len(self._under_way().union(keys)) > self.pool(keys[0][0]).slots:
            for reads in others:
                if self.is_announced(reads):
                    self._settle(reads)

    def _under_way(self) -> frozenset[Key]:
        return frozenset[Key]().union(*(reads.keys for reads in self._landing))

    def in_use(self, product: mx.array) -> None:
        """Announce a lazy product that reads slots: it is finished before any slot is
        overwritten.

        It is submitted here, in the thread that made it: another could not.
        """
        mx.async_eval(product)
        self._busy.append(product)
        self._busy_nbytes += product.nbytes
        # A bank that never misses must not keep them all.
        if len(self._busy) > _MAX_BUSY or self._busy_nbytes > _MAX_BUSY_NBYTES:
            self._finish()

    def _finish(self) -> None:
        if self._busy:
            mx.eval(self._busy)
            self._busy.clear()
            self._busy_nbytes = 0


def _experts_by_layout(layers: Sequence[LayerFile]) -> dict[BlockLayout, int]:
    totals: dict[BlockLayout, int] = {}
    for layer in layers:
        totals[layer.layout] = totals.get(layer.layout, 0) + layer.num_experts
    return totals


def _slots_by_layout(
    experts: Mapping[BlockLayout, int], capacity_nbytes: int | None, workspace: int
) -> dict[BlockLayout, int]:
    """Slots of each layout's pool: capacity is shared in proportion to the bytes that the layouts
    have on disk."""
    everything = sum(layout.block_nbytes * count for layout, count in experts.items())
    slots: dict[BlockLayout, int] = {}
    for layout, count in experts.items():
        share = count
        if capacity_nbytes is not None:
            share = min(count, int(capacity_nbytes * count / everything))
        slots[layout] = max(share, min(workspace, count))
    return slots


def _check_memory(nbytes: int) -> None:
    available = available_memory_nbytes()
    if available is not None and nbytes > available:
        raise MemoryError(
            f"the bank wants {format_nbytes(nbytes)}, {format_nbytes(available)} of memory are "
            "free; give a smaller bank_gb"
        )


def default_capacity_nbytes(expert_nbytes: int) -> int:
    """Memory that a bank takes where nobody says: a quarter of what is free, at most what all
    experts need."""
    available = available_memory_nbytes()
    return expert_nbytes if available is None else min(expert_nbytes, available // 4)
