"""Expert fetch: from the router's choice to experts in memory.

This is where a run waits: once for the expert numbers, which the host needs to know what to read,
and then for the reads of those that the bank does not hold; whoever computes may have the experts
that are there while the others are still being read. A chunk of a prompt may name more experts than
the bank has slots; then they come in waves, each expert read once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import perf_counter_ns
from typing import TypeVar

import numpy as np

from flashmoe_lab.cards import card
from flashmoe_lab.checkpoint.layer_file import LayerFile
from flashmoe_lab.stages.part import Part
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.storage.bank import ExpertBank, Placement
from flashmoe_lab.storage.reader import BlockBatch, Pending, Reader, ReadRecords

T = TypeVar("T")
_LANDING_NBYTES = 4 << 20  # computing with less at once costs more in calls than waiting does


class Landing:
    """The reads of one placement, under way into its slots.

    `parts` gives what has come while the rest is still being read; `finish` waits for all. What
    fails is forgotten by the bank, and the error is raised to whoever asks for the experts.

    Attributes:
        records: what was read, once all has come well.
        wait_start_ns, waited_ns: when somebody first waited here for reads (0: nobody yet), and for
            how long in all.
    """

    def __init__(self, fetch: "ExpertFetch", placement: Placement, pending: Pending) -> None:
        self.fetch, self.placement = fetch, placement
        self.records: ReadRecords | None = None
        self.wait_start_ns = self.waited_ns = 0
        self._pending = pending
        self._error: BaseException | None = None

    def finish(self) -> ReadRecords:
        """Wait for every read; their records.

        Raises:
            ReadError: a block could not be read whole.
            ValueError: a block has not the checksum that it should have.
        """
        if self._error is not None:
            raise self._error
        if self.records is None:
            try:
                records = self._waited(self._pending.wait)
                self.fetch.verify(self.placement)
                self.records = self.fetch.count(records)
            except BaseException as error:
                _end(self._pending)
                self.fetch.give_up(self.placement)
                self._error = error
                raise
        return self.records

    def settle(self) -> None:
        """Wait for every read, and leave an error to the one who finishes."""
        if self._error is None:
            with suppress(OSError, ValueError):
                self.finish()

    def parts(self) -> Iterator[Placement]:
        """The misses of the placement in parts, as they come."""
        slots, misses = self.placement.slots, self.placement.misses
        verifies = self.fetch.verifies  # no longer, once the last of its blocks was checked
        if not verifies:
            landed = self._pending.landed(self.fetch.landing_blocks)
            while numbers := self._waited(lambda: next(landed, None)):
                came = tuple(misses[number] for number in sorted(numbers))
                yield Placement(
                    layer=self.placement.layer, slots={e: slots[e] for e in came}, misses=came
                )
        self.finish()
        if verifies:
            yield replace(self.placement, slots={expert: slots[expert] for expert in misses})

    @property
    def has_ended(self) -> bool:
        """Whether finishing waits for nothing."""
        return self.records is not None or self._pending.done

    def _waited(self, wait: Callable[[], T]) -> T:
        start = perf_counter_ns()
        try:
            return wait()
        finally:
            self.wait_start_ns = self.wait_start_ns or start
            self.waited_ns += perf_counter_ns() - start


@dataclass(slots=True, kw_only=True)
class Fetched:
    """The experts of a routing, in memory or on their way.

    What needs the reads to have ended waits for them; only `waves` gives experts before.

    Attributes:
        experts: int [T, K], as routed.
        later: experts that did not fit beside the first, in groups to be brought one after another.
        hits, misses: distinct experts found in the bank, and read; of the waves so far.
    """

    experts: np.ndarray
    placed: Placement
    later: list[list[int]]
    fetch: "ExpertFetch"
    landings: list[Landing] = field(default_factory=list)
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
    """

    def __init__(
        self,
        file: LayerFile,
        bank: ExpertBank,
        reader: Reader,
        verify: bool = False,
        overlap: bool = False,
    ) -> None:
        self.file, self.bank, self.reader, self.overlap = file, bank, reader, overlap
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
        """The same for experts int [T, K]; those in `early` are under way since `begin`."""
        groups = self.bank.waves(self.file.layer, np.unique(experts).tolist())
        fetched = Fetched(
            experts=experts,
            placed=Placement(layer=self.file.layer, slots={}, misses=()),
            later=groups[1:],
            fetch=self,
            landings=list(early),
        )
        fetched.placed = self.bring(groups[0], fetched)
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

    def preload(self) -> None:
        """Bring every expert of the layer, for a model that is to be wholly in memory."""
        self(Routing.of_all(self.file.num_experts)).wait()

    def bring(self, experts: list[int], fetched: Fetched) -> Placement:
        """Place experts in the bank, start to read those that were not there, and note it in
        `fetched`."""
        with self.bank.lock:
            begun = {e for landing in fetched.landings for e in landing.placement.misses}
            placement = self.bank.place(self.file.layer, experts, begun.intersection(experts))
            fetched.hits += len(experts) - len(placement.misses)
            fetched.misses += len(placement.misses)
            missing = tuple(expert for expert in placement.misses if expert not in begun)
            if missing:
                fetched.landings.append(self._read(replace(placement, misses=missing)))
            return placement

    def _read(self, placement: Placement) -> Landing:
        misses = np.array(placement.misses)
        pool = self.bank.pool(self.file.layer)
        batch = BlockBatch(
            layer=self.file.layer,
            experts=misses,
            offsets=self._offsets[misses],
            addresses=pool.addresses([placement.slots[expert] for expert in placement.misses]),
            part_nbytes=pool.part_nbytes,
            owner=pool,
        )
        pending: Pending = _Ended(ReadRecords.of([]))
        try:
            pending = self.reader.submit(batch)
            if not self.overlap:
                pending = _Ended(pending.wait())
        except BaseException:
            _end(pending)
            self.give_up(placement)
            raise
        landing = Landing(self, placement, pending)
        if self.overlap:
            self.bank.landing(landing.settle)
        else:
            landing.finish()
        return landing

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


def _end(pending: Pending) -> None:
    """Wait until no thread writes into the slots any more, however often Ctrl-C is pressed: only
    then may others have them."""
    while True:
        try:
            pending.wait()
        except KeyboardInterrupt:
            continue
        except Exception:  # its owner has it already
            return
        return


class _Ended:
    """Reads that were waited for already, as a `Pending`."""

    done = True

    def __init__(self, records: ReadRecords) -> None:
        self._records = records

    def wait(self) -> ReadRecords:
        return self._records

    def landed(self, least: int = 1) -> Iterator[list[int]]:
        return iter(())
