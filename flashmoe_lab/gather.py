"""MLX's gathered products: many rows, each with the matrices of the expert in one slot.

Not a choice of kernels (kernels.py), but the care that MLX's need. On CUDA, mlx 0.32.4 has two
kernels for `gather_qmm`, and the number of rows chooses: a vector one for fewer than 8, a matrix
one otherwise. They round differently, and the matrix one numbers the codes of a stack in 32 bits,
so beyond 2^32 codes it reads another slot (seen on an H100: wrong from slot 1024 of 4096 x 1024).
So rows are grouped here: a few tokens always go through the vector kernel, a prompt always through
the matrix kernel and in parts of a stack. A token's result depends neither on which of its experts
were in the bank nor on their slots.
"""

from collections.abc import Iterator, Mapping

import mlx.core as mx
import numpy as np

from flashmoe_lab.config import Quantization
from flashmoe_lab.stages.activation import silu

_VECTOR_ROWS = 7  # at most, for CUDA's vector kernel
_STACK_CODES = 1 << 31  # at most, for CUDA's matrix kernel


def gathered_mlp(
    x: mx.array,
    tokens: np.ndarray,
    slots: np.ndarray,
    components: Mapping[str, mx.array],
    quantization: Quantization | None,
) -> mx.array:
    """`down(silu(gate(x)) * up(x))` for pairs of a token and a slot, sorted by slot.

    Args:
        x: [T, hidden]; T decides the kernel, so it is to be the same for every wave of a chunk.
        tokens, slots: int [P].
        components: stacks [slots, out, in or groups].

    Returns:
        [P, hidden] in x's type.
    """
    slots, components = _in_type(x.dtype, slots, components, quantization)
    if quantization is None or not mx.cuda.is_available():
        return _mlp(x, tokens, slots, components, quantization)
    codes = components["up_proj.scales"][0].size * quantization.group_size
    outs: list[mx.array] = []
    for pairs, count, first, stop in cuda_groups(slots, len(x), codes):
        part = {name: stack[first:stop] for name, stack in components.items()}
        outs.append(_mlp(x, tokens[pairs], slots[pairs] - first, part, quantization)[:count])
    return outs[0] if len(outs) == 1 else mx.concatenate(outs)


def cuda_groups(
    slots: np.ndarray, rows: int, codes: int
) -> Iterator[tuple[np.ndarray, int, int, int | None]]:
    """Pairs that share a product, and the part of the stack that it is given.

    Args:
        slots: int [P], ascending.
        rows: tokens of the whole chunk.
        codes: weights of one slot's matrix.

    Yields:
        positions of pairs, padded with repeated ones at the end where the matrix kernel needs more;
        how many come before those; the part's first slot and its end.
    """
    if rows <= _VECTOR_ROWS:
        for pairs in np.array_split(np.arange(len(slots)), -(-len(slots) // _VECTOR_ROWS)):
            yield pairs, len(pairs), 0, None
        return
    span = max(1, _STACK_CODES // codes)
    for part in np.unique(slots // span):
        pairs = np.flatnonzero(slots // span == part)
        padded = np.resize(pairs, max(len(pairs), _VECTOR_ROWS + 1))
        yield padded, len(pairs), int(part) * span, (int(part) + 1) * span


def _in_type(
    dtype: mx.Dtype,
    slots: np.ndarray,
    components: Mapping[str, mx.array],
    quantization: Quantization | None,
) -> tuple[np.ndarray, Mapping[str, mx.array]]:
    """Where activations and scales differ in type MLX would convert the scales of the whole bank,
    so then only the experts in use are taken out first."""
    if components["down_proj.scales" if quantization else "down_proj.weight"].dtype == dtype:
        return slots, components
    used, inverse = np.unique(slots, return_inverse=True)
    taken = mx.array(used)
    parts = {name: stack[taken] for name, stack in components.items()}
    return inverse, {
        name: stack if stack.dtype == mx.uint32 else stack.astype(dtype)
        for name, stack in parts.items()
    }


def _mlp(
    x: mx.array,
    tokens: np.ndarray,
    slots: np.ndarray,
    components: Mapping[str, mx.array],
    quantization: Quantization | None,
) -> mx.array:
    """One product for all pairs, slot numbers as data.

    The pairs are sorted, but MLX is not told: its sorted path has given wrong rows (mlx#4253 and,
    seen on an H200 with 0.32.4, for quantised weights too), and rows are made by a reshape because
    an inserted axis is what it stumbled over.
    """
    index = mx.array(slots.astype(np.uint32))
    rows = x[mx.array(tokens)].reshape(len(tokens), 1, -1)  # [P, 1, hidden]

    def product(values: mx.array, projection: str) -> mx.array:
        weight = components[f"{projection}.weight"]
        if quantization is None:
            return mx.gather_mm(values, weight.swapaxes(-1, -2), rhs_indices=index)
        return mx.gather_qmm(
            values,
            weight,
            components[f"{projection}.scales"],
            components[f"{projection}.biases"],
            rhs_indices=index,
            transpose=True,
            group_size=quantization.group_size,
            bits=quantization.bits,
        )

    hidden = silu(product(rows, "gate_proj")) * product(rows, "up_proj")
    return product(hidden, "down_proj").squeeze(1)
