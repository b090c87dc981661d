"""One layer's experts in one file: fixed blocks, one expert each, and their checksums.

The file is a standard safetensors file with a U8 tensor "experts" [experts, block_nbytes] and a U64
tensor "checksums" [experts] (xxh3-64 of each block). A block holds gate_proj's weight, scales and
biases, then up_proj's, then down_proj's, one after another, so that one read brings one expert.
Block 0 begins at a multiple of 16 KiB and a block's size is one too: direct I/O works on every page
size.

This module lays blocks out, writes them so that a killed writer can go on, and checks them; it
quantises nothing.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flashmoe_lab.checkpoint.quantize import dequantize_reference
from flashmoe_lab.checkpoint.tensor_file import DTYPES, Tensor, make_header, read_fully, write_at
from flashmoe_lab.config import PROJECTIONS, ModelConfig, Quantization, stored_parts

BLOCK_ALIGN = 16384
PARTIAL = ".partial"
Progress = Callable[[int], None]  # told of bytes done since the last call


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One tensor inside a block: `name` is like "gate_proj.scales", `offset` counts from the
    block's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return DTYPES[self.dtype].itemsize * prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """What a block holds and where; layers with equal layouts can share bank memory."""

    quantization: Quantization | None
    components: tuple[Component, ...]

    @classmethod
    def of(
        cls, config: ModelConfig, quantization: Quantization | None, dtype: str
    ) -> "BlockLayout":
        """The layout of one expert; `dtype` is that of scales, or of the weights if they are not
        quantised."""
        components: list[Component] = []
        position = 0
        for projection, shape in config.expert_shapes().items():
            for part, (kind, stored) in stored_parts(shape, quantization, dtype).items():
                component = Component(
                    name=f"{projection}.{part}", dtype=kind, shape=stored, offset=position
                )
                components.append(component)
                position += component.nbytes
        return cls(quantization=quantization, components=tuple(components))

    @cached_property
    def payload_nbytes(self) -> int:
        """Bytes of one expert, without padding."""
        last = self.components[-1]
        return last.offset + last.nbytes

    @cached_property
    def block_nbytes(self) -> int:
        """Bytes of one block: the payload rounded up to 16 KiB."""
        return -(-self.payload_nbytes // BLOCK_ALIGN) * BLOCK_ALIGN

    @property
    def label(self) -> str:
        """In words: "4 bits, group 64" or "BF16"."""
        if self.quantization is None:
            return self.components[0].dtype
        return f"{self.quantization.bits} bits, group {self.quantization.group_size}"

    def assemble(self, expert: Mapping[str, Mapping[str, Tensor]]) -> np.ndarray:
        """One block (uint8 [block_nbytes]) from an expert's parts by projection."""
        block = np.zeros(self.block_nbytes, np.uint8)
        for component in self.components:
            projection, part = component.name.split(".")
            tensor = expert[projection][part]
            if tensor.dtype != component.dtype or tensor.shape != component.shape:
                raise ValueError(
                    f"{component.name} is {tensor.dtype} {list(tensor.shape)}, the layout wants "
                    f"{component.dtype} {list(component.shape)}"
                )
            end = component.offset + component.nbytes
            block[component.offset : end] = np.frombuffer(tensor.bytes_view(), np.uint8)
        return block

    def split(self, block: np.ndarray) -> dict[str, dict[str, Tensor]]:
        """An expert's parts by projection, as views into a block (the inverse of `assemble`)."""
        expert: dict[str, dict[str, Tensor]] = {projection: {} for projection in PROJECTIONS}
        for component in self.components:
            projection, part = component.name.split(".")
            data = block[component.offset : component.offset + component.nbytes]
            data = data.view(DTYPES[component.dtype]).reshape(component.shape)
            expert[projection][part] = Tensor(dtype=component.dtype, data=data)
        return expert

    def to_json(self) -> dict[str, Any]:
        """The manifest's form."""
        quantization = self.quantization
        return {
            "bits": quantization.bits if quantization else None,
            "group_size": quantization.group_size if quantization else None,
            "block_nbytes": self.block_nbytes,
            "components": [asdict(component) for component in self.components],
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "BlockLayout":
        """Read the manifest's form; KeyError or ValueError if it is damaged."""
        quantization = None
        if entry["bits"] is not None:
            quantization = Quantization(bits=entry["bits"], group_size=entry["group_size"])
        components = tuple(
            Component(**{**component, "shape": tuple(component["shape"])})
            for component in entry["components"]
        )
        layout = cls(quantization=quantization, components=components)
        if layout.block_nbytes != entry["block_nbytes"]:
            raise ValueError(
                f"block_nbytes is {entry['block_nbytes']}, "
                f"its components need {layout.block_nbytes}"
            )
        return layout


@dataclass(frozen=True, kw_only=True)
class LayerFile:
    """Where the blocks of one layer lie."""

    layer: int
    path: Path
    layout: BlockLayout
    num_experts: int

    @cached_property
    def header(self) -> tuple[bytes, dict[str, int]]:
        """The file's header, which follows from the layout, and the offsets of its two tensors."""
        tensors = {
            "experts": ("U8", (self.num_experts, self.layout.block_nbytes)),
            "checksums": ("U64", (self.num_experts,)),
        }
        return make_header(tensors, {"format": "flashmoe_lab layer"}, align=BLOCK_ALIGN)

    def offset(self, expert: int) -> int:
        """Where a block begins, in bytes from the start of the file."""
        return self.header[1]["experts"] + expert * self.layout.block_nbytes

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self.header[1]["checksums"] + 8 * self.num_experts

    def check(self) -> None:
        """Hold size and header against the layout; one line that names file, layer and expert."""
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: layer {self.layer}: the file is missing")
        size, (header, offsets) = self.path.stat().st_size, self.header
        if size < self.nbytes:
            expert = max(0, size - offsets["experts"]) // self.layout.block_nbytes
            where = (
                f"expert {expert} is the first that is not whole"
                if expert < self.num_experts
                else "its checksums are not whole"
            )
            raise ValueError(
                f"{self.path}: layer {self.layer}: cut off: {size} of {self.nbytes} bytes; {where}"
            )
        with self.path.open("rb") as stream:
            found = stream.read(len(header))
        if found != header or size != self.nbytes:
            raise ValueError(
                f"{self.path}: layer {self.layer}: its header is not the one that packed.json "
                f"implies ({self.num_experts} experts of {self.layout.block_nbytes} bytes)"
            )

    def checksums(self) -> np.ndarray:
        """xxh3-64 of every block, uint64 [experts]."""
        count = self.num_experts
        found = np.fromfile(self.path, "<u8", count, offset=self.header[1]["checksums"])
        if len(found) != count:
            raise ValueError(f"{self.path}: layer {self.layer}: its checksums are not whole")
        return found

    def read_block(self, expert: int) -> np.ndarray:
        """One block through the page cache, uint8 [block_nbytes]."""
        block = np.empty(self.layout.block_nbytes, np.uint8)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            what = f"layer {self.layer}, expert {expert}"
            read_fully(descriptor, memoryview(block), self.offset(expert), self.path, what)
        finally:
            os.close(descriptor)
        return block

    def matrices64(self, expert: int) -> dict[str, np.ndarray]:
        """An expert's matrices [out, in] by projection in float64, for references."""
        parts = self.layout.split(self.read_block(expert))
        quantization = self.layout.quantization
        if quantization is None:
            return {p: part["weight"].float32().astype(np.float64) for p, part in parts.items()}
        return {
            p: dequantize_reference(
                part["weight"].data,
                part["scales"].float32(),
                part["biases"].float32(),
                quantization,
            )
            for p, part in parts.items()
        }

    def check_block(self, expert: int, block: np.ndarray | memoryview, expected: int) -> None:
        """Raise ValueError, naming file, layer and expert, unless the block has its checksum."""
        found = xxhash.xxh3_64_intdigest(block)
        if found != expected:
            raise ValueError(
                f"{self.path}: layer {self.layer}, expert {expert}: checksum is {found:016x}, "
                f"the file says {int(expected):016x}; the block is damaged"
            )

    # Writing

    def write(
        self, make_block: Callable[[int], np.ndarray], progress: Progress, workers: int = 1
    ) -> None:
        """Write all blocks, going on where a killed writer stopped; the file appears only when it
        is whole.

        Args:
            make_block: gives block `expert`; called from `workers` threads, a few experts ahead.
            progress: told of the bytes of each finished block.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + PARTIAL)
        journal = self.path.with_name(self.path.name + ".journal" + PARTIAL)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            checksums = self._recover(descriptor, journal, partial)
            left = self.num_experts - len(checksums)
            progress(self.nbytes - left * self.layout.block_nbytes)
            header, offsets = self.header
            write_at(descriptor, memoryview(header), 0)
            with journal.open("r+b" if checksums else "wb") as log:
                log.truncate(8 * len(checksums))
                log.seek(0, os.SEEK_END)
                for expert, block in _ahead(
                    make_block, range(len(checksums), self.num_experts), workers
                ):
                    write_at(descriptor, memoryview(block), self.offset(expert))
                    checksums.append(xxhash.xxh3_64_intdigest(block))
                    log.write(checksums[-1].to_bytes(8, "little"))
                    log.flush()
                    progress(len(block))
            table = np.array(checksums, "<u8")
            write_at(descriptor, memoryview(table).cast("B"), offsets["checksums"])
            os.ftruncate(descriptor, self.nbytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.rename(self.path)
        journal.unlink()

    def _recover(self, descriptor: int, journal: Path, partial: Path) -> list[int]:
        """Checksums of the leading blocks that a killed writer left whole: each is read and checked
        again."""
        if not journal.exists():
            return []
        noted = journal.read_bytes()
        checksums: list[int] = []
        block = np.empty(self.layout.block_nbytes, np.uint8)
        for expert in range(min(len(noted) // 8, self.num_experts)):
            checksum = int.from_bytes(noted[8 * expert : 8 * expert + 8], "little")
            try:
                read_fully(
                    descriptor, memoryview(block), self.offset(expert), partial, f"expert {expert}"
                )
            except ValueError:
                break
            if xxhash.xxh3_64_intdigest(block) != checksum:
                break
            checksums.append(checksum)
        return checksums


def _ahead(
    make: Callable[[int], np.ndarray], items: range, workers: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (item, make(item)) in order, with a few items being made ahead; memory stays at a few
    blocks."""
    if workers <= 1:
        for item in items:
            yield item, make(item)
        return
    pending: deque[tuple[int, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(make, item)))
                if len(pending) > workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()
