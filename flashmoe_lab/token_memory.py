"""TokenMemory: what one token leaves behind on its way through layers that nobody looks into.

Such a layer is two native calls, which write here, token after token, so that a token costs no
memory and makes no objects. It knows no layer; who records a run takes copies of it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

MOMENTS = 4


class TokenParts(NamedTuple):
    """What layers leave of a token, or of many, without a copy of the memory that it lies in.

    Attributes:
        moments: int64 [..., L, 4], in ns: when the experts were known, when it had been asked where
            they are, when they were there (0: they never were), and when all was done. A layer that
            did not run here has an earlier token's.
        looked_ns: int64 [..., L, 1], when the next layer's router began to be asked what it is
            likely to name; an earlier token's, or 0, where it was not.
        logits, experts, weights: [..., L, E], int32 [..., L, K] and [..., L, K], of the router.
    """

    moments: np.ndarray
    looked_ns: np.ndarray
    logits: np.ndarray
    experts: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, memory: np.ndarray, layers: int, num_experts_per_tok: int) -> "TokenParts":
        """Of uint8 [..., nbytes]."""
        chosen = 4 * layers * num_experts_per_tok
        end = memory.shape[-1]
        noted = 8 * MOMENTS * layers
        ends = noted, noted + 8 * layers, end - 2 * chosen, end - chosen
        kinds = np.int64, np.int64, np.float32, np.int32, np.float32
        shape = (*memory.shape[:-1], layers, -1)
        parts = zip(np.split(memory, ends, axis=-1), kinds, strict=True)
        return cls(*(part.view(kind).reshape(shape) for part, kind in parts))


class TokenMemory:
    """Memory for one token at a time.

    Attributes:
        num_experts_per_tok: K.
        x: float32 [1, hidden], what goes into a layer, and what comes out of it.
        stream, normed, shared: the same of what lies between its two calls.
        slots: int64 [1, K].
        left: uint8, what layers leave, in one piece of memory; `parts` are its parts.
        rows: of it, a layer's logits [1, E], experts [1, K], weights [1, K] and moments [4].
        reads: where a layer of which the bank did not hold all adds its number, what it fetched,
            and what `ask` said; None if nobody wants it.
        ask: called before reading with a layer's number and experts.
        ahead: by layer, its reads that were begun while the layer before it ran.
    """

    def __init__(
        self, layers: int, hidden: int, num_experts: int, num_experts_per_tok: int
    ) -> None:
        self.num_experts_per_tok = k = num_experts_per_tok
        self.x, self.stream, self.normed, self.shared = np.empty((4, 1, hidden), np.float32)
        self.slots = np.empty((1, k), np.int64)
        self.left = np.zeros(layers * (8 * (MOMENTS + 1) + 4 * (num_experts + 2 * k)), np.uint8)
        self.parts = TokenParts.of(self.left, layers, k)
        moments, _, *routing = self.parts
        self.rows = list(zip(*(part[:, None] for part in routing), moments, strict=True))
        self.forget()

    def forget(self) -> None:
        """Hold on to nobody who had asked for what is read."""
        self.reads: list[tuple[int, Any, Any]] | None = None
        self.ask: Callable[[int, Sequence[int]], Any] = _ask_nobody
        self.ahead: dict[int, Sequence[Any]] = {}


def _ask_nobody(layer: int, experts: Sequence[int]) -> None:
    """Where nobody wants to know."""
