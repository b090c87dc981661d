"""Expert fetch: from the router's choice to experts in memory.

This is where a run waits: once for the expert numbers, which the host needs to know what to read,
and then for the reads of those that the bank does not hold; whoever computes may have the experts
that are there while the others are still being read. A chunk of a prompt may name more experts than
the bank has slots; then they come in waves, each expert read once.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flashmoe_lab.cards import card
from flashmoe_lab.checkpoint.layer_file import LayerFile
from flashmoe_lab.stages.expert_landing import Landing, end
from flashmoe_lab.stages.part import Part
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.storage.bank import ExpertBank, Key, Placement
from flashmoe_lab.storage.reader import BlockBatch, Pending, Reader, ReadError, ReadRecords

_LANDING_NBYTES = 4 << 20  # computing with less at once costs more in calls than waiting does


@dataclass(slots=True, kw_only=True)
class Fetched:
    """The experts of a routing, in memory or on their way.

    What needs the reads to have ended waits for them; only `waves` gives experts before.

    Attributes:
        experts: int [T, K], as routed.
        later: experts that did not fit beside the first, in groups to be brought one after another.
        needless: reads that were begun ahead, of experts that are not asked for, or that others
            have settled since.
        hits, misses: distinct experts found in the bank, and read; of the waves so far.
    """

    experts: np.ndarray
    placed: Placement
    later: list[list[int]]
    fetch: "ExpertFetch"
    landings: list[Landing] = field(default_factory=list)
    needless: list[Landing] = field(default_factory=list)
    hits: int = 0
    misses: int = 0

    @property
    def first(self) -> Placement:
        """The placement that is in memory now; all of it unless `later` names more experts."""
        self.wait()
        return self.placed

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it is still to be read: asking for `first` waits for nothing."""
        return not self.later and all(landing.has_ended for landing in self.landings)

    @property
    def is_there(self) -> bool:
        """Whether it was all in the bank, and still is; whoever asks holds the bank's lock."""
        return not self.landings and not self.later and self._is_held()

    @property
    def slots(self) -> np.ndarray:
        """int [T, K]: where each pair's expert lies; -1 for those of later waves."""
        table = np.full(self.fetch.file.num_experts, -1)
        for expert, slot in self.first.slots.items():
            table[expert] = slot
        return table[self.experts]

    @property
    def reads(self) -> ReadRecords:
        """What was read so far, one record a piece."""
        self.wait()
        return ReadRecords.together([landing.finish() for landing in self.landings])

    @property
    def read_nbytes(self) -> int:
        """Bytes read from files so far."""
        return self.reads.nbytes

    def wait(self) -> None:
        """Wait for the reads that are under way.

        Raises:
            ReadError: a block could not be read whole.
            ValueError: a block has not the checksum that it should have.
        """
        for landing in self.landings:
            if landing.records is None:
                with self.fetch.bank.lock:
                    landing.finish()

    def waves(self) -> Iterator[Placement]:
        """Placements that together hold every expert.

        Compute with each before asking for the next, which may need its slots.

        Raises:
            ValueError: the first one's slots were given up since it was fetched.
            ReadError, ValueError: as `wait`.
        """
        if not self._is_held():
            self.wait()  # a failed read says more than that it is not there
            raise ValueError(
                f"layer {self.placed.layer}: these experts are no longer in the "
                "bank; fetch them again"
            )
        yield from self._parts(self.placed)
        while self.later:
            yield from self._parts(self.fetch.bring(self.later.pop(0), self))

    def _parts(self, placement: Placement) -> Iterator[Placement]:
        """A placement in parts: what lies there, then the misses as they come."""
        landings = self._landings_of(placement)
        coming = {expert for landing in landings for expert in landing.placement.misses}
        there = {e: slot for e, slot in placement.slots.items() if e not in coming}
        if there:
            misses = tuple(expert for expert in placement.misses if expert in there)
            yield replace(placement, slots=there, misses=misses)
        for landing in landings:
            yield from landing.parts()

    def _landings_of(self, placement: Placement) -> list[Landing]:
        """A placement's own reads that may be under way."""
        open_ones = [landing for landing in self.landings if landing.records is None]
        return [one for one in open_ones if one.placement.misses[0] in placement.slots]

    @property
    def holds_some(self) -> bool:
        """Whether the bank held some of the first placement's experts already."""
        return len(self.placed.misses) < len(self.placed.slots)

    def _is_held(self) -> bool:
        """Whether the first placement's experts lie in its slots, or its own reads bring them."""
        bank = self.fetch.bank
        if not self._landings_of(self.placed):
            bank.settle()  # another's may be under way, of the same experts into the same slots
        return bank.holds(self.placed)

    def _repr_html_(self) -> str:
        self.wait()
        rows = {
            "experts": len(self.placed.slots) + sum(map(len, self.later)),
            "found in the bank": self.hits,
            "read": f"{self.misses} ({self.read_nbytes / 1e6:.2f} MB)",
            "waves": 1 + len(self.later),
        }
        return card(f"Fetched for layer {self.placed.layer}", rows)


