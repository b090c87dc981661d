"""What the operating system's page cache holds of a file, and how to empty or fill it.

A run is cold only if the cache holds none of the experts' bytes, so benchmarks evict first and
record what is left. This module measures and changes the cache; it reads no expert blocks
(reader.py) and knows nothing of the bank. `warm` and `evict` act on the whole machine's cache.

Ranges are widened to whole pages, and counts end at the end of the file. Every function raises
ValueError for a range outside the file, and NotImplementedError on systems other than Linux and
macOS. The macOS paths (mincore, msync) were written from the manual and never run by us on a Mac.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

_SYS_CACHESTAT = 451  # the same number on x86-64 and arm64
_MS_INVALIDATE = 2  # the same on Linux and macOS
_WARM_BYTES = 4 << 20

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """An open file's pages from `start` to `stop` (bytes); `stop` may lie in the last page."""

    path: Path
    fd: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def resident_bytes(path: Path | str, offset: int = 0, nbytes: int | None = None) -> int:
    """Bytes of the range that are in the page cache; `nbytes` None means to the file's end.

    By cachestat(2) on Linux 6.5 or later, else by counting `resident_pages`. Exact for an empty
    or a whole range, else to within the file's last page. Raises PermissionError as
    `resident_pages` does.
    """
    with _open_range(path, offset, nbytes) as span:
        return _resident_bytes(span)


def resident_pages(path: Path | str, offset: int = 0, nbytes: int | None = None) -> np.ndarray:
    """Whether each page of the range is in the page cache, as a bool array, by mincore(2).

    Raises PermissionError on Linux for a file that the caller neither owns nor may write: there
    the kernel calls every page resident rather than tell.
    """
    with _open_range(path, offset, nbytes) as span:
        return _resident_pages(span)


def evict(path: Path | str, offset: int = 0, nbytes: int | None = None) -> int:
    """Drop the range from the page cache and return the bytes still in it; 0 is really cold.

    Dirty pages are written to the disk first. Pages that any process has mapped, or that are in
    use at this moment, stay. On Linux a large folio that reaches out of the range may stay whole.
    """
    with _open_range(path, offset, nbytes) as span:
        if span.nbytes:
            os.fsync(span.fd)
            _drop(span)
        return _resident_bytes(span)


def warm(path: Path | str, offset: int = 0, nbytes: int | None = None) -> int:
    """Read the range through the page cache and return the bytes of it that are there afterwards.

    Fewer than the range's bytes means that memory is too small to hold it.
    """
    with _open_range(path, offset, nbytes) as span:
        buffer = memoryview(bytearray(min(_WARM_BYTES, span.nbytes)))
        position = span.start
        while position < span.stop:
            count = os.preadv(span.fd, [buffer[: span.stop - position]], position)
            if count == 0:
                raise OSError(errno.EIO, f"{path}: ends at {position}, expected {span.stop}")
            position += count
        return _resident_bytes(span)


