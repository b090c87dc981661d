"""The model: stages assembled to layers, and layers to a whole that maps token ids to logits.

The model computes; it knows nothing of text, sampling or threads. `Model.steps` is the one place
where the order of a forward pass stands; calling the model, `step` and `intercept` are ways of
driving it.
"""

from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.config import LINEAR, ModelConfig
from flashmoe_lab.layer import Layer, Steps
from flashmoe_lab.stages.attention import GatedAttention
from flashmoe_lab.stages.delta_net import GatedDeltaNet
from flashmoe_lab.stages.embedding import Embedding
from flashmoe_lab.stages.expert_fetch import ExpertFetch
from flashmoe_lab.stages.experts import Experts
from flashmoe_lab.stages.lm_head import LMHead
from flashmoe_lab.stages.norm import RMSNorm
from flashmoe_lab.stages.router import Router
from flashmoe_lab.stages.shared_expert import SharedExpert
from flashmoe_lab.state import SequenceState
from flashmoe_lab.storage.bank import ExpertBank
from flashmoe_lab.storage.reader import Reader
from flashmoe_lab.watch import NOBODY, Watch, layers_by_stage
from flashmoe_lab.weights import Weights

Hook = Callable[[Any, str], Any]


class Cancelled(RuntimeError):
    """A pass through the model was left on request; its state is to be thrown away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What one stage gave: `path` is like "layers.3.router"."""

    path: str
    result: Any


class Model:
    """Embedding, layers, final norm and head.

    Attributes:
        embed, layers, norm, lm_head: the stages.
        config: the geometry.
        dtype: type of activations.
        state: of the pass under way, for hooks that look into it or change it.
        interventions_begun: how many there ever were.
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
        self._hooks: dict[str, list[Hook]] = {}
        self._check: Hook | None = None
        self.interventions_begun = 0
        self.state: SequenceState | None = None

    # Running

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
        steps = self.steps(tokens, state, num_experts_per_tok, last_only, self._plain(watch))
        hooks, listeners, answer = self._hooks, watch.listeners, None
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
        plain: Container[int] | None = None,
    ) -> Steps:
        """(path, result) after every stage, going on with what is sent back; returns the logits.

        Layers in `plain` show no more than what their `native_steps` give. Unless it is None, a
        last "block" ends each layer, which is no stage and cannot be intercepted.
        """
        check_ids(tokens, self.config.vocab_size)
        if not len(tokens):
            raise ValueError("there are no tokens; it needs at least one")
        self.state = state
        x = yield "embed", self.embed(mx.array([int(token) for token in tokens]))
        for layer in self.layers:
            run = layer.native_steps if layer.index in (plain or ()) else layer.steps
            steps = run(x, state[layer.index], num_experts_per_tok)
            answer = None
            while True:
                try:
                    name, answer = steps.send(answer)
                except StopIteration as stop:
                    x = stop.value
                    break
                answer = yield f"layers.{layer.index}.{name}", answer
            if plain is not None:  # the layer ends here, for who looks at the clock
                yield f"layers.{layer.index}.block", x
        state.tokens.extend(int(token) for token in tokens)
        self.state = None
        x = yield "norm", self.norm(x[-1:] if last_only else x)
        return (yield "lm_head", self.lm_head(x))

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
    def intercepted(self) -> list[str]:
        """The patterns that are intercepted now."""
        return [pattern for pattern, _ in self._interventions]

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
        hooks: dict[str, list[Hook]] = {}
        last = [("*", self._check)] if self._check else []
        for pattern, fn in self._interventions + last:
            for path in self.paths():
                if fnmatchcase(path, pattern):
                    hooks.setdefault(path, []).append(fn)
        self._hooks = hooks  # at once: a run in another thread must never see half of them

    def _plain(self, watch: Watch) -> Container[int]:
        """Layers of which nobody wants to see a stage that `native_steps` does not give."""
        if watch.every_stage:
            return ()
        busy = watch.layers_by_stage | layers_by_stage(self._hooks)
        return {
            layer.index
            for layer in self.layers
            if layer.index not in busy and layer.can_run_native(self.dtype)
        }

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


def build_model(
    checkpoint: PackedCheckpoint,
    weights: Weights,
    bank: ExpertBank,
    reader: Reader,
    *,
    num_experts_per_tok: int | None = None,
    verify: bool = False,
) -> Model:
    """A model whose resident part is in memory and whose experts come through `bank` and
    `reader`."""
    config = checkpoint.config
    k = num_experts_per_tok or config.num_experts_per_tok
    layers = [
        _layer(checkpoint, weights, bank, reader, index, k, verify)
        for index in range(config.num_hidden_layers)
    ]
    embed = weights.linear("model.embed_tokens")
    head = embed if config.tie_word_embeddings else weights.linear("lm_head")
    return Model(
        config,
        Embedding(embed, weights.dtype),
        layers,
        weights.norm("model.norm", config.rms_norm_eps),
        LMHead(head),
    )


def _layer(
    checkpoint: PackedCheckpoint,
    weights: Weights,
    bank: ExpertBank,
    reader: Reader,
    index: int,
    num_experts_per_tok: int,
    verify: bool,
) -> Layer:
    config, path = checkpoint.config, f"model.layers.{index}"
    kind = config.layer_types[index]
    eps = config.rms_norm_eps
    mixer = _delta_net if kind == LINEAR else _attention
    shared = f"{path}.mlp.shared_expert"
    return Layer(
        index=index,
        kind=kind,
        input_norm=weights.norm(f"{path}.input_layernorm", eps),
        mixer=mixer(config, weights, path),
        post_norm=weights.norm(f"{path}.post_attention_layernorm", eps),
        router=Router(
            weights.linear(f"{path}.mlp.gate"), num_experts_per_tok, config.norm_topk_prob
        ),
        fetch=ExpertFetch(checkpoint.layers[index], bank, reader, verify, overlap=True),
        experts=Experts(index, bank),
        shared_expert=SharedExpert(
            weights.linear(f"{shared}.gate_proj"),
            weights.linear(f"{shared}.up_proj"),
            weights.linear(f"{shared}.down_proj"),
            weights.linear(f"{path}.mlp.shared_expert_gate"),
        ),
    )


def _attention(config: ModelConfig, weights: Weights, path: str) -> GatedAttention:
    base = f"{path}.self_attn"
    return GatedAttention(
        config,
        *(weights.linear(f"{base}.{name}_proj") for name in ("q", "k", "v", "o")),
        q_norm=weights.norm(f"{base}.q_norm", config.rms_norm_eps),
        k_norm=weights.norm(f"{base}.k_norm", config.rms_norm_eps),
    )


def _delta_net(config: ModelConfig, weights: Weights, path: str) -> GatedDeltaNet:
    base = f"{path}.linear_attn"
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    return GatedDeltaNet(
        config,
        *(weights.linear(f"{base}.{name}") for name in names),
        conv1d=weights.arrays[f"{base}.conv1d.weight"].astype(weights.dtype),
        A_log=weights.arrays[f"{base}.A_log"],
        dt_bias=weights.arrays[f"{base}.dt_bias"],
        norm=weights.norm(f"{base}.norm", config.rms_norm_eps),
    )
