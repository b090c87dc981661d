"""The one thread that draws widgets' figures and opens their engines.

Matplotlib is not made for several threads, and keeps fonts open for each that ever drew; the
allocator keeps what was freed for the thread that had asked for it. With a new thread a run, memory
would grow with every run. The thread begins with the first thing to do, and stays.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_thread = ThreadPoolExecutor(1, "flashmoe-widgets")


def in_one_thread(fn: Callable[[], T]) -> T:
    """What fn returns, run in that thread, one after another. Not to be called from within it."""
    return _thread.submit(fn).result()
