"""The shared elementwise functions."""

import mlx.core as mx
import numpy as np

from flashmoe_lab.stages.activation import sigmoid64, silu, silu64

X = np.linspace(-80, 80, 401)


def test_silu_against_reference():
    np.testing.assert_allclose(np.array(silu(mx.array(X, mx.float32))), silu64(X), atol=1e-5)


def test_references_are_the_definition():
    np.testing.assert_allclose(sigmoid64(X), 1 / (1 + np.exp(-X)), rtol=1e-14)
    np.testing.assert_allclose(silu64(X), X / (1 + np.exp(-X)), rtol=1e-14)


def test_no_overflow_far_out():
    np.testing.assert_array_equal(sigmoid64(np.array([-1e4, 1e4])), [0, 1])
