"""Readers: bring expert blocks from the SSD into memory that the caller gives.

A block is one contiguous byte range of one layer's file. A reader owns a few threads; each takes
one piece of a block at a time and reads it with the GIL released, so the SSD sees many requests at
once. There is one class for each way of reading (ways.py), and all of them bring the same bytes.

A reader does not choose where a block goes (bank.py), does not know what its bytes mean
(checkpoint/), checks no checksums, and never reads ahead of what it is asked for.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Self

ALIGNMENT = 4096  # bytes; what O_DIRECT asks of offsets, lengths and addresses
MAX_THREADS = 64
MAX_SPLIT = 16

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
    thread: int  # 0 to threads - 1


class PendingReads:
    """The reads of one `submit`, under way. Leave the buffers alone until `wait` ends."""

    def __init__(self, count: int) -> None:
        self._outcomes: list[ReadRecord | BaseException | None] = [None] * count
        self._finished: list[int] = []
        self._ended = threading.Event()
        if count == 0:
            self._ended.set()

    @property
    def done(self) -> bool:
        """Whether every piece has ended, well or not; never blocks."""
        return self._ended.is_set()

    def wait(self) -> list[ReadRecord]:
        """Wait for every piece and return their records, in the order asked.

        Raises the first failed piece's ReadError, but only once all pieces have ended: after
        `wait`, even after Ctrl-C in it, no thread writes into the caller's memory.
        """
        try:
            self._ended.wait()
        except BaseException:
            self._ended.wait()
            raise
        for outcome in self._outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in self._outcomes if isinstance(outcome, ReadRecord)]

    def _end(self, index: int, outcome: ReadRecord | BaseException) -> None:
        self._outcomes[index] = outcome
        # An append is atomic, so the last one sees the full length; a lock would cost more.
        self._finished.append(index)
        if len(self._finished) == len(self._outcomes):
            self._ended.set()


@dataclass(slots=True)
class _Task:
    """What one thread reads at once. It holds the reader, so a reader in use is never collected."""

    reader: Reader
    pending: PendingReads
    index: int
    piece: BlockRead
    handle: Any
    submit_ns: int

    def run(self, thread: int) -> None:
        # Errors are kept, not raised: a traceback would keep the caller's buffers alive.
        start_ns = time.perf_counter_ns()
        wanted = self.piece.nbytes
        outcome: ReadRecord | BaseException
        try:
            got = self.reader._read_piece(self.handle, self.piece, thread)
            if got >= wanted:
                outcome = self._record(wanted, start_ns, thread)
            else:
                outcome = self._error(errno.EIO, f"got {got}: the file ends too early")
        except OSError as error:
            outcome = self._error(error.errno, error.strerror or str(error))
        except BaseException as error:
            outcome = error
        self.pending._end(self.index, outcome)

    def _record(self, nbytes: int, start_ns: int, thread: int) -> ReadRecord:
        return ReadRecord(
            layer=self.piece.layer,
            expert=self.piece.expert,
            offset=self.piece.offset,
            nbytes=nbytes,
            submit_ns=self.submit_ns,
            start_ns=start_ns,
            end_ns=time.perf_counter_ns(),
            thread=thread,
        )

    def _error(self, code: int | None, what: str) -> ReadError:
        piece, path = self.piece, self.reader.paths[self.piece.layer]
        wanted = f"wanted {piece.nbytes} bytes at offset {piece.offset}"
        where = f"{path}: layer {piece.layer}, expert {piece.expert}"
        return ReadError(code or errno.EIO, f"{where}: {wanted}, {what}")


class Reader(ABC):
    """Reads blocks of the files in `paths` (layer -> file) with `threads` threads.

    Each block is cut into `split` pieces at multiples of 4096 bytes, which are read in parallel.
    Files are opened at their first read and stay open. One thread at a time may submit or close;
    `PendingReads.wait` may be called from any thread. `staged` says that the device must not write
    into the caller's memory itself, as where a GPU may move the pages meanwhile. Raises ValueError
    for `threads` outside 1 to 64 or `split` outside 1 to 16.

    A thread needs the GIL for a few microseconds between pieces. While other Python code computes
    without a pause it may wait `sys.getswitchinterval()` (5 ms) for it, which `end_ns` includes.
    """

    name: ClassVar[str]

    def __init__(
        self,
        paths: Mapping[int, Path],
        *,
        threads: int = 8,
        split: int = 1,
        staged: bool = False,
    ) -> None:
        self.staged = staged
        self.threads = _in_range("threads", threads, MAX_THREADS)
        self.split = _in_range("split", split, MAX_SPLIT)
        self.paths = {layer: Path(path) for layer, path in paths.items()}
        self._handles: dict[int, Any] = {}
        self._resources = ExitStack()
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        workers = _start_workers(self._queue, self.threads, f"reader-{self.name}")
        self._finalizer = weakref.finalize(self, _shut, self._queue, workers, self._resources)
        # At exit the daemon threads just stop; closing files under a read would be worse.
        self._finalizer.atexit = False

    def submit(self, reads: Sequence[BlockRead]) -> PendingReads:
        """Start the reads and return at once.

        Raises ValueError for a closed reader or an unknown layer and ReadError for a file that
        cannot be opened; then nothing has been started.
        """
        if not self._finalizer.alive:
            raise ValueError("the reader is closed; open another one")
        pieces = [(p, self._handle(r.layer)) for r in reads for p in _cut(r, self.split)]
        pending = PendingReads(len(pieces))
        submit_ns = time.perf_counter_ns()
        for index, (piece, handle) in enumerate(pieces):
            self._queue.put(_Task(self, pending, index, piece, handle, submit_ns))
        return pending

    def read(self, reads: Sequence[BlockRead]) -> list[ReadRecord]:
        """Read the blocks and wait for them; see `submit` and `PendingReads.wait`."""
        return self.submit(reads).wait()

    def close(self) -> None:
        """Finish what was submitted, end the threads and close the files; twice is fine."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        settings = f"threads={self.threads}, split={self.split}"
        return f"{type(self).__name__}({len(self.paths)} files, {settings})"

    def _handle(self, layer: int) -> Any:
        if layer not in self._handles:
            if layer not in self.paths:
                raise ValueError(f"no file for layer {layer}; known layers: {sorted(self.paths)}")
            try:
                self._handles[layer] = self._open(self.paths[layer])
            except OSError as error:
                message = f"cannot open {self.paths[layer]} (layer {layer}): {error.strerror}"
                raise ReadError(error.errno, message) from error
        return self._handles[layer]

    def _open_fd(self, path: Path, flags: int = 0) -> int:
        fd = os.open(path, os.O_RDONLY | flags)
        self._resources.callback(os.close, fd)
        return fd

    @abstractmethod
    def _open(self, path: Path) -> Any:
        """Open one file; `self._resources` closes it."""

    @abstractmethod
    def _read_piece(self, handle: Any, piece: BlockRead, thread: int) -> int:
        """Fill the piece's buffers; return the bytes got, fewer than asked at the file's end."""


