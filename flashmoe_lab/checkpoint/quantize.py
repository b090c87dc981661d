"""Affine group quantisation: packed codes of 2, 3, 4, 5, 6 or 8 bits, in MLX's layout.

`w = code * scale + bias`, one scale and bias for each group of 32, 64 or 128 values of a row. Codes
are packed into uint32 words with the first code in the lowest bits. A scale may be negative (MLX
then takes the group's maximum as bias), so nothing here assumes a sign.

The functions named *_reference are NumPy, written to be read; `quantize` is MLX's own, used for
packing.
"""

import mlx.core as mx
import numpy as np

from flashmoe_lab.checkpoint.tensor_file import Tensor
from flashmoe_lab.config import Quantization

_TO_MLX = {"BF16": mx.bfloat16, "F16": mx.float16}


def quantize(weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    """Quantise a float matrix [out, in] to weight (U32), scales and biases (the type of the input).

    Raises:
        ValueError: the rows are not a whole number of groups, or a weight is not finite.
    """
    _check_groups(weight.shape, quantization)
    parts = mx.quantize(to_mlx(weight), group_size=quantization.group_size, bits=quantization.bits)
    mx.eval(parts)
    names = ("weight", "scales", "biases")
    found = {name: from_mlx(part) for name, part in zip(names, parts, strict=True)}
    if not all(np.isfinite(found[name].float32()).all() for name in ("scales", "biases")):
        raise ValueError("holds NaN or infinite weights, which cannot be quantised")
    return found


def to_mlx(tensor: Tensor) -> mx.array:
    """The tensor as an MLX array of its own type (bfloat16 too)."""
    kind = _TO_MLX.get(tensor.dtype)
    array = mx.array(tensor.data)
    return array.view(mx.bfloat16) if kind is mx.bfloat16 else array


def from_mlx(array: mx.array) -> Tensor:
    """An evaluated MLX array as a tensor in storage type."""
    names = {
        mx.bfloat16: "BF16",
        mx.float16: "F16",
        mx.float32: "F32",
        mx.uint32: "U32",
        mx.uint8: "U8",
    }
    dtype = names[array.dtype]
    return Tensor(dtype=dtype, data=np.array(array.view(mx.uint16) if dtype == "BF16" else array))


def quantize_reference(
    weight: np.ndarray, quantization: Quantization
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (uint8 [out, in]), scales and biases (float64 [out, groups]) by MLX's rule.

    The edge of the group farther from zero becomes the bias, and the scale is adjusted so that zero
    is a whole number of steps away from it.
    """
    _check_groups(weight.shape, quantization)
    rows = weight.shape[0]
    groups = weight.astype(np.float64).reshape(rows, -1, quantization.group_size)
    low, high = groups.min(-1), groups.max(-1)
    step = np.maximum((high - low) / (2**quantization.bits - 1), 1e-7)
    from_low = np.abs(low) > np.abs(high)
    step = np.where(from_low, step, -step)
    edge = np.where(from_low, low, high)
    zero = np.rint(edge / step)
    scales = np.where(zero == 0, step, edge / np.where(zero == 0, 1, zero))
    biases = np.where(zero == 0, 0.0, edge)
    codes = np.rint((groups - biases[..., None]) / scales[..., None])
    top = 2**quantization.bits - 1
    return np.clip(codes, 0, top).astype(np.uint8).reshape(weight.shape), scales, biases


def pack_codes_reference(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes (uint8 [..., n]) into uint32 words [..., n * bits / 32], lowest bits first."""
    planes = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = planes.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    return np.packbits(stream, axis=-1, bitorder="little").view("<u4")


def unpack_codes_reference(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack uint32 words [..., m] into codes (uint8 [..., m * 32 / bits])."""
    stream = np.unpackbits(
        np.ascontiguousarray(words).astype("<u4").view(np.uint8), axis=-1, bitorder="little"
    )
    planes = stream.reshape(*words.shape[:-1], -1, bits)
    return (planes << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def dequantize_reference(
    words: np.ndarray, scales: np.ndarray, biases: np.ndarray, quantization: Quantization
) -> np.ndarray:
    """The float64 matrix [..., in] that packed codes, scales and biases [..., groups] stand for."""
    codes = unpack_codes_reference(words, quantization.bits)
    groups = codes.reshape(*scales.shape, quantization.group_size).astype(np.float64)
    values = groups * scales[..., None].astype(np.float64) + biases[..., None].astype(np.float64)
    return values.reshape(codes.shape)


def _check_groups(shape: tuple[int, ...], quantization: Quantization) -> None:
    if len(shape) != 2 or shape[1] % quantization.group_size:
        raise ValueError(
            f"a matrix {list(shape)} cannot be quantised in groups of {quantization.group_size}: "
            "its rows must be a whole number of groups; choose another --group-size or --bits none"
        )
