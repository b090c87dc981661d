"""The last stage: a vector to one logit for each token of the vocabulary."""

import mlx.core as mx
import numpy as np

from flashmoe_lab.stages.linear import Linear


class LMHead:
    """`logits = x @ weight.T`; the final norm is a stage of its own."""

    def __init__(self, weight: Linear) -> None:
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        """x [T, hidden] -> float32 [T, vocab]."""
        return self.weight(x).astype(mx.float32)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """The same in float64."""
        return self.weight.reference(x)
