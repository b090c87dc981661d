"""Reading threads of Python: the crew of every way of reading that has no native one.

Each takes one piece of a block at a time and reads it with the GIL released. It needs the GIL for a
few microseconds between pieces; while other Python code computes without a pause it may wait
`sys.getswitchinterval()` (5 ms) for it, which `end_ns` includes.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from flashmoe_lab.storage.blocks import (
    ALIGNMENT,
    BlockRead,
    ReadError,
    ReadRecord,
    ReadRecords,
    cut_buffers,
    read_error,
)

if TYPE_CHECKING:
    from flashmoe_lab.storage.reader import Reader


class PythonPending:
    """The reads of one submission, under way."""

    def __init__(self, reads: Sequence[BlockRead], count: int) -> None:
        self._reads = reads  # a batch's owner keeps the memory
        self._outcomes: list[ReadRecord | BaseException | None] = [None] * count
        self._finished: list[int] = []
        self._ended = threading.Event()
        if count == 0:
            self._ended.set()

    @property
    def done(self) -> bool:
        """See `Pending`."""
        return self._ended.is_set()

    def wait(self) -> ReadRecords:
        """See `Pending`."""
        try:
            self._ended.wait()
        except BaseException:
            self._ended.wait()
            raise
        for outcome in self._outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return ReadRecords.of([o for o in self._outcomes if isinstance(o, ReadRecord)])

    def landed(self, least: int = 1) -> Iterator[list[int]]:
        """See `Pending`; here all blocks at once, when the last has come."""
        self._ended.wait()
        if self._reads and all(isinstance(outcome, ReadRecord) for outcome in self._outcomes):
            yield list(range(len(self._reads)))

    def end(self, index: int, outcome: ReadRecord | BaseException) -> None:
        """A piece has ended; called by the thread that read it."""
        self._outcomes[index] = outcome
        # An append is atomic, so the last one sees the full length; a lock would cost more.
        self._finished.append(index)
        if len(self._finished) == len(self._outcomes):
            self._ended.set()


@dataclass(slots=True)
class _Task:
    """What one thread reads at once. It holds the reader, so a reader in use is never collected."""

    reader: Reader
    pending: PythonPending
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
            got = self.reader.read_piece(self.handle, self.piece, thread)
            if got >= wanted:
                outcome = self._record(wanted, start_ns, thread)
            else:
                outcome = self._error(errno.EIO, f"got {got}: the file ends too early")
        except OSError as error:
            outcome = self._error(error.errno, error.strerror or str(error))
        except BaseException as error:
            outcome = error
        self.pending.end(self.index, outcome)

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
        piece = self.piece
        path = self.reader.paths[piece.layer]
        return read_error(path, piece.layer, piece.expert, piece.offset, piece.nbytes, code, what)


class PythonCrew:
    """Threads that know a queue but not the reader, so that a dropped reader can be collected."""

    def __init__(self, threads: int, name: str) -> None:
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        self._workers = [
            threading.Thread(target=_work, args=(self._queue, n), name=f"{name}-{n}", daemon=True)
            for n in range(threads)
        ]
        for worker in self._workers:
            worker.start()

    def submit(
        self, reader: Reader, reads: Sequence[BlockRead], handles: Sequence[Any]
    ) -> PythonPending:
        """Start the reads; `handles` has a file for each."""
        pieces = [
            (piece, handle)
            for read, handle in zip(reads, handles, strict=True)
            for piece in _cut(read, reader.split)
        ]
        pending = PythonPending(reads, len(pieces))
        submit_ns = time.perf_counter_ns()
        for index, (piece, handle) in enumerate(pieces):
            self._queue.put(_Task(reader, pending, index, piece, handle, submit_ns))
        return pending

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        for _ in self._workers:
            self._queue.put(None)
        for worker in self._workers:
            # A dropped reader may be collected in one of its own threads.
            if worker is not threading.current_thread():
                worker.join()


def _work(queue: SimpleQueue[_Task | None], thread: int) -> None:
    while (task := queue.get()) is not None:
        task.run(thread)
        del task


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
