"""Expert fetch: from the router's choice to experts in memory.

This is where a run waits: once for the expert numbers, which the host needs to know what to read,
and then for the reads of those that the bank does not hold. A chunk of a prompt may name more
experts than the bank has slots; then they come in waves, each expert read once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from flashmoe_lab.cards import card
from flashmoe_lab.checkpoint.layer_file import LayerFile
from flashmoe_lab.checkpoint.quantize import dequantize_reference
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.storage.bank import ExpertBank, Placement
from flashmoe_lab.storage.reader import BlockRead, Reader, ReadRecord


@dataclass(slots=True, kw_only=True)
class Fetched:
    """The experts of a routing, in memory or on their way wave by wave.

    Attributes:
        experts: int [T, K], as routed.
        first: the placement that is in memory now; all of it unless `later` names more experts.
        later: experts that did not fit beside the first, in groups to be brought one after another.
        reads: what was read, one record a piece; grows while `waves` goes on.
        hits, misses: distinct experts found in the bank, and read; of the waves so far.
    """

    experts: np.ndarray
    first: Placement
    later: list[list[int]]
    fetch: "ExpertFetch"
    reads: list[ReadRecord] = field(default_factory=list)
    hits: int = 0
    misses: int = 0

    @property
    def slots(self) -> np.ndarray:
        """int [T, K]: where each pair's expert lies; -1 for those of later waves."""
        table = np.full(self.fetch.file.num_experts, -1)
        for expert, slot in self.first.slots.items():
            table[expert] = slot
        return table[self.experts]

    @property
    def read_nbytes(self) -> int:
        """Bytes read from files so far."""
        return sum(read.nbytes for read in self.reads)

    def waves(self) -> Iterator[Placement]:
        """Placements that together hold every expert; each stays valid until the next is asked for.

        Raises:
            ValueError: the first one's slots were given up since it was fetched.
        """
        if not self.fetch.bank.holds(self.first):
            raise ValueError(
                f"layer {self.first.layer}: these experts are no longer in the "
                "bank; fetch them again"
            )
        yield self.first
        while self.later:
            yield self.fetch.bring(self.later.pop(0), self)

    def _repr_html_(self) -> str:
        rows = {
            "experts": len(self.first.slots) + sum(map(len, self.later)),
            "found in the bank": self.hits,
            "read": f"{self.misses} ({self.read_nbytes / 1e6:.2f} MB)",
            "waves": 1 + len(self.later),
        }
        return card(f"Fetched for layer {self.first.layer}", rows)


class ExpertFetch:
    """Brings the experts of one layer into the bank.

    Args:
        file: where the layer's blocks lie.
        verify: check each block against its checksum the first time that it is read.
    """

    def __init__(
        self, file: LayerFile, bank: ExpertBank, reader: Reader, verify: bool = False
    ) -> None:
        self.file, self.bank, self.reader = file, bank, reader
        self._unverified = set(range(file.num_experts)) if verify else set[int]()
        self._checksums = file.checksums() if verify else np.empty(0)

    def __call__(self, routing: Routing) -> Fetched:
        """Wait for the routing, then for the experts that the bank does not hold.

        Raises:
            ReadError: a block could not be read whole.
            ValueError: a block has not the checksum that it should have.
        """
        experts = np.array(routing.experts)
        groups = self.bank.waves(self.file.layer, np.unique(experts).tolist())
        fetched = Fetched(
            experts=experts,
            first=Placement(layer=self.file.layer, slots={}, misses=()),
            later=groups[1:],
            fetch=self,
        )
        fetched.first = self.bring(groups[0], fetched)
        return fetched

    def preload(self) -> None:
        """Bring every expert of the layer, for a model that is to be wholly in memory."""
        self(Routing.of_all(self.file.num_experts))

    def bring(self, experts: list[int], fetched: Fetched) -> Placement:
        """Place experts in the bank, read those that were not there, and note it in `fetched`."""
        with self.bank.lock:
            return self._bring(experts, fetched)

    def _bring(self, experts: list[int], fetched: Fetched) -> Placement:
        placement = self.bank.place(self.file.layer, experts)
        pool = self.bank.pool(self.file.layer)
        reads = [
            BlockRead(
                layer=self.file.layer,
                expert=expert,
                offset=self.file.offset(expert),
                buffers=pool.buffers(placement.slots[expert]),
            )
            for expert in placement.misses
        ]
        fetched.hits += len(experts) - len(placement.misses)
        fetched.misses += len(placement.misses)
        try:
            if reads:
                records = self.reader.read(reads)
                fetched.reads += records
                self.bank.counts.read_nbytes += sum(record.nbytes for record in records)
            self._verify(placement)
        except BaseException:
            # What was not read whole must not be found in the bank later.
            self.bank.forget((self.file.layer, expert) for expert in placement.misses)
            raise
        return placement

    def _verify(self, placement: Placement) -> None:
        for expert in self._unverified.intersection(placement.misses):
            block = self.bank.pool(self.file.layer).block(placement.slots[expert])
            self.file.check_block(expert, block, int(self._checksums[expert]))
            self._unverified.discard(expert)

    def reference(self, expert: int) -> dict[str, np.ndarray]:
        """An expert's matrices [out, in] by projection in float64, read from the file without the
        bank."""
        layout = self.file.layout
        parts = layout.split(self.file.read_block(expert))
        if layout.quantization is None:
            return {p: part["weight"].float32().astype(np.float64) for p, part in parts.items()}
        return {
            p: dequantize_reference(
                part["weight"].data,
                part["scales"].float32(),
                part["biases"].float32(),
                layout.quantization,
            )
            for p, part in parts.items()
        }
