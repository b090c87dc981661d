"""The ways of reading a block: through the page cache, past it, and from a mapping (to compare).

Each is a `Reader` that opens a file and fills one piece's buffers in Python; threads, pieces and
errors are the base's and its crew's business (reader.py), and a native crew fills them itself.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe_lab.storage.blocks import ALIGNMENT, BlockRead, Buffers, address_of, cut_buffers
from flashmoe_lab.storage.reader import Reader

STAGING_BYTES = 1 << 20  # per thread; small enough that the copy out of it finds it in the L2 cache
_MAX_BUFFERS = 1024  # IOV_MAX on Linux and macOS
_F_NOCACHE = 48  # macOS fcntl


class PreadReader(Reader):
    """Through the page cache: `preadv` scatters one block into its buffers."""

    name = "pread"
    has_native = True

    def _open(self, path: Path) -> int:
        return self._open_fd(path)

    def read_piece(self, handle: int, piece: BlockRead, thread: int) -> int:
        """See `Reader`."""
        return _fill(handle, piece.buffers, piece.offset, piece.nbytes)


class DirectReader(Reader):
    """Past the page cache: O_DIRECT on Linux, F_NOCACHE on macOS (not yet run there by us).

    On Linux, a piece whose offset and whose buffers' addresses and lengths are all multiples of
    4096 is read straight into them, unless `staged`; any other goes through a staging buffer of 1
    MiB a thread and is copied. Raises ReadError where the file system refuses direct I/O.
    """

    name = "direct"
    has_native = True
    direct = sys.platform != "darwin"

    def __init__(self, paths: Mapping[int, Path], **settings: Any) -> None:
        super().__init__(paths, **settings)
        self._staging: dict[int, np.ndarray] = {}
        self._resources.callback(self._staging.clear)

    def _open(self, path: Path) -> int:
        if sys.platform == "darwin":
            fd = self._open_fd(path)
            fcntl.fcntl(fd, _F_NOCACHE, 1)
            return fd
        try:
            return self._open_fd(path, os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            advice = 'its file system refuses direct I/O (O_DIRECT); use reader="pread"'
            raise OSError(errno.EINVAL, advice) from None

    def read_piece(self, handle: int, piece: BlockRead, thread: int) -> int:
        """See `Reader`."""
        if sys.platform == "darwin":
            return _fill(handle, piece.buffers, piece.offset, piece.nbytes)
        aligned = piece.offset % ALIGNMENT == 0 and all(map(_is_aligned, piece.buffers))
        if aligned and not self.staged:
            return _fill(handle, piece.buffers, piece.offset, piece.nbytes, ALIGNMENT)
        if thread not in self._staging:
            # Anonymous mappings begin on a page.
            self._staging[thread] = np.frombuffer(mmap.mmap(-1, STAGING_BYTES), np.uint8)
        return _fill_staged(handle, piece, self._staging[thread])


class MmapReader(Reader):
    """Copies out of memory-mapped files; kept to compare, since page faults read in small steps.

    A file that is truncated while it is mapped kills the process (SIGBUS), as with any mapping.
    """

    name = "mmap"

    def _open(self, path: Path) -> mmap.mmap | bytes:
        fd = self._open_fd(path)
        if os.fstat(fd).st_size == 0:
            return b""  # mmap refuses an empty file; every read of it is short
        return self._resources.enter_context(mmap.mmap(fd, 0, prot=mmap.PROT_READ))

    def read_piece(self, handle: mmap.mmap | bytes, piece: BlockRead, thread: int) -> int:
        """See `Reader`."""
        got = min(piece.nbytes, max(0, len(handle) - piece.offset))
        if got == piece.nbytes:
            _scatter(np.frombuffer(handle, np.uint8, got, piece.offset), piece.buffers)
        return got


READERS: dict[str, type[Reader]] = {
    cls.name: cls for cls in (PreadReader, DirectReader, MmapReader)
}


def open_reader(name: str, paths: Mapping[int, Path], **settings: Any) -> Reader:
    """Make the reader called `name`; settings as for `Reader`; ValueError for other names."""
    if name not in READERS:
        raise ValueError(f"reader must be one of {sorted(READERS)}, got {name!r}")
    return READERS[name](paths, **settings)


def _preadv(fd: int, buffers: Buffers, offset: int) -> int:
    # The one call that reads files; tests replace it.
    return os.preadv(fd, buffers, offset)


def _fill(fd: int, buffers: Buffers, offset: int, wanted: int, step: int = 1) -> int:
    """Read until `wanted` bytes are there or the file ends; return the bytes got.

    A short read is resumed at the last multiple of `step`, since O_DIRECT cannot begin in between.
    """
    got = 0
    while True:
        count = _preadv(fd, buffers[:_MAX_BUFFERS], offset + got)
        whole = count - count % step
        if got + count >= wanted or whole == 0:
            return got + count
        got += whole
        buffers = cut_buffers(buffers, whole, sum(map(len, buffers)))


def _fill_staged(fd: int, piece: BlockRead, staging: np.ndarray) -> int:
    """As `_fill` for O_DIRECT, by way of `staging`, for any offset and any memory."""
    got, wanted = 0, piece.nbytes
    while got < wanted:
        skip = (piece.offset + got) % ALIGNMENT
        part = min(wanted - got, len(staging) - skip)
        reach = -(-(skip + part) // ALIGNMENT) * ALIGNMENT
        target = (staging[:reach].data,)
        count = _fill(fd, target, piece.offset + got - skip, skip + part, ALIGNMENT) - skip
        if count < part:
            return got + max(count, 0)
        _scatter(staging[skip : skip + part], cut_buffers(piece.buffers, got, got + part))
        got += part
    return got


def _scatter(source: np.ndarray, buffers: Buffers) -> None:
    start = 0
    for buffer in buffers:
        # Unlike a memoryview's slice assignment, copyto releases the GIL.
        np.copyto(np.frombuffer(buffer, np.uint8), source[start : start + len(buffer)])
        start += len(buffer)


def _is_aligned(buffer: memoryview) -> bool:
    if len(buffer) % ALIGNMENT:
        return False
    return address_of(buffer) % ALIGNMENT == 0
