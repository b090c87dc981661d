"""One layer of the model: its stages, and the order in which they run.

The order stands here, as a generator of (stage name, result). A plain run, a run with
interventions, a step through a token and a traced run all drive the same generator; what they send
back is what the layer goes on with. `native_steps` is the same in two calls to C++
(native_layer.py) for who wants to see no stages but those two that it gives, and `token` for who
wants to see none.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.cards import card
from flashmoe_lab.native_layer import NativeLayer
from flashmoe_lab.stages.attention import GatedAttention
from flashmoe_lab.stages.delta_net import GatedDeltaNet
from flashmoe_lab.stages.expert_fetch import ExpertFetch
from flashmoe_lab.stages.experts import Experts
from flashmoe_lab.stages.norm import RMSNorm
from flashmoe_lab.stages.router import Router
from flashmoe_lab.stages.shared_expert import SharedExpert
from flashmoe_lab.state import LayerState
from flashmoe_lab.token_memory import TokenMemory
from flashmoe_lab.units import format_nbytes

Steps = Generator[tuple[str, Any], Any, mx.array]


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
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
    native: NativeLayer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "native", NativeLayer(self))

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
        self,
        x: mx.array,
        state: LayerState,
        num_experts_per_tok: int | None = None,
        is_final: bool = False,
    ) -> Steps:
        """`steps` in two native calls: only router and fetch give their results. `is_final` says
        that nobody will send another routing back.

        A state of another type than float32 goes through the stages after all.
        """
        if self.native.takes(state):
            return (yield from self.native.steps(x, state, num_experts_per_tok, is_final))
        steps, answer = self.steps(x, state, num_experts_per_tok), None
        while True:
            try:
                name, answer = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            if name in ("router", "fetch"):
                answer = yield name, answer

    def token(
        self, memory: TokenMemory, state: LayerState, following: "Layer | None" = None
    ) -> None:
        """The same of one token, from `memory.x` to `memory.x`, and nothing is shown. What the
        `following` layer is likely to ask for is read meanwhile."""
        self.native.token(memory, state, following)

    def reference(self, x: np.ndarray, num_experts_per_tok: int | None = None) -> np.ndarray:
        """A whole sequence x [T, hidden] from the empty state, in float64."""
        h = x + self.mixer.reference(self.input_norm.reference(x))
        normed = self.post_norm.reference(h)
        experts, weights = self.router.reference(normed, num_experts_per_tok)
        routed = self.experts.reference(normed, experts, weights, self.fetch.reference)
        return h + routed + self.shared_expert.reference(normed)

    def _repr_html_(self) -> str:
        file, bank, k = self.fetch.file, self.fetch.bank, self.router.num_experts_per_tok
        stages = (self.input_norm, self.mixer, self.post_norm, self.router, self.shared_expert)
        resident = sum(array.nbytes for stage in stages for array in stage.arrays())
        with bank.lock:
            held = sum(layer == self.index for layer, _ in bank.contents())
        block, experts = file.layout.block_nbytes, file.num_experts
        rows = {
            "mixer": type(self.mixer).__name__,
            "experts": f"{experts}, {k} a token",
            "one expert": f"{block:,} bytes, {file.layout.label}",
            "resident": format_nbytes(resident),
            "on disk": f"{format_nbytes(experts * block)} of experts in {file.path.name}",
            "in the bank": f"{held} of {experts} experts",
            "a token": f"works with {format_nbytes(resident + k * block)}, "
            f"of which it reads at most {format_nbytes(k * block)}",
        }
        return card(f"Layer {self.index} ({self.kind})", rows)
