"""TokenMemory: what one token leaves behind on its way through layers that nobody looks into.

Such a layer is two native calls, which write here, token after token, so that a token costs no
memory and makes no objects. It knows no layer; who records a run takes copies of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class TokenMemory:
    """Memory for one token at a time.

    Attributes:
        num_experts_per_tok: K.
        x: float32 [1, hidden], what goes into a layer, and what comes out of it.
        stream, normed, shared: the same of what lies between its two calls.
        slots: int64 [1, K].
        routing: what all routers said, in one piece of memory; see `routing_parts`.
        rows: of it, a layer's logits [1, E], experts [1, K] and weights [1, K].
        notes: None, or where a layer adds its number, when its experts were known, when it had been
            asked where they are, when they were there, and when all was done, in ns.
        reads: with `notes`, where a layer of which the bank did not hold all adds its number, what
            it fetched, and what `ask` said.
        ask: called before reading with a layer's number and experts.
    """

    def __init__(
        self, layers: int, hidden: int, num_experts: int, num_experts_per_tok: int
    ) -> None:
        self.num_experts_per_tok = k = num_experts_per_tok
        self.x, self.stream, self.normed, self.shared = np.empty((4, 1, hidden), np.float32)
        self.slots = np.empty((1, k), np.int64)
        self.routing = np.empty(layers * (num_experts + 2 * k), np.float32)
        parts = routing_parts(self.routing, layers, k)
        self.rows = list(zip(*(part[:, None] for part in parts), strict=True))
        self.forget()

    def forget(self) -> None:
        """Take no more notes, and hold on to nobody who had asked for them."""
        self.notes: list[int] | None = None
        self.reads: list[tuple[int, Any, Any]] = []
        self.ask: Callable[[int, Sequence[int]], Any] = _ask_nobody


def _ask_nobody(layer: int, experts: Sequence[int]) -> None:
    """Where nobody takes notes."""


def routing_parts(
    routing: np.ndarray, layers: int, num_experts_per_tok: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [..., L, E], experts int32 [..., L, K] and weights [..., L, K] of `routing` [...,
    size], without a copy."""
    k = num_experts_per_tok
    ends = routing.shape[-1] - 2 * layers * k, routing.shape[-1] - layers * k
    shape = (*routing.shape[:-1], layers, -1)
    logits, experts, weights = (part.reshape(shape) for part in np.split(routing, ends, axis=-1))
    return logits, experts.view(np.int32), weights
