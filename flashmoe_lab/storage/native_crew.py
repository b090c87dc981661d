"""Reading threads of C++ (kernels/cpu/read_pool.cpp): no Python per read, and no GIL.

A whole batch goes over in one call as arrays of addresses, and its records come back as one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe_lab import native
from flashmoe_lab.storage.blocks import (
    RECORD,
    BlockBatch,
    BlockRead,
    ReadError,
    ReadRecords,
    address_of,
    read_error,
)

if TYPE_CHECKING:
    from flashmoe_lab.storage.reader import Reader

_native: Any = native._native

# Columns of ReadTicket.records, as in read_pool.h.
_BLOCK, _OFFSET, _NBYTES, _GOT, _ERRNO, _START, _END, _THREAD = range(8)


def is_built() -> bool:
    """Whether the native reading threads are there; without them, threads of Python read."""
    return native.available and hasattr(_native, "ReadPool")


class NativePending:
    """The reads of one submission, under way."""

    def __init__(
        self,
        ticket: Any,
        layers: np.ndarray,
        experts: np.ndarray,
        paths: dict[int, Path],
        submit_ns: int,
    ) -> None:
        self._ticket, self._layers, self._experts, self._paths = ticket, layers, experts, paths
        self._submit_ns = submit_ns
        self._records: ReadRecords | None = None

    @property
    def done(self) -> bool:
        """See `Pending`."""
        return self._ticket.done

    def wait(self) -> ReadRecords:
        """See `Pending`."""
        if self._records is None:
            found = self._ticket.records()
            failed = np.flatnonzero(found[:, _GOT] < found[:, _NBYTES])
            if len(failed):
                raise self._error(found[failed[0]])
            self._records = ReadRecords(self._table(found))
        return self._records

    def landed(self, least: int = 1) -> Iterator[list[int]]:
        """See `Pending`; here as they come."""
        while numbers := self._ticket.landed(least):
            yield numbers

    def _table(self, found: np.ndarray) -> np.ndarray:
        table = np.empty(len(found), RECORD)
        table["layer"] = self._layers[found[:, _BLOCK]]
        table["expert"] = self._experts[found[:, _BLOCK]]
        table["offset"] = found[:, _OFFSET]
        table["nbytes"] = found[:, _NBYTES]
        table["submit_ns"] = self._submit_ns
        table["start_ns"] = found[:, _START]
        table["end_ns"] = found[:, _END]
        table["thread"] = found[:, _THREAD]
        return table

    def _error(self, row: np.ndarray) -> ReadError:
        layer, expert = int(self._layers[row[_BLOCK]]), int(self._experts[row[_BLOCK]])
        code = int(row[_ERRNO])
        what = os.strerror(code) if code else f"got {row[_GOT]}: the file ends too early"
        offset, nbytes = int(row[_OFFSET]), int(row[_NBYTES])
        return read_error(self._paths[layer], layer, expert, offset, nbytes, code, what)


class NativeCrew:
    """A pool of C++ threads that sleep while there is nothing to read."""

    def __init__(self, threads: int) -> None:
        self._pool = _native.ReadPool(threads)

    def submit(
        self, reader: Reader, reads: Sequence[BlockRead], handles: Sequence[int]
    ) -> NativePending:
        """Start the reads; `handles` has a file descriptor for each."""
        if isinstance(reads, BlockBatch):
            layers, experts, blocks, segments = _of_batch(reads, handles)
        else:
            layers, experts, blocks, segments = _of_reads(reads, handles)
        blocks[:, 0] = handles
        submit_ns = time.perf_counter_ns()
        ticket = self._pool.submit(
            blocks, segments, reads, reader.split, reader.direct, reader.staged
        )
        return NativePending(ticket, layers, experts, reader.paths, submit_ns)

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        self._pool.close()


_Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _of_batch(batch: BlockBatch, handles: Sequence[int]) -> _Columns:
    parts = len(batch.part_nbytes)
    blocks = np.empty((len(batch), 3), np.int64)
    blocks[:, 1], blocks[:, 2] = batch.offsets, parts
    segments = np.empty((len(batch), parts, 2), np.uint64)
    segments[:, :, 0], segments[:, :, 1] = batch.addresses, batch.part_nbytes
    layers = np.full(len(batch), batch.layer)
    return layers, batch.experts, blocks, segments.reshape(-1, 2)


def _of_reads(reads: Sequence[BlockRead], handles: Sequence[int]) -> _Columns:
    blocks = np.array([(0, r.offset, len(r.buffers)) for r in reads], np.int64).reshape(-1, 3)
    segments = [(address_of(b), len(b)) for read in reads for b in read.buffers]
    layers = np.array([read.layer for read in reads], np.int64)
    experts = np.array([read.expert for read in reads], np.int64)
    return layers, experts, blocks, np.array(segments, np.uint64).reshape(-1, 2)
