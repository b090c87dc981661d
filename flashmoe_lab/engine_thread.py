"""The one thread in which an engine does its MLX work.

MLX streams belong to a thread: a lazy graph made in one fails in another. So a run's whole work
happens here, and what leaves is evaluated or plain. The thread is a daemon and ends when its owner
is collected, or when the interpreter does: MLX aborts the process if it is still at work then.
"""

import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
_Work = tuple[Callable[[], object], Future]


class EngineThread:
    """Runs callables one after another."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=_work, args=(self._queue,), name="flashmoe-engine", daemon=True
        )
        self._thread.start()
        self._end = weakref.finalize(self, self._queue.put, None)
        self._end.atexit = False
        self._closing = threading.Event()
        _open.add(self)

    @property
    def closing(self) -> bool:
        """Whether it is to end; long work looks here now and then."""
        return self._closing.is_set()

    def submit(self, fn: Callable[[], T]) -> "Future[T]":
        """Queue `fn`; RuntimeError once the thread was closed."""
        if not self._end.alive:
            raise RuntimeError("the engine was closed")
        if threading.current_thread() is self._thread:
            raise RuntimeError("a run cannot be started from within one, as a hook would")
        future: Future[T] = Future()
        self._queue.put((fn, future))
        return future

    def call(self, fn: Callable[[], T]) -> T:
        """Run `fn` there and return what it returns; directly, if this is the thread itself."""
        if threading.current_thread() is self._thread:
            return fn()
        return self.submit(fn).result()

    def close(self) -> None:
        """Go through what is queued, with `closing` set, and end the thread."""
        self._closing.set()
        if self._end.detach():  # a finalizer is deaf to calls once the interpreter exits
            self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()


_open: weakref.WeakSet[EngineThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for thread in list(_open):
        thread.close()


def _work(queue: "SimpleQueue[_Work | None]") -> None:
    while (work := queue.get()) is not None:
        fn, future = work
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(fn())
            except BaseException as error:
                future.set_exception(error)
        # While it waits, the thread keeps nobody's results alive.
        del work, fn, future
