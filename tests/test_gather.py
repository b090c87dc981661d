"""How rows are grouped for MLX's CUDA kernels: shown on a CPU, where MLX has one kernel for all."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab.config import Quantization
from flashmoe_lab.gather import cuda_groups, gathered_mlp

WIDE = 4096 * 1024
COMPONENTS = ("weight", "scales", "biases")


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("count", [1, 7, 8, 10, 70])
def test_few_tokens_never_reach_the_matrix_kernel(rows, count):
    groups = list(cuda_groups(np.arange(count), rows, WIDE))
    assert all(1 <= len(pairs) == own < 8 for pairs, own, _, _ in groups)
    np.testing.assert_array_equal(np.concatenate([g[0] for g in groups]), np.arange(count))


@pytest.mark.parametrize("slots", [[3], [0, 511, 512, 2047], range(2048), [5] * 9])
def test_a_prompt_never_reaches_the_vector_kernel_nor_a_far_slot(slots):
    slots = np.array(slots)
    groups = list(cuda_groups(slots, 8, WIDE))
    assert all(len(pairs) >= 8 for pairs, _, _, _ in groups)
    for pairs, count, first, stop in groups:
        assert stop is not None
        assert ((slots[pairs] >= first) & (slots[pairs] < stop)).all()
        assert (stop - first) * WIDE <= 2**31
        assert count == len(np.unique(pairs))
    own = [np.unique(pairs) for pairs, _, _, _ in groups]
    np.testing.assert_array_equal(np.concatenate(own), np.arange(len(slots)))
    assert all(one[-1] < other[0] for one, other in pairwise(own))


@pytest.mark.parametrize("rows", [2, 9])
def test_grouping_changes_no_bit(monkeypatch, rng, rows):
    monkeypatch.setattr("flashmoe_lab.gather._STACK_CODES", 5 * 64 * 64)
    parts = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        made = mx.quantize(mx.array(rng.normal(size=(20, 64, 64)), mx.float32), 64, 4)
        parts |= {f"{name}.{part}": a for part, a in zip(COMPONENTS, made, strict=True)}
    x = mx.array(rng.normal(size=(rows, 64)), mx.float32)
    slots = np.sort(rng.integers(0, 20, 30))
    tokens = rng.integers(0, rows, 30)
    quantization = Quantization(bits=4, group_size=64)
    whole = gathered_mlp(x, tokens, slots, parts, quantization)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    grouped = gathered_mlp(x, tokens, slots, parts, quantization)
    np.testing.assert_array_equal(np.array(grouped), np.array(whole))
