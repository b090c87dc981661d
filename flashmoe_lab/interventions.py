"""Ready-made acts for `engine.intercept`: what a stage's result is replaced by.

    with engine.intercept("layers.3.router", force([17])):
        run = engine.stream_generate(prompt, trace="flow", record=["lm_head.logits"])

`fl.compare` says what an act cost and saved. Acts on the router take and give a `Routing`; whatever
they choose is what is read, run and recorded. `ban` is the router's own (stages/router.py).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
import numpy as np

from flashmoe_lab.model import Model
from flashmoe_lab.stages.router import Routing, ban
from flashmoe_lab.state import DeltaState

__all__ = ["ban", "by_mass", "edit_state", "force", "num_experts", "substitute"]

RouterAct = Callable[[Routing, str], Routing]


def force(experts: Collection[int]) -> RouterAct:
    """These experts are always among the K: they take the places of the least probable others.

    Weights are the router's, divided by the sum over those that now run. A token that chose them
    anyway is left bitwise as it was.
    """
    wanted = list(dict.fromkeys(experts))

    def act(routing: Routing, path: str) -> Routing:
        _check(wanted, routing, path)
        if len(wanted) > routing.num_experts_per_tok:
            raise ValueError(
                f"{path}: {len(wanted)} experts forced, K is {routing.experts.shape[1]}"
            )
        before = np.array(routing.experts)
        chosen = np.stack([_forced(row, wanted) for row in before])
        return _with_experts(routing, chosen, (chosen != before).any(-1))

    return act


def substitute(instead: Mapping[int, int]) -> RouterAct:
    """Another expert runs in the place, and with the weight, of each named one: `{17: 4}`."""

    def act(routing: Routing, path: str) -> Routing:
        _check([*instead, *instead.values()], routing, path)
        table = np.arange(routing.logits.shape[-1])
        table[list(instead)] = list(instead.values())
        experts = mx.array(table[np.array(routing.experts)].astype(np.int32))
        return replace(routing, experts=experts)

    return act


def num_experts(value: int) -> RouterAct:
    """Another K, for the layers that are intercepted: fewer, or more, than the run's."""
    return lambda routing, path: routing.with_num_experts_per_tok(value)


def by_mass(share: float) -> RouterAct:
    """Only as many of a token's K experts as together hold this share of their weight.

    In a chunk of a prompt tokens keep different numbers; the places left over then repeat the first
    expert with weight 0, which costs no read.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1")

    def act(routing: Routing, path: str) -> Routing:
        experts, weights = np.array(routing.experts), np.array(routing.weights, np.float32)
        held = np.cumsum(weights, -1) / weights.sum(-1, keepdims=True)
        count = (held < share - 1e-6).sum(-1) + 1  # the expert that crosses it still belongs to it
        width = int(count.max())
        experts, weights = experts[:, :width].copy(), weights[:, :width].copy()
        dropped = np.arange(width) >= count[:, None]
        weights[dropped] = 0
        experts[dropped] = np.repeat(experts[:, :1], width, 1)[dropped]
        if routing.norm_topk_prob:
            weights /= weights.sum(-1, keepdims=True)
        return replace(routing, experts=mx.array(experts), weights=mx.array(weights))

    return act


@contextmanager
def edit_state(model: Model, layer: int, fn: Callable[[mx.array], mx.array]) -> Iterator[None]:
    """Within the `with`, give a DeltaNet layer's matrices [Hv, Dv, Dk] to fn after every pass, and
    go on with what it returns: `edit_state(engine.model, 0, lambda s: 0 * s)` forgets all.

    Raises:
        ValueError: the layer is not a DeltaNet, or fn gives another shape.
    """
    kinds = model.config.layer_types
    if not 0 <= layer < len(kinds) or kinds[layer] != "linear_attention":
        raise ValueError(f"layer {layer} has no recurrent state; only linear_attention layers have")

    def act(result: mx.array, path: str) -> None:
        assert model.state is not None
        state = model.state[layer]
        assert isinstance(state, DeltaState)
        before = mx.array(state.recurrent)
        after = fn(before)
        if after.shape != before.shape:
            raise ValueError(f"{path}: the state is {before.shape}, fn gave {after.shape}")
        state.recurrent = after.astype(mx.float32)

    with model.intercept(f"layers.{layer}.mixer", act):
        yield


def _forced(row: np.ndarray, wanted: list[int]) -> np.ndarray:
    missing = [expert for expert in wanted if expert not in row]
    kept = list(row)
    for _ in missing:  # the last one that nobody wants goes
        kept.remove(next(expert for expert in reversed(kept) if expert not in wanted))
    return np.array(kept + missing, np.int32)


def _with_experts(routing: Routing, chosen: np.ndarray, changed: np.ndarray) -> Routing:
    """The routing to `chosen` [T, K] where `changed` [T], the most probable first, with the
    router's weights."""
    if not changed.any():
        return routing
    probabilities = np.array(routing.probabilities)[changed]
    order = np.argsort(-np.take_along_axis(probabilities, chosen[changed], -1), -1, kind="stable")
    experts, weights = np.array(routing.experts), np.array(routing.weights)
    experts[changed] = np.take_along_axis(chosen[changed], order, -1)
    rows = np.take_along_axis(probabilities, experts[changed], -1)
    weights[changed] = rows / rows.sum(-1, keepdims=True) if routing.norm_topk_prob else rows
    return replace(routing, experts=mx.array(experts), weights=mx.array(weights))


def _check(experts: Collection[int], routing: Routing, path: str) -> None:
    count = routing.logits.shape[-1]
    for expert in experts:
        if not 0 <= expert < count:
            raise ValueError(f"{path}: there is no expert {expert}; experts are 0 to {count - 1}")
