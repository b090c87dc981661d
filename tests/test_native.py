"""The native kernels one by one: every instruction set that this machine runs, every form of a
matrix, and the promise that a row's bits depend on nothing but the row."""

import os

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import Quantization, kernels, native
from flashmoe_lab.checkpoint.quantize import dequantize_reference, pack_codes_reference

if not native.available:
    pytest.skip("the native kernels were not built", allow_module_level=True)

GROUPS, KINDS = (32, 64, 128), (mx.bfloat16, mx.float16, mx.float32)
FORMS = [Quantization(bits=b, group_size=g) for b in Quantization.BITS for g in GROUPS]
WIDE = 1024  # columns from which native_int takes integers
# Relative rms: float32 sums of a thousand products; 16-bit activations.
EXACT, INTEGER = 2e-6, 3e-4


@pytest.fixture(autouse=True)
def as_before(use_kernels):
    isa, threads = native.isa() or "", native.threads()
    yield
    native.set_isa(isa)
    native.set_threads(threads)


def as_float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def quantized(codes, scales, biases, quantization, kind):
    """The native matrix of given codes, and what it stands for in float64."""
    words = pack_codes_reference(codes, quantization.bits)
    scales, biases = (mx.array(part).astype(kind) for part in (scales, biases))
    matrix = native.matrix(mx.array(words), scales, biases, quantization)
    floats = as_float64(scales), as_float64(biases)
    return matrix, dequantize_reference(words, *floats, quantization)


def random_matrix(rng, rows, columns, quantization, kind):
    bits, groups = quantization.bits, columns // quantization.group_size
    codes = rng.integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    size = 1 / (2**bits * columns**0.5)
    scales = size * rng.normal(size=(rows, groups))  # half of them negative
    return quantized(codes, scales, -scales * 2**bits / 2, quantization, kind)


def product(matrix, x):
    return np.array(native.product(matrix, mx.array(x)))


def error(found, expected):
    return np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("quantization", FORMS, ids=str)
@pytest.mark.parametrize("name", ["native", "native_int"])
def test_product_of_every_form(rng, isa, name, quantization, kind):
    """One token and five, even and odd numbers of rows, columns that end within a register."""
    kernels.use(name)
    for rows, columns in ((17, WIDE + quantization.group_size), (5, WIDE), (1, 128)):
        matrix, truth = random_matrix(rng, rows, columns, quantization, kind)
        allowed = INTEGER if name == "native_int" and columns >= WIDE else EXACT
        x = rng.normal(size=(5, columns)).astype(np.float32)
        for tokens in (1, 5):
            found = product(matrix, x[:tokens])
            assert error(found, x[:tokens].astype(np.float64) @ truth.T) < allowed


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_product_of_plain_numbers(rng, isa, kind):
    for rows, columns in ((9, 200), (4, 64), (3, 7)):
        weight = mx.array(rng.normal(size=(rows, columns)) / columns**0.5).astype(kind)
        matrix = native.matrix(weight, None, None, None)
        x = rng.normal(size=(6, columns)).astype(np.float32)
        for tokens in (1, 6):
            truth = x[:tokens].astype(np.float64) @ as_float64(weight).T
            assert error(product(matrix, x[:tokens]), truth) < EXACT


