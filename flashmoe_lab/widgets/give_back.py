"""What a run or an engine no longer needs goes back to the system.

Nothing holds on to it, but MLX keeps freed arrays for its next ones, and glibc keeps freed memory
for the thread that asked for it: with another engine's threads every run, it would pile up.
"""

import ctypes
import gc

import mlx.core as mx

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # as glibc's malloc.h numbers them
_LARGE_NBYTES = 1 << 20


def give_back() -> None:
    """Collect cycles, empty MLX's cache, and have the allocator return free pages (on glibc)."""
    gc.collect()
    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def keep_little() -> None:
    """Have glibc return large memory as soon as it is freed, and make no further heaps for threads.

    By itself it learns from every large array that is freed to keep the next ones, up to 64 MB a
    heap, where `give_back` cannot reach. It holds for the whole process.
    """
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None:
        choose(_MMAP_THRESHOLD, _LARGE_NBYTES)
        choose(_TRIM_THRESHOLD, _LARGE_NBYTES)
        choose(_ARENA_MAX, 1)
