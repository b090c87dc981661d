"""Watch: what a run tells whoever follows it, at the moments when the run knows it.

The base class listens to nothing, so a run that nobody watches pays one look-up a stage. It knows
no tables and no files; `tracing.Tracer` is the one that keeps a record.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.state import SequenceState
from flashmoe_lab.token_memory import TokenMemory

if TYPE_CHECKING:
    from flashmoe_lab.trace import Trace


class Watch:
    """Listens to a run; every method is called in the thread that runs it.

    Attributes:
        listeners: stage path -> what is called with (result) right after the stage; a stage that is
            not here is not told. Interventions have had their say before. "block" is a layer's end.
            A layer that is not in `layers_by_stage` may run in two native calls, which show router,
            fetch and block alone.
        trace: what a tracer has made of it, once the run is over.
        record_nbytes: what the arrays that it keeps may take.
        every_stage: whether each stage must run on its own, not several in one native call.
    """

    listeners: dict[str, Callable[[Any], None]] = {}
    every_stage: bool = False
    trace: "Trace | None" = None
    record_nbytes: int = 0

    @cached_property
    def layers_by_stage(self) -> frozenset[int]:
        """Layers that must run stage by stage for the listeners to hear what they want."""
        return layers_by_stage(self.listeners)

    @cached_property
    def layers_heard(self) -> frozenset[int]:
        """Layers whose listeners must be told of a single token too; of any other,
        `token_begins` may be all that is."""
        return layers_of(self.listeners)

    def run_begins(self) -> None:
        """A run starts, in its own thread."""

    def pass_begins(self, phase: str, tokens: Sequence[int], state: SequenceState) -> None:
        """Tokens are about to go through the model; `phase` is "prefill" or "decode"."""

    def token_begins(self, memory: TokenMemory) -> None:
        """It is one token, and layers that are not heard will leave in `memory` what they do."""

    def token_ends(self) -> None:
        """It is through; from here on its memory may be another token's."""

    def pass_ends(self) -> None:
        """Their logits are on the host."""

    def token_chosen(self, token: int, logprobs: np.ndarray) -> None:
        """The sampler has chosen a token."""

    def run_ends(self, finish_reason: str, error: str = "") -> None:
        """The run is over; `finish_reason` is "stop", "length", "cancelled" or, with its words,
        "error"."""


def layers_of(paths: Iterable[str]) -> frozenset[int]:
    """The layers of stages by path."""
    return frozenset(int(path.split(".")[1]) for path in paths if path.startswith("layers."))


def layers_by_stage(paths: Iterable[str]) -> frozenset[int]:
    """Of stages by path, the layers of those that a run in two native calls does not show."""
    parts = [path.split(".") for path in paths if path.startswith("layers.")]
    return frozenset(int(n) for _, n, name in parts if name not in ("router", "fetch", "block"))


def finish(result: Any) -> None:
    """Wait for whatever is still to be computed or read in a stage's result, or a layer's state."""
    if isinstance(result, Fetched):
        result.wait()
        return
    names = ("experts", "weights", "logits", "keys", "values", "conv", "recurrent")
    parts = [result, *(getattr(result, name, None) for name in names)]
    mx.eval([part for part in parts if isinstance(part, mx.array)])


class Together(Watch):
    """Several who follow one run, told one after another; the first one's trace is the run's."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = tuple(watches)
        self._joined = [watch.listeners for watch in watches]
        self.every_stage = any(watch.every_stage for watch in watches)
        self.record_nbytes = sum(watch.record_nbytes for watch in watches)

    @cached_property
    def layers_by_stage(self) -> frozenset[int]:
        """Those of all."""
        return frozenset().union(*(watch.layers_by_stage for watch in self._watches))

    @cached_property
    def layers_heard(self) -> frozenset[int]:
        """Those of all."""
        return frozenset().union(*(watch.layers_heard for watch in self._watches))

    def run_begins(self) -> None:
        """See Watch; who listens to what is known from here on."""
        for watch in self._watches:
            watch.run_begins()
        self._listen()

    def _listen(self) -> None:
        told: dict[str, list[Callable[[Any], None]]] = {}
        self._joined = [watch.listeners for watch in self._watches]
        for listeners in self._joined:
            for path, listener in listeners.items():
                told.setdefault(path, []).append(listener)
        self.listeners = {path: _in_turn(listeners) for path, listeners in told.items()}

    def pass_begins(self, phase: str, tokens: Sequence[int], state: SequenceState) -> None:
        """See Watch."""
        for watch in self._watches:
            watch.pass_begins(phase, tokens, state)
        now = [watch.listeners for watch in self._watches]
        if not all(map(operator.is_, now, self._joined)):
            self._listen()

    def token_begins(self, memory: TokenMemory) -> None:
        """See Watch."""
        for watch in self._watches:
            watch.token_begins(memory)

    def token_ends(self) -> None:
        """See Watch."""
        for watch in self._watches:
            watch.token_ends()

    def pass_ends(self) -> None:
        """See Watch."""
        for watch in self._watches:
            watch.pass_ends()

    def token_chosen(self, token: int, logprobs: np.ndarray) -> None:
        """See Watch."""
        for watch in self._watches:
            watch.token_chosen(token, logprobs)

    def run_ends(self, finish_reason: str, error: str = "") -> None:
        """See Watch."""
        for watch in self._watches:
            watch.run_ends(finish_reason, error)
        self.trace = self._watches[0].trace


def watch_together(watches: Sequence[Watch]) -> Watch:
    """One watch in the place of several, or of none."""
    return Together(watches) if len(watches) > 1 else watches[0] if watches else NOBODY


def _in_turn(listeners: Sequence[Callable[[Any], None]]) -> Callable[[Any], None]:
    if len(listeners) == 1:
        return listeners[0]
    first, *others = listeners

    def told(result: Any) -> None:
        first(result)
        for listener in others:
            listener(result)

    return told


NOBODY = Watch()
