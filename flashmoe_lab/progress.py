"""One line on standard error that shows how far a long job is, how fast, and when it will end."""

import sys
import time
from typing import TextIO

_TTY_EVERY_S = 0.1
_LOG_EVERY_S = 10.0  # where the output is a file, a line now and then is enough


class ProgressLine:
    """Told of bytes done (`line(nbytes)`), it draws itself; use as a context manager.

    Args:
        what: the job in a word or two.
        total_nbytes: all that is to be done.
        quiet: draw nothing.
    """

    def __init__(
        self, what: str, total_nbytes: int, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self.what, self.total_nbytes, self.quiet = what, total_nbytes, quiet
        self.done_nbytes = 0
        self._stream = stream or _default_stream()
        self._tty = self._stream.isatty()
        self._start = self._drawn = time.monotonic()
        self._shown = False

    def __call__(self, nbytes: int) -> None:
        """Add bytes done."""
        self.done_nbytes += nbytes
        now = time.monotonic()
        if now - self._drawn >= (_TTY_EVERY_S if self._tty else _LOG_EVERY_S):
            self._drawn = now
            self._draw("\r" if self._tty else "\n")

    def text(self) -> str:
        """The line as it stands."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self.done_nbytes / seconds
        left = (self.total_nbytes - self.done_nbytes) / rate if rate else 0.0
        share = self.done_nbytes / self.total_nbytes if self.total_nbytes else 1.0
        when = f"{_clock(left)} left" if share < 1 else f"in {_clock(seconds)}"
        return (
            f"{self.what} {share:4.0%}  {self.done_nbytes / 1e9:.2f} of "
            f"{self.total_nbytes / 1e9:.2f} GB  {rate / 1e9:.2f} GB/s  {when}"
        )

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None or self._shown:  # an error before the first line needs none
            self._draw("\n")

    def _draw(self, end: str) -> None:
        if self.quiet:
            return
        self._shown = True
        clear = "\r\x1b[K" if self._tty else ""
        self._stream.write(clear + self.text() + ("" if end == "\r" else "\n"))
        self._stream.flush()


def _default_stream() -> TextIO:
    """Standard error; in a notebook, where that looks like an alarm, standard output."""
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    return sys.stdout if in_notebook else sys.stderr


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
