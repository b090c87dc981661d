"""The shared expert."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import Quantization
from flashmoe_lab.stages.shared_expert import SharedExpert


@pytest.fixture(params=[None, Quantization(bits=4)], ids=str)
def shared(linear, request) -> SharedExpert:
    shapes = ((128, 64), (128, 64), (64, 128), (1, 64))
    return SharedExpert(*(linear(*shape, request.param) for shape in shapes))


@pytest.mark.parametrize("tokens", [1, 9])
def test_against_reference(shared, rng, tokens):
    x = rng.normal(size=(tokens, 64))
    found = np.array(shared(mx.array(x, mx.float32)))
    np.testing.assert_allclose(found, shared.reference(x), rtol=0, atol=5e-6)


def test_closed_gate_gives_nothing(shared, rng):
    x = rng.normal(size=(1, 64))
    gate = shared.shared_expert_gate.weight64()
    away = -x[0] @ gate[0] / (gate[0] @ gate[0]) * gate[0]  # x without its part along the gate
    shut = x + away - 50 * gate / (gate[0] @ gate[0])  # gate(shut) is -50
    assert abs(shared.reference(shut)).max() < 1e-18
    assert abs(np.array(shared(mx.array(shut, mx.float32)))).max() < 1e-15
