"""Full attention with an output gate: the memory that grows with every token.

q_proj gives each head its query and, beside it, its gate. Query and key are normalised over the
head, then the leading `rotary_dim` dimensions are rotated (halves i and i + rotary_dim/2 are a
pair). Grouped queries: heads [k * G, (k+1) * G) share key head k. The result is multiplied by
sigmoid(gate) before o_proj.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.config import ModelConfig
from flashmoe_lab.stages.activation import sigmoid64
from flashmoe_lab.stages.linear import Linear
from flashmoe_lab.stages.norm import RMSNorm
from flashmoe_lab.stages.part import Part
from flashmoe_lab.state import AttentionState

_QUERY_ROWS = 64  # query rows whose scores are held at once on a CPU


class GatedAttention(Part):
    """The mixer of a full-attention layer."""

    def __init__(
        self,
        config: ModelConfig,
        q_proj: Linear,
        k_proj: Linear,
        v_proj: Linear,
        o_proj: Linear,
        q_norm: RMSNorm,
        k_norm: RMSNorm,
    ) -> None:
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj
        self.q_norm, self.k_norm = q_norm, k_norm
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.rotary_dim = config.head_dim, config.rotary_dim
        self.rope_theta = config.rope_theta
        self._kept = native.Kept()

    def __call__(self, x: mx.array, state: AttentionState) -> mx.array:
        """x [T, hidden] -> [T, hidden]; `state` takes the T new keys and values."""
        tokens, position = x.shape[0], state.length
        if kernels.native_for(x.dtype) and self.is_exact() and state.keys.dtype == mx.float32:
            out = native.call(self.native(), x, position, *state.owned(tokens))
            state.moved(tokens)
            return out
        split = self.q_proj(x).reshape(tokens, self.heads, 2 * self.head_dim)
        q, gate = split[..., : self.head_dim], split[..., self.head_dim :]
        k = self.k_proj(x).reshape(tokens, self.kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(tokens, self.kv_heads, self.head_dim)
        q = self._rotate(self.q_norm(q).swapaxes(0, 1), position)  # [H, T, D]
        k = self._rotate(self.k_norm(k).swapaxes(0, 1), position)  # [Hk, T, D]
        keys, values = state.append(k, v.swapaxes(0, 1))
        attend = _attend_by_row if mx.default_device() == mx.cpu else _attend_fused
        out = attend(q * self.head_dim**-0.5, keys, values, position)  # [T, H, D]
        out = out * mx.sigmoid(gate)
        return self.o_proj(out.reshape(tokens, -1))

    def is_exact(self) -> bool:
        """Whether the native kernels do what the parts would: a part of another class may not."""
        return (
            native.exactly(Linear, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
            and native.exactly(RMSNorm, self.q_norm, self.k_norm)
            and self.q_norm.eps == self.k_norm.eps
        )

    def native(self) -> Any:
        """The stage as the native kernels take it."""
        matrices = (
            self.q_proj.native(),
            self.k_proj.native(),
            self.v_proj.native(),
            self.o_proj.native(),
        )
        parts = (
            *matrices,
            self.q_norm.weight,
            self.k_norm.weight,
            self.q_norm.eps,
            self.rope_theta,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.rotary_dim,
        )
        return self._kept.get(parts, lambda: native.attention(*parts))

    def _rotate(self, x: mx.array, position: int) -> mx.array:
        return mx.fast.rope(
            x[None],
            self.rotary_dim,
            traditional=False,
            base=self.rope_theta,
            scale=1.0,
            offset=position,
        )[0]

    def reference(self, x: np.ndarray) -> np.ndarray:
        """A whole sequence x [T, hidden] from position 0, in float64."""
        tokens, group = len(x), self.heads // self.kv_heads
        split = self.q_proj.reference(x).reshape(tokens, self.heads, 2 * self.head_dim)
        q, gate = split[..., : self.head_dim], split[..., self.head_dim :]
        k = self.k_proj.reference(x).reshape(tokens, self.kv_heads, self.head_dim)
        v = self.v_proj.reference(x).reshape(tokens, self.kv_heads, self.head_dim)
        q, k = self._rotate64(self.q_norm.reference(q)), self._rotate64(self.k_norm.reference(k))
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) * self.head_dim**-0.5
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = np.einsum("hts,shd->thd", p, v) * sigmoid64(gate)
        return self.o_proj.reference(out.reshape(tokens, -1))

    def _rotate64(self, x: np.ndarray) -> np.ndarray:
        half = self.rotary_dim // 2
        frequency = self.rope_theta ** (-np.arange(half) / half)
        angle = np.arange(len(x))[:, None, None] * frequency  # [T, 1, half]
        cos, sin = np.cos(angle), np.sin(angle)
        a, b, rest = np.split(x, [half, 2 * half], axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _attend_fused(q: mx.array, keys: mx.array, values: mx.array, position: int) -> mx.array:
    """MLX's own attention: q [H, T, D] over keys, values [Hk, S, D] -> [T, H, D]."""
    length = position + q.shape[1]
    out = mx.fast.scaled_dot_product_attention(
        q[None], keys[None, :, :length], values[None, :, :length], scale=1.0, mask="causal"
    )
    return out[0].swapaxes(0, 1)


def _attend_by_row(q: mx.array, keys: mx.array, values: mx.array, position: int) -> mx.array:
    """The same, each query row a product of its own over the whole buffer, later keys masked.

    A row's result then does not depend on how many rows come with it, so logits on a CPU are
    bitwise the same for every way of cutting a prompt into chunks.
    """
    heads, tokens, dim = q.shape
    kv_heads, size, _ = keys.shape
    q = q.swapaxes(0, 1).reshape(tokens, kv_heads, heads // kv_heads, dim)
    outs: list[mx.array] = []
    for start in range(0, tokens, _QUERY_ROWS):
        rows = q[start : start + _QUERY_ROWS]
        scores = rows @ keys.swapaxes(-1, -2)  # [rows, Hk, G, S]
        last = mx.arange(position + start, position + start + rows.shape[0])
        seen = mx.arange(size)[None, :] <= last[:, None]
        scores = mx.where(seen[:, None, None, :], scores, -mx.inf)
        outs.append(mx.softmax(scores, axis=-1, precise=True) @ values)
    out = outs[0] if len(outs) == 1 else mx.concatenate(outs)
    return out.reshape(tokens, heads, dim)
