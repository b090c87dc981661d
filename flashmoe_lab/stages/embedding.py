"""The first stage: token ids to vectors."""

import mlx.core as mx
import numpy as np

from flashmoe_lab.stages.linear import Linear


class Embedding:
    """Looks up one row of `table` [vocab, hidden] for each token."""

    def __init__(self, table: Linear, dtype: mx.Dtype) -> None:
        self.table, self.dtype = table, dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        """tokens [T] -> [T, hidden]."""
        return self.table.rows(tokens, self.dtype)

    def reference(self, tokens: np.ndarray) -> np.ndarray:
        """The same in float64."""
        return self.table.weight64(np.asarray(tokens))
