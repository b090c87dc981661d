"""RMS normalisation."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab.stages.norm import RMSNorm


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])  # at 1e-4 eps decides
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (3, 2, 64)])
def test_against_reference(rng, shape, size):
    norm = RMSNorm(mx.array(rng.normal(size=64), mx.float32), 1e-6)
    x = (rng.normal(size=shape) * size).astype(np.float32)
    found = np.array(norm(mx.array(x)))
    np.testing.assert_allclose(found, norm.reference(x.astype(np.float64)), rtol=0, atol=5e-6)


def test_reference_is_the_definition():
    norm = RMSNorm(mx.array([1.0, 2.0]), 0.5)
    np.testing.assert_allclose(norm.reference(np.array([[3.0, 4.0]])), [[3 / 13**0.5, 8 / 13**0.5]])


def test_result_has_the_type_of_x():
    assert RMSNorm(mx.ones(8), 1e-6)(mx.ones((2, 8), mx.bfloat16)).dtype == mx.bfloat16
