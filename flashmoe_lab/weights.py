"""Resident weights of a packed checkpoint, made into the parts that stages are built of.

Types follow the backend: on a CPU activations are float32, and so is every weight that is not
quantised (MLX's half-precision products are slow and inexact there); quantised matrices stay as
stored. On a GPU activations are bfloat16 unless asked otherwise.
"""

import mlx.core as mx

from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.config import is_matrix
from flashmoe_lab.stages.linear import Linear
from flashmoe_lab.stages.norm import RMSNorm

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def activation_dtype(name: str | None) -> mx.Dtype:
    """The type of activations: by name, or by default float32 on a CPU and bfloat16 on a GPU."""
    if name is None:
        return mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; known are {', '.join(DTYPES)}")
    return DTYPES[name]


class Weights:
    """Everything that stays in memory, by canonical name.

    Args:
        checkpoint: read whole, here, in the calling thread.
        dtype: of activations and of unquantised matrices.
    """

    def __init__(self, checkpoint: PackedCheckpoint, dtype: mx.Dtype) -> None:
        self.dtype, self._checkpoint = dtype, checkpoint
        self.arrays: dict[str, mx.array] = {}
        for file in checkpoint.manifest.resident_files:
            loaded: dict[str, mx.array] = mx.load(str(checkpoint.path / file))  # pyright: ignore
            self.arrays.update(loaded)
            del loaded  # would keep what is converted below
        for name, array in self.arrays.items():
            base = name.removesuffix(".weight")
            quantized = base in checkpoint.manifest.resident_quantization
            if is_matrix(name) and not quantized:
                self.arrays[name] = array.astype(dtype)
        mx.eval(self.arrays)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(array.nbytes for array in self.arrays.values())

    def linear(self, path: str) -> Linear:
        """The matrix of a module."""
        return Linear(
            self.arrays[f"{path}.weight"],
            self.arrays.get(f"{path}.scales"),
            self.arrays.get(f"{path}.biases"),
            self._checkpoint.manifest.resident_quantization.get(path),
        )

    def norm(self, path: str, eps: float) -> RMSNorm:
        """The norm of a module; its weight is kept in float32."""
        weight = self.arrays[f"{path}.weight"].astype(mx.float32)
        mx.eval(weight)  # a stage may be called in another thread than this one
        return RMSNorm(weight, eps)
