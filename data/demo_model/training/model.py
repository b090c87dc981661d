"""The model that is trained: its first weights, its losses, and what its routers choose."""

# pyright: reportMissingImports=false
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as qwen
from tokenizers import Tokenizer
from torch import Tensor

from .batches import Batch
from .fast_parts import expert_counts
from .geometry import make_config
from .mixture import PARTS
from .prompts import read
from .shards import MASK, pack


class Router:
    """Catches the router's output of every layer, for the balance loss and for counts."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        for module in model.modules():
            if isinstance(module, qwen.Qwen3_5MoeTopKRouter):
                module.register_forward_hook(lambda _, __, out: self.seen.append((out[0], out[2])))

    def losses(self, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Balance and z loss, means over layers, and each layer's load [L, E].

        transformers' own loss adds the layers up before it multiplies, so that single layers may
        collapse; this one multiplies within each layer.
        """
        balance, z, loads = [], [], []
        for logits, chosen in self.seen:
            load = expert_counts(chosen, experts) / chosen.numel()
            balance.append(experts * (load * logits.float().softmax(-1).mean(0)).sum())
            z.append(logits.float().logsumexp(-1).square().mean())
            loads.append(load.detach())
        self.seen.clear()
        return torch.stack(balance).mean(), torch.stack(z).mean(), torch.stack(loads)


def make_model(
    geometry: str, vocabulary: int, end_of_turn: int, seed: int
) -> qwen.Qwen3_5MoeForCausalLM:
    """The model with first weights: residual outputs smaller, DeltaNet decay slower."""
    torch.manual_seed(seed)
    config = make_config(geometry, vocabulary, end_of_turn)
    model = qwen.Qwen3_5MoeForCausalLM(config)
    outputs = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(outputs):
                weight.mul_((2 * config.num_hidden_layers) ** -0.5)
        for module in model.modules():
            if isinstance(module, qwen.Qwen3_5MoeGatedDeltaNet):
                module.A_log.uniform_(1, 8).log_()
                low, high = math.log(0.001), math.log(0.1)
                step = torch.exp(torch.rand_like(module.dt_bias) * (high - low) + low)
                module.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
    model.config.use_cache = False
    return model


def token_loss(model: Any, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the tokens' losses, and sum of the weights.

    Shapes: tokens [B, T+1]; weights [B, T]
    """
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    flat = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (flat * weights.flatten()).sum(), weights.sum()


def to_device(batch: Batch, device: str) -> tuple[Tensor, Tensor]:
    """A batch's tokens [B, T+1] as int64 and weights [B, T]."""
    pair = torch.from_numpy(batch.tokens.astype(np.int64)), torch.from_numpy(batch.weights)
    if device == "cuda":
        return pair[0].pin_memory().cuda(non_blocking=True), pair[1].pin_memory().cuda(
            non_blocking=True
        )
    return pair


def held_out_rows(path: Path, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The loss texts of each part, packed like the training set."""
    texts = read(path)
    found = {}
    for name, part in PARTS.items():
        mine = [
            [(t, bool(trained)) for t, trained in r["segments"]] for r in texts if r["part"] == name
        ]
        if mine:
            found[name] = pack(tokenizer, mine, part.row)
    return found


@torch.no_grad()
def held_out_loss(model: Any, rows: dict[str, np.ndarray], device: str) -> dict[str, float]:
    """Mean loss of a trained token in each part, unweighted."""
    model.eval()
    losses = {}
    for name, packed in rows.items():
        total, count = 0.0, 0.0
        for start in range(0, len(packed), 16):
            chunk = packed[start : start + 16]
            batch = Batch(chunk & (MASK - 1), (chunk[:, 1:] < MASK).astype(np.float32))
            loss, weight = token_loss(model, *to_device(batch, device))
            total, count = total + loss.item(), count + weight.item()
        losses[name] = round(total / max(count, 1.0), 4)
    model.train()
    return losses
