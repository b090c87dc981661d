"""Who may use the engine now: one request after another, in the order in which they came.

The line is bounded. Whoever finds it full is told to come back, and when.
"""

import asyncio
import math
import time
from collections import deque
from types import TracebackType

from flashmoe_lab.server.errors import ApiError, shutting_down


class Queue:
    """The line before an engine.

    Args:
        longest: how many may wait behind the one whose turn it is.
    """

    def __init__(self, longest: int) -> None:
        if longest < 0:
            raise ValueError(f"the queue's length is {longest}; it must be 0 or more")
        self.longest = longest
        self._places: deque[Place] = deque()
        self._closed = False
        self._mean_s = 1.0  # of a turn, the last ones counting most

    @property
    def waiting(self) -> int:
        """How many wait."""
        return max(0, len(self._places) - 1)

    @property
    def running(self) -> int:
        """How many have their turn: one or none."""
        return min(1, len(self._places))

    def enter(self) -> "Place":
        """A place at the end of the line; leave it by its `with`.

        Raises:
            ApiError: 429, there is none; 503, the server ends.
        """
        if self._closed:
            raise shutting_down()
        if len(self._places) > self.longest:
            raise ApiError(
                429,
                f"{self.waiting} requests are waiting, which is as many as may; try again later",
                "queue_full",
                headers={"Retry-After": str(max(1, math.ceil(self._mean_s)))},
            )
        place = Place(self)
        self._places.append(place)
        self._call_next()
        return place

    def close(self) -> None:
        """Send away who waits, and who comes."""
        self._closed = True
        for place in self._places:
            place.turn.set()

    def leave(self, place: "Place") -> None:
        """Give up a place; the next one may have the turn."""
        if place.began is not None:
            self._mean_s += (time.monotonic() - place.began - self._mean_s) / 8
        self._places.remove(place)
        self._call_next()

    def _call_next(self) -> None:
        if self._places and not self._places[0].turn.is_set():
            self._places[0].began = time.monotonic()
            self._places[0].turn.set()


class Place:
    """One request's place in the line.

    Attributes:
        turn: set when it is its turn, or will never be.
        began: when its turn began; None before.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.turn = asyncio.Event()
        self.began: float | None = None

    async def come(self) -> None:
        """Wait for the turn.

        Raises:
            ApiError: 503, the server ends before.
        """
        await self.turn.wait()
        if self.began is None:
            raise shutting_down()

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue.leave(self)
