"""Huge pages under large memory, on Linux: fewer look-ups for who reads it, and for direct I/O.

A direct read into small pages costs a processor half a millisecond for 7 MB, because each page is
held meanwhile. Memory gets huge pages when it is touched first, so what was touched is given back
and touched again; putting touched pages together would copy them, at a fraction of the speed.
"""

import ctypes
import mmap
import sys
import time

import numpy as np

_HUGE_PAGE = 2 << 20
_AT_ONCE_NBYTES = 64 << 20
_SLOWEST, _PATIENCE_S = 0.25e9, 1.0  # bytes a second, and how long it may be slower
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 4, 14, 15


def touch_in_huge_pages(raw: np.ndarray) -> None:
    """Put memory that holds nothing but zeros (uint8, contiguous, malloc's) into huge pages.

    Where that takes long, because free memory lies in small pieces, the rest is in small pages.
    """
    start = -raw.ctypes.data % _HUGE_PAGE
    nbytes = (len(raw) - start) // _HUGE_PAGE * _HUGE_PAGE
    if sys.platform != "linux" or nbytes <= 0:
        return
    memory = ctypes.c_void_p(raw.ctypes.data + start)
    madvise = ctypes.CDLL(None).madvise

    def advise(advice: int) -> bool:
        return madvise(memory, ctypes.c_size_t(nbytes), advice) == 0

    if not advise(_MADV_HUGEPAGE) or not advise(_MADV_DONTNEED):
        return  # a kernel without huge pages
    begin, asks = time.perf_counter(), True
    for done in range(start, len(raw), _AT_ONCE_NBYTES):
        if asks and time.perf_counter() - begin > _PATIENCE_S + done / _SLOWEST:
            asks = not advise(_MADV_NOHUGEPAGE)
        raw[done : done + _AT_ONCE_NBYTES : mmap.PAGESIZE] = 0