EXTREMES = {
    "all codes 0": (0, 0.01, -0.02),
    "all codes at the top": (None, 0.01, -0.02),
    "negative scales": (None, -0.01, 0.045),
    "subnormal scales": (None, 1e-40, 0.0),
    "tiny scales": (None, 1e-35, 0.0),
    "scales of zero": (None, 0.0, 0.25),
    "large scales": (None, 1e30, -1e30),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("quantization", FORMS, ids=str)
def test_extreme_codes(rng, isa, quantization, extreme):
    code, scale, bias = EXTREMES[extreme]
    top = 2**quantization.bits - 1 if code is None else code
    shape = (3, WIDE + 128)
    groups = np.ones((3, shape[1] // quantization.group_size))
    codes = np.full(shape, top, np.uint8)
    matrix, truth = quantized(codes, scale * groups, bias * groups, quantization, mx.float32)
    x = np.abs(rng.normal(size=(1, shape[1]))).astype(np.float32)  # nothing cancels
    expected = x.astype(np.float64) @ truth.T
    # Of a scale times that of 16-bit activations no float32 keeps more than multiples of 2**-149.
    lost = 2.0**-150 * 2**15 * top * shape[1]
    for name, allowed, least in (("native", EXACT, 0), ("native_int", INTEGER, lost)):
        kernels.use(name)
        assert abs(product(matrix, x) - expected).max() <= allowed * abs(expected).max() + least


@pytest.mark.parametrize("name", ["native", "native_int"])
def test_activations_of_every_size(rng, isa, name):
    """Blocks of zeros, of tiny and of huge values in one row, each with a scale of its own."""
    kernels.use(name)
    matrix, truth = random_matrix(rng, 8, WIDE, Quantization(bits=4), mx.bfloat16)
    x = rng.normal(size=(1, WIDE)).astype(np.float32)
    for factor in (0.0, 1e-35, 1e-20, 1e20):
        one = x.copy()
        one[:, 64:192] *= np.float32(factor)
        expected = one.astype(np.float64) @ truth.T
        assert error(product(matrix, one), expected) < INTEGER
    np.testing.assert_array_equal(product(matrix, 0 * x), np.zeros((1, 8)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["native", "native_int"])
def test_what_is_not_finite_is_not_hidden(rng, isa, name, wrong):
    kernels.use(name)
    matrix, _ = random_matrix(rng, 4, WIDE, Quantization(bits=4), mx.bfloat16)
    x = rng.normal(size=(2, WIDE)).astype(np.float32)
    x[1, 77] = wrong
    found = product(matrix, x)
    assert np.isfinite(found[0]).all() and not np.isfinite(found[1]).any()


@pytest.mark.parametrize("quantization", [None, *FORMS], ids=str)
@pytest.mark.parametrize("name", ["native", "native_int"])
def test_a_row_depends_on_nothing_else(rng, isa, name, quantization):
    """Not on the tokens beside it, the number of threads, or the rows that a thread takes."""
    kernels.use(name)
    rows, columns = 83, WIDE + 128
    if quantization is None:
        weight = mx.array(rng.normal(size=(rows, columns)), mx.float32)
        matrix = native.matrix(weight, None, None, None)
    else:
        matrix, _ = random_matrix(rng, rows, columns, quantization, mx.bfloat16)
    x = rng.normal(size=(50, columns)).astype(np.float32)
    native.set_threads(1)
    whole = product(matrix, x)
    for threads in (1, 2, 3, 5):
        native.set_threads(threads)
        np.testing.assert_array_equal(product(matrix, x), whole)
        for start, stop in ((0, 1), (7, 8), (7, 9), (3, 50)):
            np.testing.assert_array_equal(product(matrix, x[start:stop]), whole[start:stop])


@pytest.mark.parametrize("quantization", FORMS, ids=str)
def test_rows_of_a_matrix(rng, isa, quantization):
    matrix, truth = random_matrix(rng, 9, 384, quantization, mx.bfloat16)
    found = np.array(native.dequantized_rows(matrix, mx.array([8, 0, 8])))
    np.testing.assert_allclose(found, truth[[8, 0, 8]], rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="outside of the matrix"):
        native.dequantized_rows(matrix, mx.array([9]))


def test_a_strided_stack_is_read_where_it_lies(rng):
    """Bank memory: a slot's matrix is followed by other things."""
    quantization, memory = Quantization(bits=4), mx.zeros((4, 3000), mx.uint32)
    codes = rng.integers(0, 16, (4, 16, 128), dtype=np.uint8)
    words = mx.array(pack_codes_reference(codes, 4).reshape(4, -1))
    memory[:, 5 : 5 + words.shape[1]] = words
    stack = memory[:, 5 : 5 + words.shape[1]].reshape(4, 16, 16)
    scales, biases = mx.ones((4, 16, 2)) / 16, mx.zeros((4, 16, 2))
    three = {}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        three |= {
            f"{projection}.weight": stack,
            f"{projection}.scales": scales,
            f"{projection}.biases": biases,
        }
    matrix = native.matrix(stack, scales, biases, quantization, stacked=True)
    assert (matrix.rows, matrix.columns) == (16, 128)
    with pytest.raises(ValueError, match="do not fit together"):  # 16 x 128 down: not 128 x 16
        native.expert_mlp(
            native.expert_stacks(three, quantization),
            np.ones((1, 128), np.float32),
            np.array([0]),
            np.array([0]),
        )


def test_parts_that_do_not_fit_are_refused(rng):
    words, scales = mx.zeros((4, 16), mx.uint32), mx.zeros((4, 2))
    with pytest.raises(ValueError, match="scales does not fit"):
        native.matrix(words, mx.zeros((4, 3)), scales, Quantization(bits=4))
    with pytest.raises(ValueError, match="biases does not fit"):
        native.matrix(words, scales, mx.zeros((3, 2)), Quantization(bits=4))
    matrix = native.matrix(words, scales, scales, Quantization(bits=4))
    with pytest.raises(ValueError, match="x must be 128 packed float32 numbers; it has 127"):
        matrix.product(np.ones((1, 127), np.float32), 1, np.ones((1, 4), np.float32))
    with pytest.raises(ValueError, match="out must be 4 packed float32 numbers; it has 3"):
        matrix.product(np.ones((1, 128), np.float32), 1, np.ones((1, 3), np.float32))


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="isa is 'avx9000'; this machine has .*portable"):
        native.set_isa("avx9000")
    with pytest.raises(ValueError, match="threads is 0; it must be 1 to 256"):
        native.set_threads(0)


def test_a_child_of_fork_computes(rng):
    """It has none of its parent's threads."""
    matrix, _ = random_matrix(rng, 400, WIDE, Quantization(bits=4), mx.bfloat16)
    x, out = rng.normal(size=(8, WIDE)).astype(np.float32), np.empty((8, 400), np.float32)
    matrix.product(x, 8, out)
    child = os.fork()
    if child == 0:
        again = np.empty_like(out)
        matrix.product(x, 8, again)
        os._exit(0 if np.array_equal(again, out) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
