"""The operations that have several implementations, and the choice among them.

Each operation is one function with a table of variants of the same signature; every variant is held
to the NumPy float64 `*_reference` beside it. The choice is made per call from what MLX runs on; a
caller may name a variant.

On a CPU, whole stages have two implementations too: MLX's operations, and our C++ (native.py).
`use` chooses for the process, `native_for` is what a stage asks.

* `expert_mlp`: the SwiGLU of the routed experts, straight from bank memory.
* `delta_rule`: the recurrence of GatedDeltaNet over a sequence.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from flashmoe_lab import native
from flashmoe_lab.config import Quantization
from flashmoe_lab.gather import gathered_mlp
from flashmoe_lab.stages.activation import silu, silu64

_SMALL_EXPERT_NBYTES = 1 << 20
_DELTA_EVAL_STEPS = 64  # a longer lazy graph only costs memory

KERNELS = {
    "mlx": "MLX's operations",
    "native": "our C++, in float32",
    "native_int": "our C++, 16-bit activations for quantised matrices of 1024 columns or more",
}
_used: str | None = None


def use(name: str | None) -> None:
    """Choose what stages compute with on a CPU, for the whole process; FLASHMOE_KERNELS says it
    from the start.

    `native_int` multiplies the scale of a group by that of its activations in float32, so products
    of less than 1e-38 lose digits; scales of 1e-35 and more, and all of float16, are not touched.

    Args:
        name: one of KERNELS; None for the default, which is `native_int` where it was built.

    Raises:
        ValueError: there is no such implementation.
        RuntimeError: the native kernels were not built, or do not load.
    """
    global _used
    name = name or os.environ.get("FLASHMOE_KERNELS")
    if name is not None and name not in KERNELS:
        raise ValueError(f"kernels are {name!r}; known are {', '.join(KERNELS)}")
    if not native.available:
        if name not in (None, "mlx"):
            raise RuntimeError(f"kernels {name!r}: flashmoe_lab._native {native.missing}")
        if name is None and mx.default_device() == mx.cpu:
            warnings.warn(
                f"flashmoe_lab._native {native.missing}; this CPU computes with MLX's operations "
                "and reads with threads of Python, which is much slower",
                stacklevel=2,
            )
        _used = "mlx"
        return
    _used = name or "native_int"
    native.set_integer(_used == "native_int")


def used() -> str:
    """What stages compute with on a CPU now, one of KERNELS."""
    if _used is None:
        use(None)
    assert _used is not None
    return _used


def native_for(dtype: mx.Dtype) -> bool:
    """Whether a stage is to take our C++ for activations of this type: on a CPU, in float32."""
    return dtype == mx.float32 and mx.default_device() == mx.cpu and used() != "mlx"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Stacked matrices of many experts: component ("up_proj.scales", ...) -> [slots, out, in or
    groups]."""

    components: Mapping[str, mx.array]
    quantization: Quantization | None
    _kept: native.Kept = field(default_factory=native.Kept, init=False, repr=False, compare=False)

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert."""
        return sum(array.nbytes // array.shape[0] for array in self.components.values())

    def stacks(self) -> tuple:
        """The same for the native kernels: gate, up, down."""
        return self._kept.get(
            tuple(self.components.values()),
            lambda: native.expert_stacks(self.components, self.quantization),
        )


# The routed experts


def expert_mlp(
    x: mx.array,
    tokens: np.ndarray,
    slots: np.ndarray,
    weights: ExpertWeights,
    variant: str | None = None,
) -> mx.array:
    """`down(silu(gate(x)) * up(x))` for pairs of a token and an expert.

    Args:
        x: [T, hidden].
        tokens, slots: int [P], sorted by slot: pair p is token tokens[p] through the expert in
            slots[p].
        variant: one of EXPERT_MLP; by default `native` where stages are native, and of MLX's two
            `gather` on a GPU, and on a CPU too where experts are so small that the number of
            operations costs more than copying them.

    Returns:
        [P, hidden] in x's type.
    """
    if variant is None and native_for(x.dtype):
        variant = "native"
    if variant is None:
        variant = "gather"
        if mx.default_device() == mx.cpu:
            # MLX's gather_mm on a CPU is of float32 only.
            gathers = weights.quantization is not None or x.dtype == mx.float32
            if not gathers or weights.expert_nbytes > _SMALL_EXPERT_NBYTES:
                variant = "by_expert"
    return _choose(EXPERT_MLP, variant)(x, tokens, slots, weights)


def _by_expert(
    x: mx.array, tokens: np.ndarray, slots: np.ndarray, weights: ExpertWeights
) -> mx.array:
    """One product for each expert over all its rows: no copy of the bank, whatever the types."""
    starts = np.flatnonzero(np.diff(slots, prepend=-1))
    ends = [*starts[1:], len(slots)]
    index = mx.array(tokens)
    outs: list[mx.array] = []
    for start, end in zip(starts, ends, strict=True):
        slot = int(slots[start])
        rows = x if len(tokens) == len(x) == 1 else x[index[int(start) : int(end)]]
        hidden = silu(_matrix(rows, slot, "gate_proj", weights))
        hidden = hidden * _matrix(rows, slot, "up_proj", weights)
        outs.append(_matrix(hidden, slot, "down_proj", weights))
    out = outs[0] if len(outs) == 1 else mx.concatenate(outs)
    return out.astype(x.dtype)  # float32 scales make it float32


def _matrix(x: mx.array, slot: int, projection: str, weights: ExpertWeights) -> mx.array:
    parts = weights.components
    weight = parts[f"{projection}.weight"][slot]
    if weights.quantization is None:
        return x @ weight.astype(x.dtype).T
    return mx.quantized_matmul(
        x,
        weight,
        parts[f"{projection}.scales"][slot],
        parts[f"{projection}.biases"][slot],
        transpose=True,
        group_size=weights.quantization.group_size,
        bits=weights.quantization.bits,
    )


def _gather(x: mx.array, tokens: np.ndarray, slots: np.ndarray, weights: ExpertWeights) -> mx.array:
    """In as few products as are right on this device (gather.py)."""
    return gathered_mlp(x, tokens, slots, weights.components, weights.quantization)


def _native(x: mx.array, tokens: np.ndarray, slots: np.ndarray, weights: ExpertWeights) -> mx.array:
    """All experts in one call over all threads, read where they lie, in the exact or the integer
    form (see `use`)."""
    rows = native.floats(x.astype(mx.float32))
    return mx.array(native.expert_mlp(weights.stacks(), rows, tokens, slots)).astype(x.dtype)


EXPERT_MLP: dict[str, Callable[..., mx.array]] = {"by_expert": _by_expert, "gather": _gather}
if native.available:
    EXPERT_MLP["native"] = _native


def expert_mlp_reference(x: np.ndarray, matrices: Mapping[str, np.ndarray]) -> np.ndarray:
    """One expert in float64: x [T, hidden], matrices [out, in] by projection -> [T, hidden]."""
    hidden = silu64(x @ matrices["gate_proj"].T) * (x @ matrices["up_proj"].T)
    return hidden @ matrices["down_proj"].T


# The delta rule


def delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    beta: mx.array,
    state: mx.array,
    variant: str | None = None,
) -> tuple[mx.array, mx.array]:
    """The gated delta rule, token after token, in float32.

    Args:
        q, k: [T, Hv, Dk], normalised and scaled.
        v: [T, Hv, Dv].
        decay, beta: [T, Hv].
        state: [Hv, Dv, Dk].

    Returns:
        outputs [T, Hv, Dv] and the state after the last token.
    """
    return _choose(DELTA_RULE, variant or "mlx")(q, k, v, decay, beta, state)


def _delta_mlx(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    outs: list[mx.array] = []
    for t in range(q.shape[0]):
        key = k[t][:, :, None]  # [Hv, Dk, 1]
        state = state * decay[t][:, None, None]
        delta = (v[t][:, :, None] - state @ key) * beta[t][:, None, None]  # [Hv, Dv, 1]
        state = state + delta * k[t][:, None, :]
        outs.append((state @ q[t][:, :, None]).squeeze(-1))
        if (t + 1) % _DELTA_EVAL_STEPS == 0:
            mx.async_eval(state, *outs[-_DELTA_EVAL_STEPS:])
    return mx.stack(outs), state


DELTA_RULE: dict[str, Callable[..., tuple[mx.array, mx.array]]] = {"mlx": _delta_mlx}


def delta_rule_reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    decay: np.ndarray,
    beta: np.ndarray,
    state: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The same in float64, in the words of the definition."""
    outs = []
    for t in range(len(q)):
        state = state * decay[t][:, None, None]
        error = v[t] - np.einsum("hvk,hk->hv", state, k[t])
        state = state + np.einsum("hv,hk->hvk", error * beta[t][:, None], k[t])
        outs.append(np.einsum("hvk,hk->hv", state, q[t]))
    return np.array(outs), state


def _choose(table: Mapping[str, Callable], variant: str) -> Callable:
    if variant not in table:
        raise ValueError(f"variant is {variant!r}; known are {', '.join(table)}")
    return table[variant]
