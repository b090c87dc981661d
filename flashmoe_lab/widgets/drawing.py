"""The one thread that draws widgets' figures.

Matplotlib is not made for several threads, and keeps fonts open for each that ever drew: with a new
thread a run, memory would grow with every run. The thread begins with the first figure.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_thread = ThreadPoolExecutor(1, "flashmoe-drawing")


def draw(fn: Callable[[], T]) -> T:
    """What fn returns, run in that thread, one after another. Not to be called from within it."""
    return _thread.submit(fn).result()
