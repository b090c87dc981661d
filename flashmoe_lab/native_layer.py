"""NativeLayer: a layer as two native calls, up to the router and the shared expert, and from the
experts on.

kernels/cpu/block.h has the order of what they do, layer.py the stages'; tests hold both to the same
bits. What the calls need is made of the layer's parts once, and again when one has changed.
"""

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any
from weakref import proxy

import mlx.core as mx
import numpy as np

from flashmoe_lab import native
from flashmoe_lab.config import check_num_experts_per_tok
from flashmoe_lab.stages.attention import GatedAttention
from flashmoe_lab.stages.delta_net import GatedDeltaNet
from flashmoe_lab.stages.expert_fetch import ExpertFetch, Fetched
from flashmoe_lab.stages.expert_landing import Landing
from flashmoe_lab.stages.experts import Experts
from flashmoe_lab.stages.linear import Linear
from flashmoe_lab.stages.norm import RMSNorm
from flashmoe_lab.stages.part import Part
from flashmoe_lab.stages.router import Router, Routing
from flashmoe_lab.stages.shared_expert import SharedExpert
from flashmoe_lab.state import AttentionState, LayerState
from flashmoe_lab.token_memory import TokenMemory

if TYPE_CHECKING:
    from flashmoe_lab.layer import Layer, Steps

# Tokens: few, since nothing is read meanwhile, but enough to name plenty to read.
_FIRST_PART = 32


