"""Pace: how often something may be drawn, so that drawing takes a small share of the time, on
whatever machine."""

from time import perf_counter

SHARE = 0.04
LEAST_S, MOST_S = 0.2, 2.0  # between two drawings; nobody waits longer for a sign of life


class Pace:
    """`due` says whether it is time again, first when it is `LEAST_S` old; draw within `with
    pace:`."""

    def __init__(self, share: float = SHARE, least_s: float = LEAST_S) -> None:
        self._share, self._least_s, self._begun = share, least_s, 0.0
        self._next = perf_counter() + least_s

    @property
    def due(self) -> bool:
        """Whether the last drawing lies long enough back."""
        return perf_counter() >= self._next

    def __enter__(self) -> None:
        self._begun = perf_counter()

    def __exit__(self, *exception: object) -> None:
        now = perf_counter()
        wanted = (now - self._begun) / self._share
        self._next = now + min(max(wanted, self._least_s), MOST_S)
