"""Resident weights in memory: types by backend, quantised matrices as stored."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import PackedCheckpoint
from flashmoe_lab.config import is_matrix
from flashmoe_lab.weights import DTYPES, Weights, activation_dtype


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_by_name(name):
    assert str(activation_dtype(name)).endswith(name)


def test_default_dtype_is_that_of_the_device():
    on_cpu = mx.default_device() == mx.cpu
    assert activation_dtype(None) == (mx.float32 if on_cpu else mx.bfloat16)


def test_unknown_dtype():
    with pytest.raises(ValueError, match="dtype is 'int8'; known are float32, bfloat16, float16"):
        activation_dtype("int8")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["bf16", "golden/hf", "next_mlx4"])
def test_unquantised_matrices_take_the_type_of_activations(packed, name, dtype):
    checkpoint = PackedCheckpoint(packed(name))
    weights = Weights(checkpoint, dtype)
    quantized = checkpoint.manifest.resident_quantization
    assert set(weights.arrays) == set(checkpoint.resident)
    for tensor, array in weights.arrays.items():
        if is_matrix(tensor) and tensor.removesuffix(".weight") not in quantized:
            assert array.dtype == dtype
    assert weights.nbytes == sum(array.nbytes for array in weights.arrays.values())


def test_quantised_matrices_stay_as_stored(packed):
    checkpoint = PackedCheckpoint(packed("golden/mlx4"))
    weights = Weights(checkpoint, mx.float32)
    for path, quantization in checkpoint.manifest.resident_quantization.items():
        linear = weights.linear(path)
        assert linear.quantization == quantization
        stored = checkpoint.resident[f"{path}.weight"].read().data
        np.testing.assert_array_equal(np.array(linear.weight), stored)
        assert linear.scales is not None
        assert linear.scales.nbytes == checkpoint.resident[f"{path}.scales"].nbytes
    gate = weights.linear("model.layers.0.mlp.gate").quantization
    head = weights.linear("lm_head").quantization
    assert gate and head and (gate.bits, head.bits) == (8, 4)


def test_norms_are_float32(packed):
    weights = Weights(PackedCheckpoint(packed("bf16")), mx.bfloat16)
    assert weights.norm("model.norm", 1e-5).weight.dtype == mx.float32
    assert weights.norm("model.norm", 1e-5).eps == 1e-5


def test_matrix_that_is_not_quantised(packed):
    linear = Weights(PackedCheckpoint(packed("bf16")), mx.float32).linear("lm_head")
    assert (linear.quantization, linear.scales, linear.biases) == (None, None, None)
