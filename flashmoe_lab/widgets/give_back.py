"""What a run or an engine no longer needs goes back to the system.

Nothing holds on to it, but MLX keeps freed arrays for its next ones, and glibc keeps freed memory
for the thread that asked for it: with another engine's threads every run, it would pile up.
"""

import ctypes
import gc

import mlx.core as mx


def give_back() -> None:
    """Collect cycles, empty MLX's cache, and have the allocator return free pages (on glibc)."""
    gc.collect()
    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
