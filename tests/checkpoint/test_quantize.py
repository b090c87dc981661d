"""MLX's quantisation, our reading of its packing, and the rule written in NumPy agree."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashmoe_lab.checkpoint.quantize import (
    dequantize_reference,
    from_mlx,
    pack_codes_reference,
    quantize,
    quantize_reference,
    to_mlx,
    unpack_codes_reference,
)
from flashmoe_lab.checkpoint.tensor_file import Tensor
from flashmoe_lab.config import Quantization

ALL = [Quantization(bits=b, group_size=g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
IDS = [f"{q.bits}b-g{q.group_size}" for q in ALL]
NORMAL = np.random.default_rng(11).normal(size=(6, 256)).astype(np.float32)

MATRICES = {
    "random": NORMAL,
    "one sign up": abs(NORMAL) + 1,
    "one sign down": -abs(NORMAL) - 1,
    "constant rows": np.repeat(NORMAL[:, :1], 256, axis=1),
    "zeros": np.zeros((6, 256), np.float32),
    "negative zeros": np.full((6, 256), -0.0, np.float32),
    "huge": NORMAL * np.float32(1e37),
    "tiny": NORMAL * np.float32(1e-8),
    "subnormal": NORMAL * np.float32(1e-40),
    "outlier up": np.where(np.arange(256) % 50 == 7, np.float32(1000), NORMAL),
    "outlier down": np.where(np.arange(256) % 50 == 7, np.float32(-1000), NORMAL),
}


def dequantised(parts, quantization):
    words, scales, biases = (part.data for part in parts.values())
    return dequantize_reference(words, scales, biases, quantization)


def float32(value):
    return Tensor(dtype="F32", data=np.asarray(value, np.float32))


@pytest.mark.parametrize("quantization", ALL, ids=IDS)
@pytest.mark.parametrize("name", MATRICES)
def test_mlx_follows_the_reference(name, quantization):
    weight = MATRICES[name]
    parts = quantize(float32(weight), quantization)
    codes, scales, biases = quantize_reference(weight, quantization)
    assert np.allclose(parts["scales"].data, scales, rtol=1e-6, atol=0)
    assert np.allclose(parts["biases"].data, biases, rtol=1e-6, atol=0)
    found = unpack_codes_reference(parts["weight"].data, quantization.bits)
    off = abs(found.astype(int) - codes)
    # A value half way between two codes may round either way in float32.
    assert off.max() <= 1 and off.mean() < 1e-3


@pytest.mark.parametrize("quantization", ALL, ids=IDS)
@pytest.mark.parametrize("name", MATRICES)
def test_dequantize_is_that_of_mlx(name, quantization):
    parts = quantize(float32(MATRICES[name]), quantization)
    ours = dequantised(parts, quantization)
    mlx = mx.dequantize(
        *map(to_mlx, parts.values()), group_size=quantization.group_size, bits=quantization.bits
    )
    scale = max(abs(ours).max(), 1e-30)
    assert abs(ours - np.array(mlx)).max() <= 2e-7 * scale


@pytest.mark.parametrize("quantization", ALL, ids=IDS)
@pytest.mark.parametrize("name", ["random", "one sign up", "one sign down", "huge"])
def test_no_value_moves_by_more_than_a_step(name, quantization):
    weight = MATRICES[name].astype(np.float64)
    parts = quantize(float32(weight), quantization)
    back = dequantised(parts, quantization)
    step = abs(np.repeat(parts["scales"].data, quantization.group_size, axis=1))
    assert (abs(back - weight) <= 1.01 * step).all()


def test_negative_scales_occur_and_are_read():
    quantization = Quantization(bits=4)
    parts = quantize(float32(MATRICES["one sign up"]), quantization)
    assert (parts["scales"].data < 0).all()
    assert np.array_equal(parts["biases"].data[0, 0], MATRICES["one sign up"][0, :64].max())
    back = dequantised(parts, quantization)
    assert abs(back - MATRICES["one sign up"]).max() < 0.2


@pytest.mark.parametrize("dtype, kind", [("BF16", mx.bfloat16), ("F16", mx.float16)])
def test_scales_have_the_type_of_the_weights(dtype, kind):
    weight = from_mlx(mx.array(NORMAL).astype(kind))
    assert weight.dtype == dtype
    parts = quantize(weight, Quantization(bits=4))
    assert [part.dtype for part in parts.values()] == ["U32", dtype, dtype]
    expected = mx.quantize(mx.array(NORMAL).astype(kind), group_size=64, bits=4)
    for part, array in zip(parts.values(), expected, strict=True):
        assert bytes(part.bytes_view()) == bytes(from_mlx(array).bytes_view())


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "U32", "U8"])
def test_to_mlx_and_back(dtype):
    values = np.arange(24).reshape(4, 6)
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}
    tensor = Tensor(dtype=dtype, data=values.astype(kinds[dtype]))
    back = from_mlx(to_mlx(tensor))
    assert back.dtype == dtype and back.data.dtype == tensor.data.dtype
    assert np.array_equal(back.data, tensor.data)


@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.data())
def test_packing_and_unpacking_are_inverse(bits, data):
    shape = (data.draw(st.integers(1, 3)), 32 * data.draw(st.integers(1, 4)))
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    words = pack_codes_reference(codes, bits)
    assert words.dtype == np.dtype("<u4") and words.shape == (shape[0], shape[1] * bits // 32)
    assert np.array_equal(unpack_codes_reference(words, bits), codes)


@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.data())
def test_unpacking_and_packing_are_inverse(bits, data):
    shape = (data.draw(st.integers(1, 3)), bits * data.draw(st.integers(1, 3)))
    words = data.draw(hnp.arrays(np.dtype("<u4"), shape))
    codes = unpack_codes_reference(words, bits)
    assert codes.max() < 2**bits
    assert np.array_equal(pack_codes_reference(codes, bits), words)


def test_first_code_is_in_the_lowest_bits():
    codes = np.arange(8, dtype=np.uint8)[None]
    assert pack_codes_reference(codes, 4).tolist() == [[0x76543210]]
    assert pack_codes_reference(np.array([[3, 0, 0, 1] + [0] * 12], np.uint8), 2).item() == 0x43


def test_stacked_matrices_unpack_and_dequantize():
    parts = quantize(float32(NORMAL), Quantization(bits=4))
    words, scales, biases = (part.data.reshape(2, 3, -1) for part in parts.values())
    whole = dequantised(parts, Quantization(bits=4)).reshape(2, 3, 256)
    stacked = dequantize_reference(words, scales, biases, Quantization(bits=4))
    assert np.array_equal(stacked, whole)


@pytest.mark.parametrize("shape", [(4, 96), (4, 63), (256,), (2, 4, 64)])
@pytest.mark.parametrize("function", [quantize, quantize_reference])
def test_rows_that_are_no_whole_groups_are_refused(function, shape):
    weight = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"cannot be quantised in groups of 64.*--group-size"):
        function(float32(weight) if function is quantize else weight, Quantization(bits=4))
