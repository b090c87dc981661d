"""A matrix product, quantised or not."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import Quantization
from flashmoe_lab.stages import linear as linear_module

QUANTIZATIONS = [None, *(Quantization(bits=bits) for bits in Quantization.BITS)]
QUANTIZATIONS += [Quantization(bits=4, group_size=32), Quantization(bits=4, group_size=128)]


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_product_against_reference(linear, rng, quantization):
    matrix, x = linear(24, 128, quantization), rng.normal(size=(5, 128))
    found = matrix(mx.array(x, mx.float32))
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), matrix.reference(x), rtol=0, atol=1e-5)
    np.testing.assert_allclose(matrix.reference(x), x @ matrix.weight64().T, rtol=1e-12)


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_rows_against_reference(linear, quantization):
    matrix, index = linear(24, 128, quantization), [3, 0, 23, 3]
    found = np.array(matrix.rows(mx.array(index), mx.float32))
    np.testing.assert_allclose(found, matrix.weight64(np.array(index)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("quantization", QUANTIZATIONS[:2], ids=str)
def test_reference_in_pieces_is_the_whole(linear, rng, quantization, monkeypatch):
    matrix, x = linear(24, 128, quantization), rng.normal(size=(5, 128))
    whole = matrix.reference(x)
    monkeypatch.setattr(linear_module, "_REFERENCE_ROWS", 7)
    np.testing.assert_allclose(matrix.reference(x), whole, rtol=1e-12)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_result_has_the_type_of_x(linear, dtype):
    matrix = linear(24, 128, Quantization(bits=4))
    assert matrix(mx.ones((1, 128), dtype)).dtype == dtype
    assert matrix.rows(mx.array([1]), dtype).dtype == dtype


def test_sizes(linear):
    quantization = Quantization(bits=4)
    matrix = linear(24, 128, quantization)
    assert matrix.out_features == 24
    assert matrix.nbytes == quantization.nbytes((24, 128), scale_nbytes=4)
    assert linear(24, 128).nbytes == 24 * 128 * 4
