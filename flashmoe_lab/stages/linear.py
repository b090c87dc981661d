"""A matrix product, quantised or not: the building block of the stages, not a stage itself."""

from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.checkpoint.quantize import dequantize_reference, from_mlx
from flashmoe_lab.config import Quantization
from flashmoe_lab.stages.part import Part

_REFERENCE_ROWS = 8192  # rows of a matrix that the float64 reference holds at once


class Linear(Part):
    """`y = x @ weight.T`, with `weight` [out, in] in float or in affine groups.

    Args:
        weight: [out, in], or packed codes uint32 [out, in * bits / 32].
        scales, biases: [out, in / group_size], with `quantization`.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        self.weight, self.scales, self.biases = weight, scales, biases
        self.quantization = quantization
        self._kept: tuple[Any, ...] = (None, None, None, None, native.Places(()))

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(part.nbytes for part in self.parts if part is not None)

    def __call__(self, x: mx.array) -> mx.array:
        """x [T, in] -> [T, out], in x's type."""
        if kernels.native_for(x.dtype):
            return native.product(self.native(), x)
        if self.quantization is None:
            return x @ self.weight.T
        if self._is_mistaken_on_cuda(len(x)):
            return x @ self.rows(mx.arange(self.out_features), x.dtype).T
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,  # pyright: ignore[reportArgumentType]
            self.biases,
            transpose=True,
            group_size=self.quantization.group_size,
            bits=self.quantization.bits,
        ).astype(x.dtype)

    def _is_mistaken_on_cuda(self, tokens: int) -> bool:
        """MLX 0.32.4's quantized_matmul gives wrong rows on CUDA for several rows and one group."""
        one_group = self.scales is not None and self.scales.shape[-1] == 1
        return one_group and tokens > 1 and mx.default_device() != mx.cpu

    def rows(self, index: mx.array, dtype: mx.Dtype) -> mx.array:
        """Rows of the dequantised matrix: [T] -> [T, in] in `dtype` (an embedding look-up)."""
        if kernels.native_for(dtype):
            return native.dequantized_rows(self.native(), index)
        if self.quantization is None or self.scales is None or self.biases is None:
            return self.weight[index].astype(dtype)
        return mx.dequantize(
            self.weight[index],
            self.scales[index].astype(dtype),
            self.biases[index].astype(dtype),
            group_size=self.quantization.group_size,
            bits=self.quantization.bits,
        )

    def native(self) -> Any:
        """The matrix as the native kernels take it."""
        kept = self._kept  # asked for some ten times a layer and token, so compared by hand
        if (
            kept[0] is self.weight
            and kept[1] is self.scales
            and kept[2] is self.biases
            and kept[4].same()
        ):
            return kept[3]
        made = native.matrix(self.weight, self.scales, self.biases, self.quantization)
        self._kept = (*self.parts, made, native.Places(self.parts))
        return made

    @property
    def parts(self) -> tuple[mx.array | None, ...]:
        """Weight, scales and biases."""
        return self.weight, self.scales, self.biases

    def weight64(self, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Rows of the dequantised matrix in float64."""
        weight = from_mlx(self.weight).data if self.quantization else None
        if weight is None or self.quantization is None:
            return from_mlx(self.weight).float32()[rows].astype(np.float64)
        assert self.scales is not None and self.biases is not None
        scales, biases = (from_mlx(part).float32()[rows] for part in (self.scales, self.biases))
        return dequantize_reference(weight[rows], scales, biases, self.quantization)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """x [T, in] -> [T, out] in float64, some rows of the matrix at a time."""
        step = _REFERENCE_ROWS
        parts = [
            x @ self.weight64(slice(start, start + step)).T
            for start in range(0, self.out_features, step)
        ]
        return np.concatenate(parts, axis=-1)
