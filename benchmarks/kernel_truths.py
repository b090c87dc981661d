"""What kernels.py holds attention and the delta rule to: short sequences in float64, by the stages'
own references."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.stages.attention import GatedAttention
from flashmoe_lab.stages.delta_net import GatedDeltaNet
from flashmoe_lab.stages.linear import Linear
from flashmoe_lab.stages.norm import RMSNorm


def attention_truth(
    x: np.ndarray, weights: Sequence[np.ndarray], heads: int, kv_heads: int, dim: int
) -> np.ndarray:
    """x [T, hidden] from the empty cache; q, k, v and out, norms of 1, 64 dimensions rotated."""
    config: Any = SimpleNamespace(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        rotary_dim=64,
        rope_theta=1e7,
    )
    q, k, v, out = _linears(weights)
    norm = RMSNorm(mx.ones(dim), 1e-6)
    return GatedAttention(config, q, k, v, out, norm, norm).reference(x.astype(np.float64))


def delta_truth(
    x: np.ndarray,
    weights: Sequence[np.ndarray],
    taps: np.ndarray,
    keys: int,
    heads: int,
    dim: int,
) -> np.ndarray:
    """x [T, hidden] from the empty state; qkv, z, b, a and out, A_log and dt_bias of 0."""
    config: Any = SimpleNamespace(
        linear_num_key_heads=keys,
        linear_key_head_dim=dim,
        linear_num_value_heads=heads,
        linear_value_head_dim=dim,
    )
    qkv, z, b, a, out = _linears(weights)
    zeros, norm = mx.zeros(heads), RMSNorm(mx.ones(dim), 1e-6)
    conv = mx.array(taps.T[:, :, None])
    stage = GatedDeltaNet(config, qkv, z, b, a, out, conv, zeros, zeros, norm)
    return stage.reference(x.astype(np.float64))


def _linears(weights: Sequence[np.ndarray]) -> list[Linear]:
    return [Linear(mx.array(weight)) for weight in weights]
