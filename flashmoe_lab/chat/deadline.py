"""Runs Python code that may never end, and stops it when its time is over.

The code runs in a thread of its own, which an exception raised from outside ends at its next
bytecode: there is no cost while it runs, and no place where it must ask for the time. A single call
into C is not interrupted; whoever uses this keeps such calls short (see sandbox.py).
"""

import ctypes
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_AGAIN_S, _TRIES = 0.2, 10


class _Stop(BaseException):
    """No Exception, so that nothing in between takes it for an error of its own."""


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises.

    Raises:
        TimeoutError: it was not ready after so many seconds. It has been stopped, or stops as soon
            as the call into C that it is in returns.
    """
    errand = _Errand(work)
    thread = threading.Thread(target=errand.run, name="flashmoe-template", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:  # also where the caller is interrupted
        # Again, because what runs between, such as a destructor, can swallow the exception.
        for _ in range(_TRIES):
            if not errand.stop(thread.ident):
                break
            thread.join(_AGAIN_S)
    return errand.result()


class _Errand(Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._over = False
        self._lock = threading.Lock()
        self._answer: list[T] = []
        self._error: BaseException = _Stop()

    def run(self) -> None:
        try:
            answer = self._work()
            with self._lock:  # from here on it is too late to stop
                self._over = True
                self._answer.append(answer)
        except BaseException as error:
            self._over = True
            self._error = error

    def stop(self, thread: int | None) -> bool:
        """Asks for an end, unless it is over; whether that was needed."""
        with self._lock:
            if self._over or thread is None:
                return False
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread), ctypes.py_object(_Stop)
            )
        return True

    def result(self) -> T:
        if self._answer:
            return self._answer[0]
        if isinstance(self._error, _Stop):
            raise TimeoutError("took too long")
        raise self._error
