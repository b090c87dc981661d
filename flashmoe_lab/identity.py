"""What tells one way of computing a sequence's state from another: states go on only as they
began."""

import mlx.core as mx

from flashmoe_lab import kernels, native
from flashmoe_lab.checkpoint.packed import PackedCheckpoint


def state_identity(checkpoint: PackedCheckpoint, dtype: mx.Dtype, num_experts_per_tok: int) -> str:
    """One line with everything that a state's numbers depend on, but for interventions."""
    used = kernels.used() if mx.default_device() == mx.cpu else str(mx.default_device())
    isa = f" {native.isa()}" if used.startswith("native") else ""
    return (
        f"checkpoint {checkpoint.identity}, experts {checkpoint.label}, K={num_experts_per_tok}, "
        f"{str(dtype).removeprefix('mlx.core.')}, {used}{isa}"
    )
