"""The model: stages assembled to layers, and layers to a whole that maps token ids to logits.

The model computes; it knows nothing of text, sampling or threads. `Model.steps` is the one place
where the order of a forward pass stands; calling the model, `step` and `intercept` are ways of
driving it.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.config import ModelConfig, check_num_experts_per_tok
from flashmoe_lab.layer import Layer, Steps
from flashmoe_lab.stages.embedding import Embedding
from flashmoe_lab.stages.lm_head import LMHead
from flashmoe_lab.stages.norm import RMSNorm
from flashmoe_lab.stages.part import Part
from flashmoe_lab.state import SequenceState
from flashmoe_lab.token_memory import TokenMemory
from flashmoe_lab.watch import NOBODY, Watch, layers_by_stage, layers_of

Hook = Callable[[Any, str], Any]


class Cancelled(RuntimeError):
    """A pass through the model was left on request; its state is to be thrown away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What one stage gave: `path` is like "layers.3.router"."""

    path: str
    result: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a pass has to show.

    Attributes:
        plain: layers of which nobody wants to see a stage that `native_steps` does not give.
        final: those of them whose router has the last word.
        unseen: those of these of which nobody wants to see anything where a single token passes.
        ahead: those of these whose experts may be read before their router has spoken.
    """

    plain: frozenset[int] = frozenset()
    final: frozenset[int] = frozenset()
    unseen: frozenset[int] = frozenset()
    ahead: frozenset[int] = frozenset()


_WHOLE = View()


class _Passes(threading.local):
    """The states of a thread's passes under way, one within another."""

    states: tuple[SequenceState, ...] = ()


