"""Readers: bring expert blocks from the SSD into memory that the caller gives.

A block is one contiguous byte range of one layer's file. A reader owns a few threads, its crew;
each takes one piece of a block at a time, so the SSD sees many requests at once. The crew is of C++
(native_crew.py) where that is built and knows the way of reading, else of Python (python_crew.py).
There is one class for each way of reading (ways.py), and all of them bring the same bytes.

A reader does not choose where a block goes (bank.py), does not know what its bytes mean
(checkpoint/), checks no checksums, and reads nothing but what it is asked for.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from flashmoe_lab.storage import native_crew
from flashmoe_lab.storage.blocks import (
    ALIGNMENT,
    BlockBatch,
    BlockRead,
    Buffers,
    ReadError,
    ReadRecord,
    ReadRecords,
    cut_buffers,
)
from flashmoe_lab.storage.native_crew import NativeCrew
from flashmoe_lab.storage.python_crew import PythonCrew

__all__ = [
    "ALIGNMENT",
    "BlockBatch",
    "BlockRead",
    "Buffers",
    "Pending",
    "ReadError",
    "ReadRecord",
    "ReadRecords",
    "Reader",
    "cut_buffers",
]

MAX_THREADS = 64
MAX_SPLIT = 16


class Pending(Protocol):
    """The reads of one `submit`, under way. Leave the memory alone until `wait` ends."""

    @property
    def done(self) -> bool:
        """Whether every piece has ended, well or not; never blocks."""
        ...

    def wait(self) -> ReadRecords:
        """Wait for every piece and return their records, in the order asked.

        Raises the first failed piece's ReadError, but only once all pieces have ended: after
        `wait`, even after Ctrl-C in it, no thread writes into the caller's memory.
        """
        ...

    def landed(self, least: int = 1) -> Iterator[list[int]]:
        """The numbers of the blocks as they come, each once, `least` at a time or more.

        It ends when no more will come; whether one failed, `wait` tells.
        """
        ...


class Reader(ABC):
    """Reads blocks of the files in `paths` (layer -> file) with `threads` threads.

    Each block is cut into `split` pieces at multiples of 4096 bytes, which are read in parallel.
    Files are opened at their first read and stay open. One thread at a time may submit or close;
    `Pending.wait` may be called from any thread. `staged` says that the device must not write into
    the caller's memory itself, as where a GPU may move the pages meanwhile. `native` chooses the
    crew: True, False, or None for native where it can be. Raises ValueError for `threads` outside 1
    to 64, `split` outside 1 to 16, or a native crew that is not there.
    """

    name: ClassVar[str]
    has_native: ClassVar[bool] = False  # whether the native crew knows this way
    direct: ClassVar[bool] = False  # whether files are opened with O_DIRECT

    def __init__(
        self,
        paths: Mapping[int, Path],
        *,
        threads: int = 8,
        split: int = 1,
        staged: bool = False,
        native: bool | None = None,
    ) -> None:
        self.staged = staged
        self.threads = _in_range("threads", threads, MAX_THREADS)
        self.split = _in_range("split", split, MAX_SPLIT)
        self.native = self._choose(native)
        self.paths = {layer: Path(path) for layer, path in paths.items()}
        self._handles: dict[int, Any] = {}
        self._resources = ExitStack()
        crew = NativeCrew(threads) if self.native else PythonCrew(threads, f"reader-{self.name}")
        self._crew: NativeCrew | PythonCrew = crew
        self._finalizer = weakref.finalize(self, _shut, crew, self._resources)
        # At exit the threads just stop; closing files under a read would be worse.
        self._finalizer.atexit = False

    def submit(self, reads: Sequence[BlockRead]) -> Pending:
        """Start the reads and return at once.

        Raises ValueError for a closed reader or an unknown layer and ReadError for a file that
        cannot be opened; then nothing has been started.
        """
        if not self._finalizer.alive:
            raise ValueError("the reader is closed; open another one")
        if isinstance(reads, BlockBatch):
            handles = [self._handle(reads.layer)] * len(reads)
        else:
            handles = [self._handle(read.layer) for read in reads]
        return self._crew.submit(self, reads, handles)

    def read(self, reads: Sequence[BlockRead]) -> ReadRecords:
        """Read the blocks and wait for them; see `submit` and `Pending.wait`."""
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

    def _choose(self, native: bool | None) -> bool:
        there = self.has_native and native_crew.is_built()
        if native and not there:
            raise ValueError(f"reader {self.name!r} has no native threads in this installation")
        return there if native is None else native

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
        """Open one file, a descriptor where there is a native crew; `self._resources` closes it."""

    @abstractmethod
    def read_piece(self, handle: Any, piece: BlockRead, thread: int) -> int:
        """Fill the piece's buffers in a thread of Python; return the bytes got, fewer than asked at
        the file's end."""


def _in_range(setting: str, value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise ValueError(f"{setting} must be 1 to {most}, got {value}")
    return value


def _shut(crew: NativeCrew | PythonCrew, resources: ExitStack) -> None:
    crew.close()
    resources.close()
