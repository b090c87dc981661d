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
        experts, ends_ns: layer -> the experts that it chose, [T, K], and when it ended, of layers
            that were told of.
        memory_experts, memory_ends_ns: [L, K] and [L], of a single token: the same of all other
            layers.
    """

    tokens: int
    start_ns: int
    experts: dict[int, np.ndarray] = field(default_factory=dict)
    ends_ns: dict[int, int] = field(default_factory=dict)
    memory_experts: np.ndarray | None = None
    memory_ends_ns: np.ndarray | None = None

    def chosen(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Layers [n] together with the experts that they chose, [n, ...]."""
        found = [(np.array([layer]), experts) for layer, experts in self.experts.items()]
        if (experts := self.memory_experts) is not None:
            others = np.arange(len(experts))
            if found:
                others = np.delete(others, list(self.experts))
            found.append((others, experts[others]))
        return found

    def layers_ns(self, layers: int) -> np.ndarray | None:
        """How long each took; None where not all came to their ends."""
        ends, told = np.zeros(layers + 1, np.int64), self.ends_ns
        ends[0] = self.start_ns
        if self.memory_ends_ns is not None:
            ends[1:] = self.memory_ends_ns
        elif len(told) < layers:
            return None
        for layer, moment in told.items():
            ends[1 + layer] = moment
        return np.diff(ends)


class Live(Watch):
    """Follows one run of a model of so many layers.

    Attributes:
        last: the last token that is through, and what it fetched; None before there is one.
    """

    def __init__(self, layers: int) -> None:
        self.last: tuple[LivePass, list[Fetched]] | None = None
        self._under_way: LivePass | None = None
        self._fetches: list[Fetched] = []
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
        def listener(fetched: Fetched) -> None:
            if self._under_way is not None:
                self._under_way.experts[layer] = fetched.experts
                self._fetches.append(fetched)

        return listener

    def _ended(self, layer: int) -> Callable[[Any], None]:
        def listener(result: object) -> None:
            if self._under_way is not None:
                self._under_way.ends_ns[layer] = perf_counter_ns()

        return listener

    def pass_begins(self, phase: str, tokens: Sequence[int], state: SequenceState) -> None:
        """See Watch."""
        self._under_way = LivePass(tokens=len(tokens), start_ns=perf_counter_ns())
        self._fetches = []

    def token_begins(self, memory: TokenMemory) -> None:
        """See Watch; a record's notes do for both."""
        if memory.reads is None:
            memory.reads = []
        self._memory, self._begin = memory, len(memory.reads)

    def token_ends(self) -> None:
        """See Watch."""
        memory, self._memory = self._memory, None
        if memory is not None and (done := self._under_way) is not None:
            done.memory_experts = memory.parts.experts.copy()
            done.memory_ends_ns = memory.parts.moments[:, -1].copy()
            self._fetches += [fetched for _, fetched, _ in (memory.reads or [])[self._begin :]]

    def pass_ends(self) -> None:
        """See Watch."""
        done, self._under_way = self._under_way, None
        if done is not None:
            self._over.append(done)
            if done.tokens == 1:
                self.last = done, self._fetches

    def taken(self) -> list[LivePass]:
        """The passes that ended since this was last called; from any one thread."""
        passes = list[LivePass]()
        while self._over:
            passes.append(self._over.popleft())
        return passes
