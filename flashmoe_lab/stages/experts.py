"""The routed experts: each token through its K experts, summed with the router's weights.

The sum runs over the experts in the router's order, whatever slots they lie in and however many
waves brought them, so a token's result does not depend on the bank.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.stages.part import Part
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.storage.bank import ExpertBank


class Experts(Part):
    """The experts of one layer, in the slots where the fetch stage has put them.

    Args:
        variant: implementation of `kernels.expert_mlp`; None lets it choose.
    """

    def __init__(self, layer: int, bank: ExpertBank, variant: str | None = None) -> None:
        self.layer, self.bank, self.variant = layer, bank, variant
        pool = bank.pool(layer)
        self.weights = kernels.ExpertWeights(
            components=pool.components, quantization=pool.layout.quantization
        )

    def __call__(self, x: mx.array, routing: Routing, fetched: Fetched) -> mx.array:
        """x [T, hidden] -> [T, hidden] in x's type.

        Raises:
            ValueError: the experts were given up since they were fetched, or another routing's
                were.
        """
        experts = fetched.experts.ravel()
        k = fetched.experts.shape[1]
        if routing.experts.shape != fetched.experts.shape:
            raise ValueError(
                f"layer {self.layer}: routing is {list(routing.experts.shape)}, "
                f"what was fetched {list(fetched.experts.shape)}"
            )
        if not np.array_equal(np.array(routing.experts), fetched.experts):
            raise ValueError(f"layer {self.layer}: these experts were fetched for another routing")
        if self.variant in (None, "native") and kernels.native_for(x.dtype):
            weights = native.floats(routing.weights)
            return mx.array(self.native(native.floats(x), weights, fetched))
        outs: list[mx.array] = []
        order: list[np.ndarray] = []
        with self.bank.lock:  # from the check that the slots are still theirs to the submission
            for placement in fetched.waves():
                pairs, slots = _pairs(experts, placement.slots)
                out = kernels.expert_mlp(x, pairs // k, slots, self.weights, self.variant)
                self.bank.in_use(out)
                outs.append(out)
                order.append(pairs)
        together = outs[0] if len(outs) == 1 else mx.concatenate(outs)
        inverse = np.argsort(np.concatenate(order))
        by_rank = together[mx.array(inverse)].reshape(*fetched.experts.shape, x.shape[-1])
        return (by_rank * routing.weights[..., None]).sum(axis=1).astype(x.dtype)

    def native(self, rows: np.ndarray, weights: np.ndarray, fetched: Fetched) -> np.ndarray:
        """The same in C++, of rows and weights float32; done when it returns, so the bank has
        nothing to wait for."""
        experts = fetched.experts.ravel()
        k = fetched.experts.shape[1]
        by_rank = np.empty((len(experts), rows.shape[-1]), np.float32)
        with self.bank.lock:
            for placement in fetched.waves():
                pairs, slots = _pairs(experts, placement.slots)
                # Every row that goes in is prepared, and an expert that came alone has few.
                tokens, index = np.unique(pairs // k, return_inverse=True)
                some = rows if len(tokens) == len(rows) else rows[tokens]
                by_rank[pairs] = native.expert_mlp(self.weights.stacks(), some, index, slots)
        return native.weighted_sum(by_rank, weights)

    def reference(
        self,
        x: np.ndarray,
        experts: np.ndarray,
        weights: np.ndarray,
        matrices: Callable[[int], dict[str, np.ndarray]],
    ) -> np.ndarray:
        """x, experts, weights [T, K] in float64 -> [T, hidden]; `matrices` gives an expert's by
        number."""
        out = np.zeros_like(x)
        for expert in np.unique(experts):
            tokens, ranks = np.nonzero(experts == expert)
            product = kernels.expert_mlp_reference(x[tokens], matrices(int(expert)))
            out[tokens] += weights[tokens, ranks, None] * product
        return out


def _pairs(experts: np.ndarray, slots: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the pairs whose expert is in `slots`, and their slots, both in the order of
    slots."""
    held = np.fromiter(slots, int, len(slots))
    table = np.full(int(max(experts.max(), held.max())) + 1, -1)
    table[held] = np.fromiter(slots.values(), int, len(slots))
    found = table[experts]
    pairs = np.flatnonzero(found >= 0)
    pairs = pairs[np.argsort(found[pairs], kind="stable")]
    return pairs, found[pairs]
