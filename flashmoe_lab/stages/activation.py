"""The elementwise functions that several stages share, in MLX and in NumPy."""

import mlx.core as mx
import numpy as np


def silu(x: mx.array) -> mx.array:
    """`x * sigmoid(x)`. MLX's own is compiled, which on a Linux CPU wants a C++ compiler at run
    time."""
    return x * mx.sigmoid(x)


def sigmoid64(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in float64, without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def silu64(x: np.ndarray) -> np.ndarray:
    """`x * sigmoid(x)` in float64."""
    return x * sigmoid64(x)
