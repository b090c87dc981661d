"""One layer of the model: its stages, and the order in which they run.

The order stands here, as a generator of (stage name, result). A plain run, a run with
interventions, a step through a token and a traced run all drive the same generator; what they send
back is what the layer goes on with. `native_steps` is the same in two calls to C++, for who wants
to see no stages but those two that it gives; kernels/cpu/block.h has that order, and tests hold
both to the same bits.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.cards import card
from flashmoe_lab.config import check_num_experts_per_tok
from flashmoe_lab.stages.attention import GatedAttention
from flashmoe_lab.stages.delta_net import GatedDeltaNet
from flashmoe_lab.stages.expert_fetch import ExpertFetch, Fetched
from flashmoe_lab.stages.experts import Experts
from flashmoe_lab.stages.linear import Linear
from flashmoe_lab.stages.norm import RMSNorm
from flashmoe_lab.stages.router import Router, Routing
from flashmoe_lab.stages.shared_expert import SharedExpert
from flashmoe_lab.state import AttentionState, LayerState

Steps = Generator[tuple[str, Any], Any, mx.array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A mixer (attention or DeltaNet), then a mixture of experts, each behind a norm and added to
    the stream."""

    index: int
    kind: str
    input_norm: RMSNorm
    mixer: GatedAttention | GatedDeltaNet
    post_norm: RMSNorm
    router: Router
    fetch: ExpertFetch
    experts: Experts
    shared_expert: SharedExpert
    _kept: native.Kept = field(default_factory=native.Kept, init=False, repr=False, compare=False)

    def steps(
        self, x: mx.array, state: LayerState, num_experts_per_tok: int | None = None
    ) -> Steps:
        """Run on x [T, hidden], giving (name, result) after each stage and going on with what is
        sent back.

        The shared expert is submitted before the fetch stage waits, so it computes while experts
        are read.
        """
        normed = yield "input_norm", self.input_norm(x)
        mixed = yield "mixer", self.mixer(normed, state)  # pyright: ignore[reportArgumentType]
        h = x + mixed
        normed = yield "post_norm", self.post_norm(h)
        routing = yield "router", self.router(normed, num_experts_per_tok)
        mx.async_eval(routing.experts)
        shared = yield "shared_expert", self.shared_expert(normed)
        mx.async_eval(shared)
        fetched = yield "fetch", self.fetch(routing)
        routed = yield "experts", self.experts(normed, routing, fetched)
        return h + routed + shared

    def native_steps(
        self, x: mx.array, state: LayerState, num_experts_per_tok: int | None = None
    ) -> Steps:
        """`steps` in two native calls: only router and fetch give their results.

        A state of another type than float32 goes through the stages after all.
        """
        memory = state.keys if isinstance(state, AttentionState) else state.conv
        if memory.dtype != mx.float32:
            return (yield from self._few_steps(x, state, num_experts_per_tok))
        rows, position = native.floats(x), getattr(state, "length", 0)
        tokens = len(rows)
        experts = self.router.gate.out_features
        own_k = self.router.num_experts_per_tok
        k = own_k if num_experts_per_tok is None else num_experts_per_tok
        check_num_experts_per_tok(k, experts)
        stream, normed, shared = (np.empty_like(rows) for _ in range(3))
        logits, weights = (np.empty((tokens, size), np.float32) for size in (experts, k))
        chosen = np.empty((tokens, k), np.int32)
        memory = state.owned(tokens)
        self.native().before(
            rows, tokens, k, position, *memory, stream, normed, shared, logits, chosen, weights
        )
        state.moved(tokens)
        own = Routing(
            logits=mx.array(logits),
            experts=mx.array(chosen),
            weights=mx.array(weights),
            norm_topk_prob=self.router.norm_topk_prob,
        )
        routing = yield "router", own
        fetched = yield "fetch", self.fetch(routing)
        with self.experts.bank.lock:
            whole = routing is own and self._all_there(fetched)
            if whole:
                slots = fetched.placed.slots
                places = np.array([slots[expert] for expert in chosen.ravel().tolist()], np.int64)
                return native.after(
                    self.experts.weights.stacks(),
                    *(normed, stream, shared, places.reshape(tokens, k), weights),
                )
        routed = self.experts(mx.array(normed), routing, fetched)
        return mx.array(stream + native.floats(routed) + shared)

    def _few_steps(self, x: mx.array, state: LayerState, num_experts_per_tok: int | None) -> Steps:
        """`steps` that show what `native_steps` shows."""
        steps, answer = self.steps(x, state, num_experts_per_tok), None
        while True:
            try:
                name, answer = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            if name in ("router", "fetch"):
                answer = yield name, answer

    def _all_there(self, fetched: Fetched) -> bool:
        """Whether nothing of it is still to be read, or has gone."""
        return (
            not fetched.landings and not fetched.later and fetched.fetch.bank.holds(fetched.placed)
        )

    def can_run_native(self, dtype: mx.Dtype) -> bool:
        """Whether `native_steps` does what `steps` would, which a stage of another class may
        not."""
        exactly, mixer = native.exactly, self.mixer
        return (
            kernels.native_for(dtype)
            and (exactly(GatedAttention, mixer) or exactly(GatedDeltaNet, mixer))
            and exactly(RMSNorm, self.input_norm, self.post_norm)
            and exactly(Router, self.router)
            and exactly(Linear, self.router.gate)
            and exactly(Experts, self.experts)
            and exactly(SharedExpert, self.shared_expert)
            and mixer.is_exact()
            and self.shared_expert.is_exact()
            and self.experts.variant in (None, "native")
        )

    def native(self) -> Any:
        """The layer as the native kernels take it."""
        before, after, router = self.input_norm, self.post_norm, self.router
        parts = (
            *(before.weight, before.eps, self.mixer.native(), after.weight, after.eps),
            *(router.gate.native(), router.norm_topk_prob, self.shared_expert.native()),
        )
        return self._kept.get(parts, lambda: native.block(*parts))

    def reference(self, x: np.ndarray, num_experts_per_tok: int | None = None) -> np.ndarray:
        """A whole sequence x [T, hidden] from the empty state, in float64."""
        h = x + self.mixer.reference(self.input_norm.reference(x))
        normed = self.post_norm.reference(h)
        experts, weights = self.router.reference(normed, num_experts_per_tok)
        routed = self.experts.reference(normed, experts, weights, self.fetch.reference)
        return h + routed + self.shared_expert.reference(normed)

    def _repr_html_(self) -> str:
        file = self.fetch.file
        rows = {
            "mixer": type(self.mixer).__name__,
            "experts": f"{file.num_experts}, {self.router.num_experts_per_tok} a token",
            "one expert": f"{file.layout.block_nbytes:,} bytes, {file.layout.label}",
            "file": file.path.name,
        }
        return card(f"Layer {self.index} ({self.kind})", rows)
