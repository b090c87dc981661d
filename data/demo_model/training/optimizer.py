"""Muon for the weight matrices, AdamW for the rest.

Expert tensors are batches of matrices [E, out, in], so one step of Muon treats each expert alone.
"""

# pyright: reportMissingImports=false
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_NOT_MUON = (
    "embed_tokens", "lm_head", "conv1d", "mlp.gate.weight", "shared_expert_gate", "in_proj_a",
    "in_proj_b",
)  # fmt: skip


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by five Newton-Schulz steps."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.02
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; `closure` is not used. Every weight has a gradient, and those of one shape go
        through it together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                shapes.setdefault(weight.shape, []).append(weight)
            for weights in shapes.values():
                self._step(weights, group)

    def _step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients = torch.stack([weight.grad for weight in weights])  # pyright: ignore
        state = self.state[weights[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        average = state["momentum"].lerp_(gradients, 1 - group["momentum"])
        updates = orthogonal(gradients.lerp(average, group["momentum"]))
        scale = max(1.0, gradients.size(-2) / gradients.size(-1)) ** 0.5
        torch._foreach_mul_(weights, 1 - group["lr"] * group["decay"])
        parts = updates.to(weights[0].dtype).unbind(0)
        torch._foreach_add_(weights, parts, alpha=-group["lr"] * scale)


def orthogonal(update: Tensor) -> Tensor:
    """Roughly the nearest matrix with singular values of one, for each matrix of a batch."""
    x = update.bfloat16() if update.is_cuda else update.clone()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        m = x @ x.mT
        x = 3.4445 * x + (-4.7750 * m + 2.0315 * m @ m) @ x
    return x.mT if tall else x


def make_optimizers(
    model: torch.nn.Module, lr: float, muon_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Both optimisers; every group keeps its first rate as `base`, for the schedule."""
    matrices, decayed, plain = [], [], []
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and not any(part in name for part in _NOT_MUON):
            matrices.append(weight)
        elif weight.ndim >= 2 and "conv1d" not in name:
            decayed.append(weight)
        else:
            plain.append(weight)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-9, fused=fused)
    optimizers = [adam, Muon(matrices, lr=muon_lr)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return optimizers