class ExpertFetch(Part):
    """Brings the experts of one layer into the bank.

    Args:
        file: where the layer's blocks lie.
        verify: check each block against its checksum the first time that it is read.
        overlap: do not wait for the reads; who computes gets the experts as they come.
        prefetch: experts at the most that are read before the router has spoken; with `overlap`.
    """

    def __init__(
        self,
        file: LayerFile,
        bank: ExpertBank,
        reader: Reader,
        verify: bool = False,
        overlap: bool = False,
        prefetch: int = 0,
    ) -> None:
        self.file, self.bank, self.reader, self.overlap = file, bank, reader, overlap
        self.prefetch = prefetch
        self.landing_blocks = -(-_LANDING_NBYTES // file.layout.block_nbytes)
        self._offsets = file.offset(0) + file.layout.block_nbytes * np.arange(file.num_experts)
        self._unverified = set(range(file.num_experts)) if verify else set[int]()
        self._checksums = file.checksums() if verify else np.empty(0)

    @property
    def verifies(self) -> bool:
        """Whether there are blocks that have still to be checked."""
        return bool(self._unverified)

    def __call__(self, routing: Routing) -> Fetched:
        """Wait for the routing, then, unless reads overlap, for the experts that the bank does not
        hold.

        Raises:
            ReadError: a block could not be read whole.
            ValueError: a block has not the checksum that it should have.
        """
        return self.of(np.array(routing.experts))

    def of(self, experts: np.ndarray, early: Sequence[Landing] = ()) -> Fetched:
        """The same for experts int [T, K]; `early` are under way since `begin` or `begin_ahead`.

        Given such, the bank's lock is held by the caller.
        """
        asked = np.unique(experts).tolist()
        groups = self.bank.waves(self.file.layer, asked)
        keys = {(self.file.layer, expert) for expert in asked}
        mine = [
            landing
            for landing in early
            if not keys.isdisjoint(landing.keys) and self.bank.is_announced(landing)
        ]
        fetched = Fetched(
            experts=experts,
            placed=Placement(layer=self.file.layer, slots={}, misses=()),
            later=groups[1:],
            fetch=self,
            landings=mine,
            needless=[landing for landing in early if landing not in mine],
        )
        fetched.placed = self.bring(groups[0], fetched, mine)
        return fetched

    @property
    def begins_early(self) -> bool:
        """Whether `begin` may be of use: where reads go on beside the computing, past the page
        cache, which nobody then wants to ask before, and into slots for all that a chunk needs."""
        reads = self.overlap and self.reader.name == "direct"
        return reads and self.bank.has_room(self.file.layer, self.file.num_experts)

    def begin(self, experts: np.ndarray) -> list[Landing]:
        """Start to read what some tokens of a chunk need, while the other tokens' experts are not
        known. `of` the whole chunk comes next; the bank's lock is held from here to there."""
        placement = self.bank.place_early(self.file.layer, np.unique(experts).tolist())
        return [self._read(placement)] if placement.misses else []

    def missing(self, experts: Iterable[int]) -> list[int]:
        """Those that the bank does not hold, in the order given."""
        return [expert for expert in experts if (self.file.layer, expert) not in self.bank]

    def begin_ahead(
        self, experts: Iterable[int], busy: Collection[Key], cached: Any = None
    ) -> list[Landing]:
        """Start to read experts that are `missing` and likely to be asked for, each by itself, as
        far as the bank has room; the slots of `busy` are computed with meanwhile.

        `of` what is asked for takes them. One that is not stays in the bank until the policy gives
        it up, and an error in reading it is nobody's.
        """
        landings: list[Landing] = []
        for expert in experts:
            placement = self.bank.place_ahead(self.file.layer, expert, busy)
            if placement is None:
                break
            with suppress(ReadError):
                landings.append(self._read(placement, is_ahead=True, cached=cached))
        return landings

    def preload(self) -> None:
        """Bring every expert of the layer, for a model that is to be wholly in memory."""
        self(Routing.of_all(self.file.num_experts)).wait()

    def bring(
        self, experts: list[int], fetched: Fetched, early: Sequence[Landing] = ()
    ) -> Placement:
        """Place experts in the bank, start to read those that were not there and are not coming
        `early`, and note it in `fetched`."""
        with self.bank.lock:
            begun = {expert for landing in early for expert in landing.placement.misses}
            placement = self.bank.place(self.file.layer, experts, early)
            fetched.hits += len(experts) - len(placement.misses)
            fetched.misses += len(placement.misses)
            missing = tuple(expert for expert in placement.misses if expert not in begun)
            if missing:
                fetched.landings.append(self._read(replace(placement, misses=missing)))
            return placement

    def _read(self, placement: Placement, **told: Any) -> Landing:
        pending: Pending = _Ended(ReadRecords.of([]))
        try:
            pending = self.reader.submit(self._batch(placement))
            if not self.overlap:
                pending = _Ended(pending.wait())
        except BaseException:
            end(pending)
            self.give_up(placement)
            raise
        landing = Landing(self, placement, pending, **told)
        if self.overlap:
            self.bank.landing(landing)
        else:
            landing.finish()
        return landing

    def _batch(self, placement: Placement) -> BlockBatch:
        misses = np.array(placement.misses)
        pool = self.bank.pool(self.file.layer)
        return BlockBatch(
            layer=self.file.layer,
            experts=misses,
            offsets=self._offsets[misses],
            addresses=pool.addresses([placement.slots[expert] for expert in placement.misses]),
            part_nbytes=pool.part_nbytes,
            owner=pool,
        )

    def count(self, records: ReadRecords) -> ReadRecords:
        """Add what was read to the bank's counts."""
        self.bank.counts.read_nbytes += records.nbytes
        return records

    def give_up(self, placement: Placement) -> None:
        """What was not read whole must not be found in the bank later."""
        self.bank.forget((self.file.layer, expert) for expert in placement.misses)

    def verify(self, placement: Placement) -> None:
        """Hold blocks that were read for the first time against their checksums."""
        for expert in self._unverified.intersection(placement.misses):
            block = self.bank.pool(self.file.layer).block(placement.slots[expert])
            self.file.check_block(expert, block, int(self._checksums[expert]))
            self._unverified.discard(expert)

    def reference(self, expert: int) -> dict[str, np.ndarray]:
        """An expert's matrices [out, in] by projection in float64, read from the file without the
        bank."""
        return self.file.matrices64(expert)


class _Ended:
    """Reads that were waited for already, as a `Pending`."""

    done = True

    def __init__(self, records: ReadRecords) -> None:
        self._records = records

    def wait(self) -> ReadRecords:
        return self._records

    def landed(self, least: int = 1) -> Iterator[list[int]]:
        return iter(())
