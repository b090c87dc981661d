"""The shared expert: a SwiGLU that every token goes through, scaled by a gate of its own."""

from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.stages.activation import sigmoid64, silu, silu64
from flashmoe_lab.stages.linear import Linear
from flashmoe_lab.stages.part import Part


class SharedExpert(Part):
    """`sigmoid(x @ gate.T) * down(silu(gate_proj(x)) * up_proj(x))`."""

    def __init__(
        self, gate_proj: Linear, up_proj: Linear, down_proj: Linear, shared_expert_gate: Linear
    ) -> None:
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.shared_expert_gate = shared_expert_gate
        self._kept = native.Kept()

    def __call__(self, x: mx.array) -> mx.array:
        """x [T, hidden] -> [T, hidden]."""
        if kernels.native_for(x.dtype) and self.is_exact():
            return native.call(self.native(), x)
        y = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return mx.sigmoid(self.shared_expert_gate(x)) * y

    def is_exact(self) -> bool:
        """Whether the native kernels do what the parts would: a part of another class may not."""
        return native.exactly(
            Linear, self.gate_proj, self.up_proj, self.down_proj, self.shared_expert_gate
        )

    def native(self) -> Any:
        """The stage as the native kernels take it."""
        matrices = (
            self.gate_proj.native(),
            self.up_proj.native(),
            self.down_proj.native(),
            self.shared_expert_gate.native(),
        )
        return self._kept.get(matrices, lambda: native.shared_expert(*matrices))

    def reference(self, x: np.ndarray) -> np.ndarray:
        """The same in float64."""
        hidden = silu64(self.gate_proj.reference(x)) * self.up_proj.reference(x)
        gate = sigmoid64(self.shared_expert_gate.reference(x))
        return gate * self.down_proj.reference(hidden)
