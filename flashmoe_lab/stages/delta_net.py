"""GatedDeltaNet: the memory that does not grow.

A short convolution over q, k and v, then for each token and head a decaying matrix S that is
corrected towards the token's value: S *= decay; S += k (v - S'k)' beta; out = S'q. The output is
normalised over the head first and then gated with silu(z). Value head j uses key head j // (Hv /
Hk). State and decay are float32 always.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.checkpoint.quantize import from_mlx
from flashmoe_lab.config import ModelConfig
from flashmoe_lab.stages.activation import sigmoid64, silu, silu64
from flashmoe_lab.stages.linear import Linear
from flashmoe_lab.stages.norm import RMSNorm
from flashmoe_lab.stages.part import Part
from flashmoe_lab.state import DeltaState

_EPS = 1e-6  # of the l2 norms of q and k


class GatedDeltaNet(Part):
    """The mixer of a linear-attention layer.

    Args:
        conv1d: depthwise weights [C, kernel, 1], C = q, k, v channels side by side.
        A_log, dt_bias: [Hv].
        norm: over Dv; its weight is plain, not zero-centred.
    """

    def __init__(
        self,
        config: ModelConfig,
        in_proj_qkv: Linear,
        in_proj_z: Linear,
        in_proj_b: Linear,
        in_proj_a: Linear,
        out_proj: Linear,
        conv1d: mx.array,
        A_log: mx.array,  # noqa: N803
        dt_bias: mx.array,
        norm: RMSNorm,
    ) -> None:
        self.in_proj_qkv, self.in_proj_z = in_proj_qkv, in_proj_z
        self.in_proj_b, self.in_proj_a, self.out_proj = in_proj_b, in_proj_a, out_proj
        self.conv1d, self.norm = conv1d.squeeze(-1).T, norm  # [kernel, C]
        self.A_log, self.dt_bias = A_log.astype(mx.float32), dt_bias.astype(mx.float32)
        mx.eval(self.conv1d, self.A_log, self.dt_bias)  # stages may be called in another thread
        self.k_heads, self.k_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.v_heads, self.v_dim = config.linear_num_value_heads, config.linear_value_head_dim
        self._kept = native.Kept()

    def __call__(self, x: mx.array, state: DeltaState) -> mx.array:
        """x [T, hidden] -> [T, hidden]; `state` moves on by T tokens."""
        if kernels.native_for(x.dtype) and self.is_exact() and state.conv.dtype == mx.float32:
            return native.call(self.native(), x, *state.owned(x.shape[0]))
        tokens = x.shape[0]
        mixed = self._convolve(self.in_proj_qkv(x), state).astype(mx.float32)
        width = self.k_heads * self.k_dim
        q, k, v = mx.split(mixed, [width, 2 * width], axis=-1)
        q = self._key_heads(q) * self.k_dim**-0.5
        k = self._key_heads(k)
        v = v.reshape(tokens, self.v_heads, self.v_dim)
        beta = mx.sigmoid(self.in_proj_b(x).astype(mx.float32))
        rate = mx.logaddexp(self.in_proj_a(x).astype(mx.float32) + self.dt_bias, mx.array(0.0))
        decay = mx.exp(-mx.exp(self.A_log) * rate)
        out, state.recurrent = kernels.delta_rule(q, k, v, decay, beta, state.recurrent)
        z = self.in_proj_z(x).reshape(tokens, self.v_heads, self.v_dim)
        out = self.norm(out) * silu(z.astype(mx.float32))
        return self.out_proj(out.reshape(tokens, -1).astype(x.dtype))

    def is_exact(self) -> bool:
        """Whether the native kernels do what the parts would: a part of another class may not."""
        return (
            native.exactly(Linear, self.in_proj_qkv, self.in_proj_z, self.in_proj_b)
            and native.exactly(Linear, self.in_proj_a, self.out_proj)
            and native.exactly(RMSNorm, self.norm)
        )

    def native(self) -> Any:
        """The stage as the native kernels take it."""
        matrices = (
            self.in_proj_qkv.native(),
            self.in_proj_z.native(),
            self.in_proj_b.native(),
            self.in_proj_a.native(),
            self.out_proj.native(),
        )
        small = (self.conv1d, self.A_log, self.dt_bias, self.norm.weight)
        sizes = (self.k_heads, self.k_dim, self.v_heads, self.v_dim)
        return self._kept.get(
            (*matrices, *small, self.norm.eps, *sizes),
            lambda: native.delta_net(
                *matrices,
                *(mx.contiguous(part.astype(mx.float32)) for part in small),
                self.norm.eps,
                self.conv1d.shape[0],
                *sizes,
            ),
        )

    def _convolve(self, qkv: mx.array, state: DeltaState) -> mx.array:
        """Causal depthwise convolution and silu, [T, C] -> [T, C]."""
        taps, tokens = self.conv1d.shape[0], qkv.shape[0]
        padded = mx.concatenate([state.conv.astype(qkv.dtype), qkv])
        state.conv = mx.contiguous(padded[-(taps - 1) :])  # a view would keep all of `padded`
        total = padded[:tokens] * self.conv1d[0]
        for tap in range(1, taps):
            total = total + padded[tap : tap + tokens] * self.conv1d[tap]
        return silu(total)

    def _key_heads(self, x: mx.array) -> mx.array:
        """[T, Hk * Dk] -> unit vectors [T, Hv, Dk], each key head repeated for its value heads."""
        x = x.reshape(x.shape[0], self.k_heads, self.k_dim)
        x = x * mx.rsqrt((x * x).sum(axis=-1, keepdims=True) + _EPS)
        return mx.repeat(x, self.v_heads // self.k_heads, axis=1)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """A whole sequence x [T, hidden] from the empty state, in float64."""
        tokens, ratio = len(x), self.v_heads // self.k_heads
        qkv, taps = self.in_proj_qkv.reference(x), self.conv1d.shape[0]
        weight = from_mlx(self.conv1d).float32().astype(np.float64)
        padded = np.concatenate([np.zeros((taps - 1, qkv.shape[1])), qkv])
        windows = np.stack([padded[tap : tap + tokens] for tap in range(taps)])
        mixed = silu64(np.einsum("ktc,kc->tc", windows, weight))
        width = self.k_heads * self.k_dim
        q, k, v = np.split(mixed, [width, 2 * width], axis=-1)
        q, k = (part.reshape(tokens, self.k_heads, self.k_dim) for part in (q, k))
        q, k = (p / np.sqrt((p * p).sum(-1, keepdims=True) + _EPS) for p in (q, k))
        q, k = (np.repeat(part, ratio, axis=1) for part in (q * self.k_dim**-0.5, k))
        v = v.reshape(tokens, self.v_heads, self.v_dim)
        beta = sigmoid64(self.in_proj_b.reference(x))
        a_log, dt_bias = (np.array(part, np.float64) for part in (self.A_log, self.dt_bias))
        decay = np.exp(-np.exp(a_log) * np.logaddexp(self.in_proj_a.reference(x) + dt_bias, 0))
        state = np.zeros((self.v_heads, self.v_dim, self.k_dim))
        out, _ = kernels.delta_rule_reference(q, k, v, decay, beta, state)
        z = self.in_proj_z.reference(x).reshape(tokens, self.v_heads, self.v_dim)
        out = self.norm.reference(out) * silu64(z)
        return self.out_proj.reference(out.reshape(tokens, -1))