@contextmanager
def _open_range(path: Path | str, offset: int, nbytes: int | None) -> Iterator[_Range]:
    if sys.platform not in ("linux", "darwin"):
        raise NotImplementedError(f"the page cache of {sys.platform} is unknown to flashmoe_lab")
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        if not 0 <= offset <= size:
            raise ValueError(f"{path}: offset must be 0 to {size}, got {offset}")
        nbytes = size - offset if nbytes is None else nbytes
        if not 0 <= nbytes <= size - offset:
            raise ValueError(f"{path}: nbytes must be 0 to {size - offset}, got {nbytes}")
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        stop = min(size, -(-(offset + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE)
        yield _Range(path=Path(path), fd=fd, start=start, stop=stop if nbytes else start)
    finally:
        os.close(fd)


def _page_count(span: _Range) -> int:
    return -(-span.nbytes // mmap.PAGESIZE)


def _resident_bytes(span: _Range) -> int:
    count = _cachestat(span)
    if count is None:
        count = int(_resident_pages(span).sum())
    return min(span.nbytes, count * mmap.PAGESIZE)


def _cachestat(span: _Range) -> int | None:
    """Pages of the range in the cache, or None where this kernel or file system cannot tell."""
    if sys.platform != "linux":
        return None
    if not span.nbytes:
        return 0  # the system call takes length 0 for "to the end"
    where = (ctypes.c_uint64 * 2)(span.start, span.nbytes)
    counts = (ctypes.c_uint64 * 5)()  # cached, dirty, writeback, evicted, recently evicted
    call = ctypes.c_long(_SYS_CACHESTAT)
    failed = _libc.syscall(call, ctypes.c_int(span.fd), where, counts, ctypes.c_uint(0))
    return None if failed else counts[0]


def _resident_pages(span: _Range) -> np.ndarray:
    _check_permission(span)
    pages = np.zeros(_page_count(span), np.uint8)
    if len(pages):
        with _mapped(span) as address:
            _check(_libc.mincore(address, ctypes.c_size_t(span.nbytes), _pointer(pages)), span)
    return (pages & 1).astype(bool)


def _check_permission(span: _Range) -> None:
    if sys.platform != "linux" or os.fstat(span.fd).st_uid == os.geteuid():
        return
    if not os.access(span.path, os.W_OK):
        message = "the kernel hides the residency of a file that you neither own nor may write"
        raise PermissionError(errno.EPERM, message, str(span.path))


def _drop(span: _Range) -> None:
    if sys.platform == "linux":
        # Up to the last page's end: the kernel leaves a page that the length cuts through.
        length = _page_count(span) * mmap.PAGESIZE
        os.posix_fadvise(span.fd, span.start, length, os.POSIX_FADV_DONTNEED)
        return
    with _mapped(span) as address:
        length, flags = ctypes.c_size_t(span.nbytes), ctypes.c_int(_MS_INVALIDATE)
        _check(_libc.msync(address, length, flags), span)


@contextmanager
def _mapped(span: _Range) -> Iterator[ctypes.c_void_p]:
    # The mapping is never touched, so it brings no page in.
    mapping = mmap.mmap(span.fd, span.nbytes, prot=mmap.PROT_READ, offset=span.start)
    with mapping:
        # The array must be gone before the mapping closes.
        yield ctypes.c_void_p(np.frombuffer(mapping, np.uint8).ctypes.data)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _check(failed: int, span: _Range) -> None:
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(span.path))


def process_read_nbytes() -> int | None:
    """Bytes that the kernel has fetched from storage for this process so far (Linux /proc/self/io).

    Reads that the page cache answers do not count. None where the system does not say.
    """
    try:
        with open("/proc/self/io") as stream:
            for line in stream:
                if line.startswith("read_bytes:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return None


class Residency:
    """Asks about one file again and again, opened once; a question costs two or three microseconds.

    One thread at a time may ask. Raises what `resident_pages` raises, at once where the system will
    not tell at all.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        resident_bytes(path)
        self._fd = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._fd).st_size
        weakref.finalize(self, os.close, self._fd)
        self._where, self._counts = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
        arguments = (ctypes.c_long(_SYS_CACHESTAT), ctypes.c_int(self._fd))
        self._ask = partial(_libc.syscall, *arguments, self._where, self._counts, ctypes.c_uint(0))
        self._told = _cachestat(self._range(0, self._size)) is not None

    def holds(self, offset: int, nbytes: int) -> bool:
        """Whether every page of the range is in the page cache; `nbytes` is 1 or more."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        stop = min(self._size, -(-(offset + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE)
        if not self._told:
            return _resident_bytes(self._range(start, stop)) >= stop - start
        self._where[:] = start, stop - start
        self._ask()
        return self._counts[0] * mmap.PAGESIZE >= stop - start

    def _range(self, start: int, stop: int) -> _Range:
        return _Range(path=self.path, fd=self._fd, start=start, stop=stop)
