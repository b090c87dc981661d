"""Live: a watch that notes what a run's figures need while it runs, and hands it to another thread.

The engine's thread only appends references and copies one small array a token; nothing is counted
or drawn there. What is handed over is plain numbers and NumPy arrays.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

import numpy as np

from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.state import SequenceState
from flashmoe_lab.token_memory import TokenMemory
from flashmoe_lab.watch import Watch


@dataclass(slots=True, kw_only=True)
class LivePass:
    """One pass through the model.

    Attributes:
        tokens: how many went through together.
        start_ns: when it began.
        experts: layers [n] together with the experts that they chose, [n, ...].
        fetched: what was read; complete once the pass is over.
        layer_end_ns: layer -> when it ended.
    """

    tokens: int
    start_ns: int
    experts: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    fetched: list[Fetched] = field(default_factory=list)
    layer_end_ns: dict[int, int] = field(default_factory=dict)


class Live(Watch):
    """Follows one run of a model of so many layers."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._under_way: LivePass | None = None
        self._over: deque[LivePass] = deque()
        self._memory: TokenMemory | None = None
        self._begin = 0  # of what the token's memory is to take note of
        self.listeners = {}
        for layer in range(layers):
            self.listeners[f"layers.{layer}.fetch"] = self._fetched(layer)
            self.listeners[f"layers.{layer}.block"] = self._ended(layer)

    @property
    def layers_heard(self) -> frozenset[int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """None: of a single token, what its memory takes note of is enough."""
        return frozenset()

    def _fetched(self, layer: int) -> Callable[[Any], None]:
        number = np.array([layer])

        def listener(fetched: Fetched) -> None:
            if self._under_way is not None:
                self._under_way.experts.append((number, fetched.experts))
                self._under_way.fetched.append(fetched)

        return listener

    def _ended(self, layer: int) -> Callable[[Any], None]:
        def listener(result: object) -> None:
            if self._under_way is not None:
                self._under_way.layer_end_ns[layer] = perf_counter_ns()

        return listener

    def pass_begins(self, phase: str, tokens: Sequence[int], state: SequenceState) -> None:
        """See Watch."""
        self._under_way = LivePass(tokens=len(tokens), start_ns=perf_counter_ns())
        self._memory = None

    def token_begins(self, memory: TokenMemory) -> None:
        """See Watch; a record's notes do for both."""
        if memory.reads is None:
            memory.reads = []
        self._memory, self._begin = memory, len(memory.reads)

    def token_ends(self) -> None:
        """See Watch."""
        memory, self._memory = self._memory, None
        if memory is not None and (done := self._under_way) is not None:
            done.fetched += [fetched for _, fetched, _ in (memory.reads or [])[self._begin :]]
            told = [layer for layers, _ in done.experts for layer in layers]
            unseen = np.delete(np.arange(self._layers), told)
            ended = memory.parts.moments[unseen, -1].tolist()
            done.layer_end_ns |= dict(zip(unseen.tolist(), ended, strict=True))
            done.experts.append((unseen, memory.parts.experts[unseen]))

    def pass_ends(self) -> None:
        """See Watch."""
        done, self._under_way = self._under_way, None
        if done is not None:
            self._over.append(done)

    def taken(self) -> list[LivePass]:
        """The passes that ended since this was last called; from any one thread."""
        passes = list[LivePass]()
        while self._over:
            passes.append(self._over.popleft())
        return passes
