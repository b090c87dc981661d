"""The router: which experts a token goes to, and with what weights.

`p = softmax(x @ gate.T)` over all experts, the K largest are taken, and their weights are divided
by their sum, whatever K is. There is no bias, no grouping and no scaling factor in this family.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.cards import card
from flashmoe_lab.config import check_num_experts_per_tok
from flashmoe_lab.stages.linear import Linear
from flashmoe_lab.stages.part import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What the router decided for T tokens.

    Attributes:
        logits: float32 [T, E].
        experts: int32 [T, K], the most probable first.
        weights: float32 [T, K]; over the K they sum to 1 (unless the model's norm_topk_prob is
            false).
        norm_topk_prob: whether the weights are divided by their sum.
    """

    logits: mx.array
    experts: mx.array
    weights: mx.array
    norm_topk_prob: bool = True

    @classmethod
    def of_all(cls, num_experts: int) -> "Routing":
        """A token that goes to every expert alike."""
        return route(mx.zeros((1, num_experts)), num_experts)

    @property
    def num_experts_per_tok(self) -> int:
        """K of this routing."""
        return self.experts.shape[1]

    @property
    def probabilities(self) -> mx.array:
        """Softmax over all experts, float32 [T, E]."""
        return mx.softmax(self.logits, axis=-1, precise=True)

    def with_num_experts_per_tok(self, value: int) -> "Routing":
        """The routing of the same logits with another K."""
        return route(self.logits, value, self.norm_topk_prob)

    def without(self, experts: Collection[int]) -> "Routing":
        """The routing that follows when some experts cannot be chosen.

        Raises:
            ValueError: fewer than K experts are left, or one does not exist.
        """
        count, k = self.logits.shape[-1], self.num_experts_per_tok
        wrong = [expert for expert in experts if not 0 <= expert < count]
        if wrong:
            raise ValueError(f"expert {wrong[0]} cannot be banned; experts are 0 to {count - 1}")
        if count - len(set(experts)) < k:
            raise ValueError(
                f"{len(set(experts))} of {count} experts are banned; K = {k} of them must be left"
            )
        banned = np.zeros(count, bool)
        banned[list(experts)] = True
        logits = mx.where(mx.array(banned), -mx.inf, self.logits)
        return replace(route(logits, k, self.norm_topk_prob), logits=self.logits)

    def _repr_html_(self) -> str:
        experts, weights = np.array(self.experts), np.array(self.weights)
        rows = {
            f"token {t}": ", ".join(
                f"{e} ({w:.3f})" for e, w in zip(experts[t], weights[t], strict=True)
            )
            for t in range(min(len(experts), 8))
        }
        title = f"Routing: {len(experts)} tokens, K = {self.num_experts_per_tok}"
        return card(title + f" of {self.logits.shape[-1]} experts (weight)", rows)


class Router(Part):
    """Scores every expert and keeps the best K.

    Args:
        gate: the matrix [E, hidden].
        num_experts_per_tok: K when a call names none: the model's own.
    """

    def __init__(self, gate: Linear, num_experts_per_tok: int, norm_topk_prob: bool = True) -> None:
        self.gate, self.norm_topk_prob = gate, norm_topk_prob
        self.num_experts_per_tok = num_experts_per_tok

    def __call__(self, x: mx.array, num_experts_per_tok: int | None = None) -> Routing:
        """x [T, hidden] -> Routing; K is the model's own unless given.

        Raises:
            ValueError: K is not between 1 and the number of experts.
        """
        k = self.num_experts_per_tok if num_experts_per_tok is None else num_experts_per_tok
        return route(self.gate(x).astype(mx.float32), k, self.norm_topk_prob)

    def reference(
        self, x: np.ndarray, num_experts_per_tok: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Experts int64 [T, K] and weights float64 [T, K]."""
        k = self.num_experts_per_tok if num_experts_per_tok is None else num_experts_per_tok
        logits = self.gate.reference(x)
        check_num_experts_per_tok(k, logits.shape[-1])
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        experts = np.argsort(-p, axis=-1, kind="stable")[:, :k]
        weights = np.take_along_axis(p, experts, -1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdims=True)
        return experts, weights


def route(logits: mx.array, num_experts_per_tok: int, norm_topk_prob: bool = True) -> Routing:
    """The routing that follows from logits float32 [T, E]; ValueError if K is out of range."""
    k = check_num_experts_per_tok(num_experts_per_tok, logits.shape[-1])
    if kernels.native_for(logits.dtype):
        experts, weights = native.route(logits, k, norm_topk_prob)
        return Routing(
            logits=logits, experts=experts, weights=weights, norm_topk_prob=norm_topk_prob
        )
    p = mx.softmax(logits, axis=-1, precise=True)
    # By logits: where probabilities underflow to 0 they would tie with banned experts.
    order = mx.argsort(-logits, axis=-1)
    weights = mx.take_along_axis(p, order, axis=-1)[:, :k]
    if norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Routing(
        logits=logits,
        experts=order[:, :k].astype(mx.int32),
        weights=weights,
        norm_topk_prob=norm_topk_prob,
    )


def ban(experts: Collection[int]) -> Callable[[Routing, str], Routing]:
    """For `intercept("layers.*.router", ban([17]))`: these experts are never chosen, nor read."""
    return lambda routing, path: routing.without(experts)
