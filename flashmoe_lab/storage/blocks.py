"""What readers are asked for and what they answer: blocks, their memory, and a record of each read.

No file is opened and nothing is read here (reader.py does).
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

ALIGNMENT = 4096  # bytes; what O_DIRECT asks of offsets, lengths and addresses

Buffers = tuple[memoryview, ...]


class ReadError(OSError):
    """A block could not be read whole: I/O error, short file, or a file that cannot be opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRead:
    """One block to read.

    `offset` is in bytes from the start of the layer's file. `buffers` are writable, contiguous,
    one-dimensional and of 1-byte items; they are filled in order, and their lengths add up to the
    block's bytes. Raises ValueError if they are not so.
    """

    layer: int
    expert: int
    offset: int
    buffers: Buffers

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise ValueError(f"offset must be 0 bytes or more, got {self.offset}")
        if not self.buffers:
            raise ValueError("buffers must hold at least one memoryview, got none")
        for buffer in self.buffers:
            _check_buffer(buffer)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole block."""
        return sum(buffer.nbytes for buffer in self.buffers)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockBatch(Sequence[BlockRead]):
    """Blocks of one layer and the addresses that they go to, as columns: what a bank asks for.

    A native reader takes the columns; to any other it is a sequence of BlockReads.

    Attributes:
        experts, offsets: int64 [blocks].
        addresses: uint64 [blocks, parts]; of memory that nobody else uses meanwhile.
        part_nbytes: uint64 [parts]; the same for all blocks.
        owner: what keeps the memory; held until the reads have ended.
    """

    layer: int
    experts: np.ndarray
    offsets: np.ndarray
    addresses: np.ndarray
    part_nbytes: np.ndarray
    owner: object

    def __len__(self) -> int:
        return len(self.experts)

    @overload
    def __getitem__(self, index: int) -> BlockRead: ...
    @overload
    def __getitem__(self, index: slice) -> list[BlockRead]: ...
    def __getitem__(self, index: int | slice) -> BlockRead | list[BlockRead]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return BlockRead(
            layer=self.layer,
            expert=int(self.experts[index]),
            offset=int(self.offsets[index]),
            buffers=tuple(map(_memory_at, self.addresses[index], self.part_nbytes)),
        )


RECORD = np.dtype(
    [
        (name, np.int64)
        for name in (
            "layer",
            "expert",
            "offset",
            "nbytes",
            "submit_ns",
            "start_ns",
            "end_ns",
            "thread",
        )
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRecord:
    """One piece as it was read; `split` pieces make a block. Times are `time.perf_counter_ns`."""

    layer: int
    expert: int
    offset: int  # bytes from the start of the file
    nbytes: int
    submit_ns: int
    start_ns: int
    end_ns: int
    thread: int  # 0 to threads - 1; `threads` is the one that submitted


class ReadRecords(Sequence[ReadRecord]):
    """Records in the order asked; `table` has them as columns of a structured array (RECORD)."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    @classmethod
    def of(cls, records: Sequence[ReadRecord]) -> ReadRecords:
        """From single records."""
        names = RECORD.names or ()
        rows = [tuple(getattr(record, name) for name in names) for record in records]
        return cls(np.array(rows, RECORD))

    @classmethod
    def together(cls, parts: Sequence[ReadRecords]) -> ReadRecords:
        """All parts' records, one part after another."""
        tables = [part.table for part in parts]
        return cls(np.concatenate(tables) if tables else np.empty(0, RECORD))

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return int(self.table["nbytes"].sum())

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> ReadRecord: ...
    @overload
    def __getitem__(self, index: slice) -> ReadRecords: ...
    def __getitem__(self, index: int | slice) -> ReadRecord | ReadRecords:
        if isinstance(index, slice):
            return ReadRecords(self.table[index])
        return _record(self.table[index].item())

    def __iter__(self) -> Iterator[ReadRecord]:
        return map(_record, self.table.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"ReadRecords({len(self)} pieces, {self.nbytes} bytes)"


def read_error(
    path: Path, layer: int, expert: int, offset: int, nbytes: int, code: int | None, what: str
) -> ReadError:
    """The one error of a failed piece: where it was, what was wanted, and what came."""
    wanted = f"wanted {nbytes} bytes at offset {offset}"
    return ReadError(code or errno.EIO, f"{path}: layer {layer}, expert {expert}: {wanted}, {what}")


def cut_buffers(buffers: Buffers, start: int, stop: int) -> Buffers:
    """Bytes `start` to `stop` of the buffers as if they were one, without copying."""
    parts, begin = [], 0
    for buffer in buffers:
        low, high = max(start - begin, 0), min(stop - begin, len(buffer))
        if low < high:
            parts.append(buffer[low:high])
        begin += len(buffer)
    return tuple(parts)


def address_of(buffer: memoryview) -> int:
    """Where a writable buffer begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _memory_at(address: int, nbytes: int) -> memoryview:
    memory = (ctypes.c_ubyte * int(nbytes)).from_address(int(address))
    return memoryview(np.frombuffer(memory, np.uint8))


def _record(row: tuple[int, ...]) -> ReadRecord:
    layer, expert, offset, nbytes, submit_ns, start_ns, end_ns, thread = row
    return ReadRecord(
        layer=layer,
        expert=expert,
        offset=offset,
        nbytes=nbytes,
        submit_ns=submit_ns,
        start_ns=start_ns,
        end_ns=end_ns,
        thread=thread,
    )


def _check_buffer(buffer: memoryview) -> None:
    if buffer.readonly or buffer.itemsize != 1 or buffer.ndim != 1 or not buffer.contiguous:
        raise ValueError(
            "a buffer must be writable, contiguous, one-dimensional and of 1-byte items, got "
            f"readonly={buffer.readonly}, shape={buffer.shape}, format={buffer.format!r}; "
            'memoryview(x).cast("B") makes one of a contiguous array'
        )
    if buffer.nbytes == 0:
        raise ValueError("a buffer must be 1 byte or more, got an empty one")