def _cut(read: BlockRead, split: int) -> list[BlockRead]:
    if split == 1:
        return [read]
    nbytes = read.nbytes
    pages = -(-nbytes // ALIGNMENT)
    ends = [min(nbytes, pages * n // split * ALIGNMENT) for n in range(split + 1)]
    return [
        replace(read, offset=read.offset + start, buffers=cut_buffers(read.buffers, start, stop))
        for start, stop in pairwise(ends)
        if start < stop
    ]


def cut_buffers(buffers: Buffers, start: int, stop: int) -> Buffers:
    """Bytes `start` to `stop` of the buffers as if they were one, without copying."""
    parts, begin = [], 0
    for buffer in buffers:
        low, high = max(start - begin, 0), min(stop - begin, len(buffer))
        if low < high:
            parts.append(buffer[low:high])
        begin += len(buffer)
    return tuple(parts)


def _check_buffer(buffer: memoryview) -> None:
    if buffer.readonly or buffer.itemsize != 1 or buffer.ndim != 1 or not buffer.contiguous:
        raise ValueError(
            "a buffer must be writable, contiguous, one-dimensional and of 1-byte items, got "
            f"readonly={buffer.readonly}, shape={buffer.shape}, format={buffer.format!r}; "
            'memoryview(x).cast("B") makes one of a contiguous array'
        )
    if buffer.nbytes == 0:
        raise ValueError("a buffer must be 1 byte or more, got an empty one")


def _in_range(setting: str, value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise ValueError(f"{setting} must be 1 to {most}, got {value}")
    return value


def _start_workers(
    queue: SimpleQueue[_Task | None], count: int, name: str
) -> list[threading.Thread]:
    workers = [
        threading.Thread(target=_work, args=(queue, n), name=f"{name}-{n}", daemon=True)
        for n in range(count)
    ]
    for worker in workers:
        worker.start()
    return workers


def _work(queue: SimpleQueue[_Task | None], thread: int) -> None:
    # Knows the queue but not the reader, so that a dropped reader can be collected.
    while (task := queue.get()) is not None:
        task.run(thread)
        del task


def _shut(
    queue: SimpleQueue[_Task | None], workers: list[threading.Thread], resources: ExitStack
) -> None:
    for _ in workers:
        queue.put(None)
    for worker in workers:
        # A dropped reader may be collected in one of its own threads.
        if worker is not threading.current_thread():
            worker.join()
    resources.close()