class Model:
    """Embedding, layers, final norm and head.

    Attributes:
        embed, layers, norm, lm_head: the stages.
        config: the geometry.
        dtype: type of activations.
        interventions_begun: how many there ever were.
        intercepted: the patterns that are intercepted now.
    """

    def __init__(
        self,
        config: ModelConfig,
        embed: Embedding,
        layers: Sequence[Layer],
        norm: RMSNorm,
        lm_head: LMHead,
    ) -> None:
        self.config, self.dtype = config, embed.dtype
        self.embed, self.layers, self.norm, self.lm_head = embed, tuple(layers), norm, lm_head
        self._interventions: list[tuple[str, Hook]] = []
        self.intercepted: list[str] = []
        self._hooks: dict[str, list[Hook]] = {}
        self._check: Hook | None = None
        self._last_view: tuple[dict[str, list[Hook]], Any, View] | None = None
        self._memories: list[TokenMemory] = []
        self.interventions_begun = 0
        self._passes = _Passes()

    # Running

    @property
    def state(self) -> SequenceState | None:
        """Of the pass under way in this thread, for hooks that look into it or change it."""
        return self._passes.states[-1] if self._passes.states else None

    def empty_state(self) -> SequenceState:
        """The state before the first token."""
        return SequenceState.empty(self.config, self.dtype)

    def __call__(
        self,
        tokens: Sequence[int],
        state: SequenceState,
        num_experts_per_tok: int | None = None,
        last_only: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
        watch: Watch = NOBODY,
    ) -> mx.array:
        """Logits float32 [T, vocab] of T further tokens ([1, vocab] with `last_only`); `state`
        moves on. `watch` hears of the stages.

        Raises:
            Cancelled: `cancelled`, which is asked between stages, said so.
        """
        hooks, memory = self._hooks, None
        view = self._view(watch, hooks)
        if len(tokens) == 1 and view.unseen:
            memory = self._memory(num_experts_per_tok)
            watch.token_begins(memory)
        steps = self.steps(tokens, state, num_experts_per_tok, last_only, view, memory)
        try:
            logits = self._driven(steps, hooks, watch.listeners, cancelled)
        finally:
            if memory is not None:
                self._settle(view)
        if memory is not None:
            watch.token_ends()
            memory.forget()
            self._memories.append(memory)
        return logits

    def _driven(
        self,
        steps: Steps,
        hooks: dict[str, list[Hook]],
        listeners: Mapping[str, Callable[[Any], None]],
        cancelled: Callable[[], bool],
    ) -> mx.array:
        answer = None
        while True:
            if cancelled():
                raise Cancelled("the run was stopped")
            try:
                path, answer = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            if path in hooks:
                answer = self._hooked(path, answer)
            if path in listeners:
                listeners[path](answer)

    def step(
        self,
        tokens: Sequence[int],
        state: SequenceState | None = None,
        num_experts_per_tok: int | None = None,
    ) -> Generator[StageResult, None, mx.array]:
        """The same, stopping after every stage with its result; the logits are the last one's."""
        steps = self.steps(tokens, state or self.empty_state(), num_experts_per_tok)
        answer = None
        while True:
            try:
                path, answer = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = self._hooked(path, answer)
            yield StageResult(path=path, result=answer)

    def steps(
        self,
        tokens: Sequence[int],
        state: SequenceState,
        num_experts_per_tok: int | None = None,
        last_only: bool = False,
        view: View | None = None,
        memory: TokenMemory | None = None,
    ) -> Steps:
        """(path, result) after every stage, going on with what is sent back; returns the logits.

        With `view`, layers show no more than it says, and a last "block" ends each that shows
        something, which is no stage and cannot be intercepted. A single token goes through what is
        unseen in `memory`, if there is one.
        """
        check_ids(tokens, self.config.vocab_size)
        if not len(tokens):
            raise ValueError("there are no tokens; it needs at least one")
        with self._under_way(state):
            x = yield from self._layer_steps(tokens, state, num_experts_per_tok, view, memory)
        state.tokens.extend(int(token) for token in tokens)
        x = yield "norm", self.norm(x[-1:] if last_only and len(tokens) > 1 else x)
        return (yield "lm_head", self.lm_head(x))

    @contextmanager
    def _under_way(self, state: SequenceState) -> Iterator[None]:
        passes = self._passes
        passes.states = (*passes.states, state)
        try:
            yield
        finally:  # also where a pass is left midway, perhaps after others have begun
            passes.states = tuple(other for other in passes.states if other is not state)

    def _layer_steps(
        self,
        tokens: Sequence[int],
        state: SequenceState,
        num_experts_per_tok: int | None,
        view: View | None,
        memory: TokenMemory | None,
    ) -> Steps:
        """The same up to what goes into the last norm."""
        x = yield "embed", self.embed(mx.array([int(token) for token in tokens]))
        seen = view or _WHOLE
        held = None  # the memory, while x is the one in it
        for layer, following in zip(self.layers, (*self.layers[1:], None), strict=True):
            own = state[layer.index]
            if memory is not None and layer.index in seen.unseen and layer.native.takes(own):
                if held is None:
                    held, memory.x[:] = memory, native.floats(x)
                if following is not None and following.index not in seen.ahead:
                    following = None
                layer.token(memory, own, following)
                continue
            if held is not None:
                held, x = None, mx.array(held.x)
            if layer.index in seen.plain:
                is_final = layer.index in seen.final
                steps = layer.native_steps(x, own, num_experts_per_tok, is_final)
            else:
                steps = layer.steps(x, own, num_experts_per_tok)
            answer = None
            while True:
                try:
                    name, answer = steps.send(answer)
                except StopIteration as stop:
                    x = stop.value
                    break
                answer = yield f"layers.{layer.index}.{name}", answer
            if view is not None:  # the layer ends here, for who looks at the clock
                yield f"layers.{layer.index}.block", x
        return x if held is None else mx.array(held.x)

    def reference(
        self, tokens: Sequence[int], num_experts_per_tok: int | None = None
    ) -> np.ndarray:
        """Logits float64 [T, vocab] of a whole sequence, in NumPy from the stored weights."""
        x = self.embed.reference(np.asarray(tokens))
        for layer in self.layers:
            x = layer.reference(x, num_experts_per_tok)
        return self.lm_head.reference(self.norm.reference(x))

    # Intervening

    def paths(self) -> list[str]:
        """The paths of all stages, in the order in which they run."""
        names = ("input_norm", "mixer", "post_norm", "router", "shared_expert", "fetch", "experts")
        inner = [f"layers.{layer.index}.{name}" for layer in self.layers for name in names]
        return ["embed", *inner, "norm", "lm_head"]

    @contextmanager
    def intercept(self, pattern: str, fn: Hook) -> Iterator[None]:
        """Within the `with`, give every matching stage's result to fn(result, path).

        What fn returns takes the result's place; None keeps it. Patterns are shell-like:
        "layers.*.router".

        Raises:
            ValueError: the pattern matches no stage.
        """
        if not any(fnmatchcase(path, pattern) for path in self.paths()):
            raise ValueError(
                f"{pattern!r} matches no stage; paths are like 'embed', 'layers.0.router' (router, "
                "mixer, fetch, experts, shared_expert, input_norm, post_norm), 'norm', 'lm_head'"
            )
        entry = (pattern, fn)
        self._interventions.append(entry)
        self.interventions_begun += 1
        self._match()
        try:
            yield
        finally:
            self._interventions.remove(entry)
            self._match()

    @property
    def check(self) -> Hook | None:
        """A hook that sees every stage's result last, after interventions; None for none."""
        return self._check

    @check.setter
    def check(self, fn: Hook | None) -> None:
        self._check = fn
        self._match()

    def _match(self) -> None:
        """Hooks by path, so that a stage that nobody touches costs one look-up in a dictionary."""
        self.intercepted = [pattern for pattern, _ in self._interventions]
        hooks: dict[str, list[Hook]] = {}
        last = [("*", self._check)] if self._check else []
        for pattern, fn in self._interventions + last:
            for path in self.paths():
                if fnmatchcase(path, pattern):
                    hooks.setdefault(path, []).append(fn)
        self._hooks = hooks  # at once: a run in another thread must never see half of them

    def _view(self, watch: Watch, hooks: dict[str, list[Hook]]) -> View:
        """What is to be seen in a pass that `watch` follows, found again when something changed."""
        if watch.every_stage or not kernels.native_for(self.dtype):
            return _WHOLE
        key = (Part.changes, watch.layers_by_stage, watch.layers_heard)
        last = self._last_view
        if last is None or last[0] is not hooks or last[1] != key:
            exact = frozenset(layer.index for layer in self.layers if layer.native.is_exact())
            plain = exact - watch.layers_by_stage - layers_by_stage(hooks)
            fitting = {layer.index for layer in self.layers if self._fits_memory(layer)}
            final = plain - layers_of(hooks)
            unseen = final & fitting - watch.layers_heard
            view = View(plain=plain, final=final, unseen=unseen, ahead=self._ahead(unseen))
            last = self._last_view = hooks, key, view
        return last[2]

    def _settle(self, view: View) -> None:
        """Wait for what was read for nothing: it belongs to this pass, however that ended. The head
        ran meanwhile."""
        for index in view.ahead:
            bank = self.layers[index].fetch.bank
            with bank.lock:
                bank.settle()

    def _ahead(self, unseen: frozenset[int]) -> frozenset[int]:
        fetches = {n: self.layers[n].fetch for n in unseen}
        return frozenset(n for n, fetch in fetches.items() if fetch.prefetch and fetch.overlap)

    def _fits_memory(self, layer: Layer) -> bool:
        """Whether a layer's router is of the size that all have."""
        first, router = self.layers[0].router, layer.router
        return (
            router.num_experts_per_tok == first.num_experts_per_tok
            and router.gate.out_features == self.config.num_experts
        )

    def _memory(self, num_experts_per_tok: int | None) -> TokenMemory:
        """Memory for a token's pass, which is given back at its end: a hook may run another."""
        experts = self.config.num_experts
        k = num_experts_per_tok
        if k is None:
            k = self.layers[0].router.num_experts_per_tok
        with suppress(IndexError):  # there is none, or another thread's pass took it
            while (memory := self._memories.pop()).num_experts_per_tok != k:
                pass
            return memory
        check_num_experts_per_tok(k, experts)
        return TokenMemory(len(self.layers), self.config.hidden_size, experts, k)

    def _hooked(self, path: str, result: Any) -> Any:
        for fn in self._hooks.get(path, ()):
            answer = fn(result, path)
            result = result if answer is None else answer
        return result


def check_ids(tokens: Sequence[int], vocab_size: int) -> None:
    """ValueError for an id that the table has no row for: MLX would read past its end."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token}: ids are 0 to {vocab_size - 1}")
