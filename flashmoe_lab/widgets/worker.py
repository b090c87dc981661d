"""Worker: what a callback wants done, in a thread of its own that ends when there is no more to do.

Of what waits only the latest of its kind is done: a slider that was dragged needs no picture of
every place that it passed.
"""

import threading
from collections.abc import Callable


class Worker:
    """Runs one thing after another; `failed` is told of what went wrong."""

    def __init__(self, name: str, failed: Callable[[BaseException], None]) -> None:
        self._name, self._failed = name, failed
        self._lock = threading.Lock()
        self._waiting: dict[str, Callable[[], None]] = {}  # by kind, the next first
        self._thread: threading.Thread | None = None

    def do(self, fn: Callable[[], None], kind: str = "") -> None:
        """Run fn soon, unless something newer of its kind comes before its turn; returns at
        once."""
        with self._lock:
            self._waiting.pop(kind, None)
            self._waiting[kind] = fn
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until there is no more to do. For cells: a callback must not wait."""
        while (thread := self._thread) is not None:
            thread.join(0.1)  # an interrupt comes between two of these

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                fn = self._waiting.pop(next(iter(self._waiting)))
            try:
                fn()
            except Exception as error:  # a thread's error would be lost
                self._failed(error)
