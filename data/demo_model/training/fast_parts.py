"""Faster drop-ins for parts of the transformers model, used while it trains; same mathematics.

The reference functions of transformers stay in charge of evaluation and generation. What is
replaced: the chunked DeltaNet rule (a triangular solve instead of a loop over rows), the depthwise
convolution (shifted multiply-adds; cuDNN's backward is slow) and the experts (two grouped GEMMs in
bf16 whose weights are cast from the float32 masters inside autograd; torch's grouped_mm takes no
float32). flash-linear-attention must not be importable on a Hopper GPU with Triton 3.6: its gated
backward raises.
"""

# pyright: reportMissingImports=false
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as qwen
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS = "grouped_bf16"
CHUNK = 64

_reference_delta = qwen.torch_chunk_gated_delta_rule
_reference_conv = qwen.causal_conv1d_fn


def expert_counts(chosen: Tensor, experts: int) -> Tensor:
    """How often each expert occurs, without the host synchronisation of bincount."""
    flat = chosen.reshape(-1)
    counts = torch.zeros(experts, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))


class Reorder(torch.autograd.Function):
    """Rows in another order; the gradient is a gather too, where indexing would sort and add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """Shapes: rows [N, ...]; order, back int64 [N], each other's inverse."""
        ctx.save_for_backward(back)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of `rows`."""
        return gradients[0][ctx.saved_tensors[0]], None, None


def grouped_experts(self: Any, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Experts as two grouped GEMMs over tokens sorted by expert.

    Shapes: hidden_states [N, H]; chosen, weights [N, K]; result [N, H]
    """
    tokens, per_token = chosen.shape
    flat = chosen.reshape(-1)
    order = torch.argsort(flat.to(torch.int32), stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    ends = expert_counts(flat, self.num_experts).cumsum(0).to(torch.int32)
    multiply: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm")  # noqa: B009
    reorder: Any = Reorder.apply
    rows = reorder(hidden_states.to(torch.bfloat16).repeat_interleave(per_token, 0), order, back)
    both = multiply(rows, self.gate_up_proj.to(torch.bfloat16).transpose(-2, -1), offs=ends)
    inner = _gated(both)
    out = multiply(inner, self.down_proj.to(torch.bfloat16).transpose(-2, -1), offs=ends)
    by_token = reorder(out, back, order).view(tokens, per_token, -1)
    return _weighted(by_token, weights).to(hidden_states.dtype)


def gated(both: Tensor) -> Tensor:
    """silu(gate) * up of [N, 2F] -> [N, F]."""
    gate, up = both.chunk(2, -1)
    return (F.silu(gate) * up).contiguous()


def weighted(by_token: Tensor, weights: Tensor) -> Tensor:
    """Sum over a token's experts: [N, K, H] and [N, K] -> [N, H] float32."""
    return (by_token.float() * weights.float()[..., None]).sum(1)


def shifted_conv(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None,
    activation: str | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """Causal depthwise convolution. Shapes: hidden_states [B, C, T]; weight [C, kernel]"""
    kernel, length = weight.size(-1), hidden_states.size(-1)
    padded = F.pad(hidden_states, (kernel - 1, 0))
    weight = weight.to(hidden_states.dtype)
    out = padded[..., :length] * weight[:, 0, None]
    for tap in range(1, kernel):
        out = out + padded[..., tap : tap + length] * weight[:, tap, None]
    return F.silu(out) if activation else out


def within_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """The part of the DeltaNet rule that needs no state.

    Shapes: q, k [B, T, Hv, Dk]; v [B, T, Hv, Dv]; g, beta [B, T, Hv]; results [B, Hv, T/C, C, ...]
    """
    batch, length, heads, size = k.shape
    q, k, v, beta, g = (x.transpose(1, 2).float() for x in (q, k, v, beta, g))
    q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6) * size**-0.5
    k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    k_beta, v_beta = k * beta[..., None], v * beta[..., None]
    chunks = (batch, heads, length // CHUNK, CHUNK)
    q, k, k_beta, v_beta = (x.reshape(*chunks, x.size(-1)) for x in (q, k, k_beta, v_beta))
    decay = g.reshape(chunks).cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, float("-inf")).exp()
    grown = decay.exp()[..., None]
    remaining = (decay[..., -1:] - decay).exp()[..., None]
    return (
        (k_beta @ k.mT) * between, torch.cat([v_beta, k_beta * grown], -1), (q @ k.mT) * between,
        q * grown, k * remaining, decay[..., -1].exp()[..., None, None],
    )  # fmt: skip


_within_chunks: Callable[..., tuple[Tensor, ...]] = within_chunks
_conv: Callable[..., Tensor] = shifted_conv
_gated: Callable[[Tensor], Tensor] = gated
_weighted: Callable[[Tensor, Tensor], Tensor] = weighted


def chunked_delta(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None = None, output_final_state: bool = False, **more: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gated delta rule over chunks; the reference where a state or no gradient is wanted."""
    plain = initial_state is None and not output_final_state and torch.is_grad_enabled()
    if not plain or key.shape[1] % CHUNK:
        return _reference_delta(
            query, key, value, g=g, beta=beta, initial_state=initial_state,
            output_final_state=output_final_state, **more,
        )  # fmt: skip
    repeats = value.shape[2] // key.shape[2]
    if repeats > 1:  # newer transformers leave this to the rule
        query, key = (x.repeat_interleave(repeats, dim=2) for x in (query, key))
    with torch.autocast(query.device.type, enabled=False):
        lower, right, attention, q, k, decay = _within_chunks(query, key, value, g, beta)
        solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
        u, w = solved.split([value.size(-1), key.size(-1)], -1)
        state = torch.zeros(*u.shape[:2], key.size(-1), value.size(-1), device=u.device)
        outputs = []
        # unbind, not indexing: the gradient of an index is a whole tensor of zeros for each chunk.
        parts = (x.unbind(2) for x in (u, w, q, k, attention, decay))
        for u_, w_, q_, k_, attention_, decay_ in zip(*parts, strict=True):
            new = u_ - w_ @ state
            outputs.append(q_ @ state + attention_ @ new)
            state = state * decay_ + k_.mT @ new
        out = torch.stack(outputs, 2).flatten(2, 3).transpose(1, 2)
    return out.to(query.dtype), None


def _training_conv(hidden_states: Tensor, *given: Any, **more: Any) -> Tensor:
    conv = _conv if torch.is_grad_enabled() else _reference_conv
    return conv(hidden_states, *given, **more)


def install(compiled: bool) -> None:
    """Puts the drop-ins in place; `compiled` runs the element-wise parts through torch.compile."""
    global _within_chunks, _conv, _gated, _weighted
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, grouped_experts)
    setattr(qwen, "torch_chunk_gated_delta_rule", chunked_delta)  # noqa: B010
    setattr(qwen, "causal_conv1d_fn", _training_conv)  # noqa: B010
    if compiled:
        _within_chunks = torch.compile(within_chunks, dynamic=False)
        _conv = torch.compile(shifted_conv, dynamic=False)
        _gated = torch.compile(gated, dynamic=False)
        _weighted = torch.compile(weighted, dynamic=False)
        for module in (qwen.Qwen3_5MoeRMSNorm, qwen.Qwen3_5MoeRMSNormGated, qwen.Qwen3_5MoeMLP):
            _compile_training(module)


def remove() -> None:
    """Puts the functions of transformers back."""
    setattr(qwen, "torch_chunk_gated_delta_rule", _reference_delta)  # noqa: B010
    setattr(qwen, "causal_conv1d_fn", _reference_conv)  # noqa: B010


def _compile_training(module: type[torch.nn.Module]) -> None:
    reference = module.forward
    fast = torch.compile(reference, dynamic=None)

    def forward(self: torch.nn.Module, *given: Any, **more: Any) -> Any:
        return (fast if self.training else reference)(self, *given, **more)

    setattr(module, "forward", forward)  # noqa: B010
