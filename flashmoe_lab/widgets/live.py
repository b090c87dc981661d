"""Live: a watch that notes what a run's figures need while it runs, and hands it to another thread.

The engine's thread only appends references; nothing is counted, copied or drawn there. What is
handed over is plain numbers and NumPy arrays.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.state import SequenceState
from flashmoe_lab.watch import Watch


@dataclass(slots=True, kw_only=True)
class LivePass:
    """One pass through the model.

    Attributes:
        tokens: how many went through together.
        start_ns: when it began.
        fetched: (layer, what it fetched), complete once the pass is over.
        layer_end_ns: when each layer ended.
    """

    tokens: int
    start_ns: int
    fetched: list[tuple[int, Fetched]]
    layer_end_ns: list[int]


class Live(Watch):
    """Follows one run of a model of so many layers."""

    def __init__(self, layers: int) -> None:
        self._under_way: LivePass | None = None
        self._over: deque[LivePass] = deque()
        self.listeners = {}
        for layer in range(layers):
            self.listeners[f"layers.{layer}.fetch"] = self._fetched(layer)
            self.listeners[f"layers.{layer}.block"] = self._block_ended

    def _fetched(self, layer: int) -> Callable[[Any], None]:
        def listener(fetched: Fetched) -> None:
            if self._under_way is not None:
                self._under_way.fetched.append((layer, fetched))

        return listener

    def _block_ended(self, result: object) -> None:
        if self._under_way is not None:
            self._under_way.layer_end_ns.append(perf_counter_ns())

    def pass_begins(self, phase: str, tokens: Sequence[int], state: SequenceState) -> None:
        """See Watch."""
        self._under_way = LivePass(
            tokens=len(tokens), start_ns=perf_counter_ns(), fetched=[], layer_end_ns=[]
        )

    def pass_ends(self) -> None:
        """See Watch."""
        if self._under_way is not None:
            self._over.append(self._under_way)
            self._under_way = None

    def taken(self) -> list[LivePass]:
        """The passes that ended since this was last called; from any one thread."""
        passes = list[LivePass]()
        while self._over:
            passes.append(self._over.popleft())
        return passes
