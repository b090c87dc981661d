"""RMS normalisation: `x / rms(x) * weight`, with the weight as MLX stores it (the one already
added)."""

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.checkpoint.quantize import from_mlx
from flashmoe_lab.stages.part import Part


class RMSNorm(Part):
    """Root-mean-square norm over the last axis.

    Args:
        weight: [D].
        eps: added to the mean square.
    """

    def __init__(self, weight: mx.array, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., D] -> [..., D] in x's type; the mean is taken in float32."""
        if kernels.native_for(x.dtype):
            return native.rms_norm(x, self.weight, self.eps)
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """The same in float64."""
        mean = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.eps) * from_mlx(self.weight).float32().astype(np.float64)