class NativeLayer:
    """What runs a layer natively."""

    def __init__(self, layer: "Layer") -> None:
        # Each holds the other: the bank's memory would wait for Python's collector.
        self._layer: Layer = proxy(layer)
        self._changes = -1
        self._places = native.Places(())
        self._held: tuple[Any, ...] = ()
        self._block: Any = None
        self._stacks: tuple[Any, ...] = ()

    def is_exact(self) -> bool:
        """Whether this does what the stages would, which one of another class may not."""
        layer, exactly = self._layer, native.exactly
        mixer = layer.mixer
        return (
            (exactly(GatedAttention, mixer) or exactly(GatedDeltaNet, mixer))
            and exactly(RMSNorm, layer.input_norm, layer.post_norm)
            and exactly(Router, layer.router)
            and exactly(Linear, layer.router.gate)
            and exactly(ExpertFetch, layer.fetch)
            and exactly(Experts, layer.experts)
            and exactly(SharedExpert, layer.shared_expert)
            and mixer.is_exact()
            and layer.shared_expert.is_exact()
            and layer.experts.variant in (None, "native")
        )

    def takes(self, state: LayerState) -> bool:
        """Whether a state is of the type that the kernels write."""
        memory = state.keys if isinstance(state, AttentionState) else state.conv
        return memory.dtype == mx.float32

    def _refresh(self) -> None:
        """Make what the calls need again if a part of the layer was set or written since."""
        if self._changes == Part.changes and self._places.same():
            return
        self._changes = -1  # making may fail
        layer, changes = self._layer, Part.changes
        before, after, router = layer.input_norm, layer.post_norm, layer.router
        self._block = native.block(
            *(before.weight, before.eps, layer.mixer.native(), after.weight, after.eps),
            *(router.gate.native(), router.norm_topk_prob, layer.shared_expert.native()),
        )
        self._stacks = layer.experts.weights.stacks()
        stages = (before, layer.mixer, after, router, layer.shared_expert)
        arrays = [array for stage in stages for array in stage.arrays()]
        arrays += layer.experts.weights.components.values()
        self._places = native.Places(tuple(arrays))
        self._held = (*arrays, *map(native.alias, arrays))  # as Places wants it
        self._changes = changes

    def token(
        self, memory: TokenMemory, state: LayerState, following: "Layer | None" = None
    ) -> None:
        """One token, from `memory.x` to `memory.x`; begins to read what the `following` layer is
        likely to ask for."""
        layer, row = self._layer, memory.rows[self._layer.index]
        index, bank = layer.index, layer.fetch.bank
        self._refresh()
        self._block.before(
            *(memory.x, 1, memory.num_experts_per_tok, getattr(state, "length", 0)),
            *(*state.owned(1), memory.stream, memory.normed, memory.shared, *row),
        )
        state.moved(1)
        experts = row[1].tolist()[0]
        with bank.lock:  # from the look-up to the end of what reads the slots
            early = memory.ahead.pop(index, ())
            slots = None if early else bank.find(index, experts)
            if slots is None:
                slots = self._read(memory, experts, early, following)
            elif following is not None:
                self._look_ahead(memory, experts, following)
            if slots is not None:
                memory.slots[0] = slots
                native.after(
                    *(self._stacks, memory.normed, memory.stream, memory.shared),
                    *(memory.slots, row[2], memory.x, row[3]),
                )

    def _begun(self, before: Callable[[slice], None], chosen: np.ndarray) -> Fetched:
        """What a chunk fetches; `before` computes a part of it up to `chosen`."""
        fetch, early = self._layer.fetch, list[Landing]()
        with fetch.bank.lock:
            fetch.bank.settle()
            for part in _parts(len(chosen)):
                before(part)
                if part.stop < len(chosen):
                    early += fetch.begin(chosen[part])
            return fetch.of(chosen, early)

    def _look_ahead(self, memory: TokenMemory, experts: Sequence[int], following: "Layer") -> None:
        """Begin to read what the next layer's router would choose if neither this layer's routed
        experts, which are still to be computed, nor the next mixer added anything."""
        fetch, k = following.fetch, memory.num_experts_per_tok
        if not fetch.bank.may_place_ahead(following.index, k):
            return
        memory.parts.looked_ns[self._layer.index] = perf_counter_ns()
        normed = following.post_norm(mx.array(memory.stream + memory.shared))
        likely = np.array(following.router(normed, k).experts)[0].tolist()
        missing = fetch.missing(likely)[: fetch.prefetch]
        if missing:
            busy = {(self._layer.index, expert) for expert in experts}
            cached = memory.ask(following.index, missing)
            memory.ahead[following.index] = fetch.begin_ahead(missing, busy, cached)

    def _read(
        self,
        memory: TokenMemory,
        experts: Sequence[int],
        early: Sequence[Landing],
        following: "Layer | None",
    ) -> list[int] | None:
        """Bring what the bank does not hold, and give all slots; None if the experts were computed
        with as they came."""
        layer, (_, _, weights, moments) = self._layer, memory.rows[self._layer.index]
        cached = memory.ask(layer.index, experts)
        if type(cached) is dict:  # that took a while
            moments[1] = perf_counter_ns()
        fetched = layer.fetch.of(np.array([experts]), early)
        if memory.reads is not None:
            memory.reads.append((layer.index, fetched, cached))
        if following is not None:
            self._look_ahead(memory, experts, following)
        if fetched.has_ended:
            slots = fetched.first.slots
            return [slots[expert] for expert in experts]
        moments[2] = perf_counter_ns()
        routed = layer.experts.native(memory.normed, weights, fetched)
        np.add(np.add(memory.stream, routed, out=memory.x), memory.shared, out=memory.x)
        moments[3] = perf_counter_ns()
        return None

    def steps(
        self, x: mx.array, state: LayerState, num_experts_per_tok: int | None, is_final: bool
    ) -> "Steps":
        """`Layer.steps` for any number of tokens, of which router and fetch alone are shown.

        Where what the router says `is_final`, a long chunk goes up to the router in parts, and each
        one's experts are read while the next is computed.
        """
        layer = self._layer
        rows = native.floats(x)
        tokens, experts = len(rows), layer.router.gate.out_features
        own_k = layer.router.num_experts_per_tok
        k = own_k if num_experts_per_tok is None else num_experts_per_tok
        check_num_experts_per_tok(k, experts)
        stream, normed, shared = (np.empty_like(rows) for _ in range(3))
        logits, weights = (np.empty((tokens, size), np.float32) for size in (experts, k))
        chosen = np.empty((tokens, k), np.int32)
        self._refresh()

        def before(part: slice) -> None:
            count, position = part.stop - part.start, getattr(state, "length", 0)
            out = (array[part] for array in (stream, normed, shared, logits, chosen, weights))
            self._block.before(rows[part], count, k, position, *state.owned(count), *out)
            state.moved(count)

        begun: Fetched | None = None
        if is_final and tokens > _FIRST_PART and layer.fetch.begins_early:
            begun = self._begun(before, chosen)
        else:
            before(slice(0, tokens))
        own = Routing(
            logits=mx.array(logits),
            experts=mx.array(chosen),
            weights=mx.array(weights),
            norm_topk_prob=layer.router.norm_topk_prob,
        )
        routing = yield "router", own
        fetched = yield "fetch", begun or layer.fetch(routing)
        with layer.fetch.bank.lock:
            is_own = routing is own and np.array_equal(fetched.experts, chosen)
            if is_own and fetched.is_there:
                slots = fetched.placed.slots
                places = np.array([slots[expert] for expert in chosen.ravel().tolist()], np.int64)
                out = np.empty_like(stream)
                places = places.reshape(tokens, k)
                native.after(self._stacks, normed, stream, shared, places, weights, out)
                return mx.array(out)
        routed = layer.experts(mx.array(normed), routing, fetched)
        return mx.array(stream + native.floats(routed) + shared)


def _parts(tokens: int) -> Iterator[slice]:
    """Each twice as long as the one before, which has named enough to be read meanwhile."""
    start, size = 0, _FIRST_PART
    while tokens - start > 2 * size:
        yield slice(start, start + size)
        start, size = start + size, 2 * size
    yield slice(start, tokens)
