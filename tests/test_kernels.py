"""Every variant of every operation against the float64 reference beside it."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import Quantization, kernels
from flashmoe_lab.checkpoint.quantize import dequantize_reference
from flashmoe_lab.kernels import DELTA_RULE, EXPERT_MLP, ExpertWeights, delta_rule, expert_mlp

HIDDEN, FFN, SLOTS = 128, 256, 6
SHAPES = {"gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}
FORMS = [
    (None, mx.float32),
    (None, mx.bfloat16),
    *((Quantization(bits=bits), mx.bfloat16) for bits in Quantization.BITS),
    (Quantization(bits=4, group_size=32), mx.bfloat16),
    (Quantization(bits=4, group_size=128), mx.bfloat16),
    (Quantization(bits=3, group_size=32), mx.float16),
    (Quantization(bits=4), mx.float32),
]
PAIRS = {
    "one token, three experts": ([0, 0, 0], [1, 2, 5]),
    "one pair": ([0], [3]),
    "many": ([0, 4, 1, 0, 2, 3, 4], [0, 0, 2, 3, 3, 3, 5]),
    "all in one slot": ([0, 1, 2, 3, 4], [4, 4, 4, 4, 4]),
}
on_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="bitwise on a CPU only")


def make_weights(rng, quantization, dtype):
    components = {}
    for projection, (rows, columns) in SHAPES.items():
        weight = mx.array(rng.normal(size=(SLOTS, rows, columns)) / columns**0.5, dtype)
        if quantization is None:
            components[f"{projection}.weight"] = weight
            continue
        parts = mx.quantize(weight, quantization.group_size, quantization.bits)
        for name, part in zip(("weight", "scales", "biases"), parts, strict=True):
            components[f"{projection}.{name}"] = part
    return ExpertWeights(components=components, quantization=quantization)


def matrices(weights, slot):
    """A slot's matrices in float64."""
    found = {}
    for projection in SHAPES:
        parts = {
            name: weights.components[f"{projection}.{name}"][slot]
            for name in ("weight", "scales", "biases")
            if f"{projection}.{name}" in weights.components
        }
        floats = {
            name: np.array(part.astype(mx.float32)).astype(np.float64)
            for name, part in parts.items()
            if part.dtype != mx.uint32
        }
        found[projection] = (
            floats.get("weight")
            if weights.quantization is None
            else (
                dequantize_reference(
                    np.array(parts["weight"]),
                    floats["scales"],
                    floats["biases"],
                    weights.quantization,
                )
            )
        )
    return found


def reference(x, tokens, slots, weights):
    rows = [
        kernels.expert_mlp_reference(x[token][None], matrices(weights, slot))[0]
        for token, slot in zip(tokens, slots, strict=True)
    ]
    return np.array(rows)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("variant", EXPERT_MLP)
def test_expert_mlp(rng, variant, form, pairs):
    tokens, slots = map(np.array, PAIRS[pairs])
    weights, x = make_weights(rng, *form), rng.normal(size=(tokens.max() + 1, HIDDEN))
    found = expert_mlp(mx.array(x, mx.float32), tokens, slots, weights, variant)
    assert (found.shape, found.dtype) == ((len(tokens), HIDDEN), mx.float32)
    expected = reference(x, tokens, slots, weights)
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=2e-6 * abs(expected).max())


@on_cpu
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_variants_on_mlx_give_the_same_bits(rng, form, pairs):
    tokens, slots = map(np.array, PAIRS[pairs])
    weights, x = make_weights(rng, *form), mx.array(rng.normal(size=(5, HIDDEN)), mx.float32)
    first, second = (
        np.array(expert_mlp(x, tokens, slots, weights, v)) for v in ("by_expert", "gather")
    )
    np.testing.assert_array_equal(second, first)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("form", [FORMS[1], FORMS[4], FORMS[-1]], ids=str)
@pytest.mark.parametrize("variant", EXPERT_MLP)
def test_result_has_the_type_of_x(rng, variant, form, dtype):
    x, one = mx.ones((1, HIDDEN), dtype), np.array([0])
    assert expert_mlp(x, one, one, make_weights(rng, *form), variant).dtype == dtype


@pytest.mark.parametrize("largest_small_nbytes", [0, 1 << 30])
def test_default_variant_on_mlx(rng, monkeypatch, use_kernels, largest_small_nbytes):
    use_kernels("mlx")
    monkeypatch.setattr("flashmoe_lab.kernels._SMALL_EXPERT_NBYTES", largest_small_nbytes)
    large_on_cpu = mx.default_device() == mx.cpu and largest_small_nbytes == 0
    default = "by_expert" if large_on_cpu else "gather"
    monkeypatch.setitem(EXPERT_MLP, default, lambda *arguments: "chosen")
    weights = make_weights(rng, None, mx.float32)
    assert expert_mlp(mx.ones((1, HIDDEN)), np.array([0]), np.array([0]), weights) == "chosen"


@on_cpu
def test_native_is_the_default_on_a_cpu(rng, monkeypatch):
    monkeypatch.setitem(EXPERT_MLP, "native", lambda *arguments: "chosen")
    weights, one = make_weights(rng, None, mx.float32), np.array([0])
    assert expert_mlp(mx.ones((1, HIDDEN)), one, one, weights) == "chosen"


def test_kernels_by_name(monkeypatch, use_kernels):
    assert kernels.used() == "native_int"
    monkeypatch.setenv("FLASHMOE_KERNELS", "native")
    kernels.use(None)
    assert kernels.used() == "native"
    kernels.use("mlx")
    assert not kernels.native_for(mx.float32)
    with pytest.raises(ValueError, match="'fast'; known are mlx, native, native_int"):
        kernels.use("fast")
    monkeypatch.delenv("FLASHMOE_KERNELS")


def test_half_precision_is_never_native():
    assert not kernels.native_for(mx.bfloat16)
    assert not kernels.native_for(mx.float16)


def test_without_the_native_kernels(monkeypatch, use_kernels):
    """Whoever asks for nothing is told once; whoever asks for MLX is not; nothing is silent."""
    monkeypatch.setattr(kernels.native, "available", False)
    monkeypatch.setattr(kernels.native, "missing", "was not built here")
    with pytest.warns(UserWarning, match="much slower"):
        kernels.use(None)
    assert kernels.used() == "mlx"
    kernels.use("mlx")
    with pytest.raises(RuntimeError, match="_native was not built"):
        kernels.use("native")
    monkeypatch.undo()


def test_unknown_variant(rng):
    weights, one = make_weights(rng, None, mx.float32), np.array([0])
    with pytest.raises(ValueError, match="variant is 'fast'; known are by_expert, gather, native"):
        expert_mlp(mx.ones((1, HIDDEN)), one, one, weights, "fast")
    with pytest.raises(ValueError, match="variant is 'fast'; known are mlx"):
        delta_rule(*as_mlx(delta_inputs(rng, 1)), variant="fast")


def delta_inputs(rng, tokens, decay=0.9, heads=3, dk=8, dv=16):
    unit = rng.normal(size=(2, tokens, heads, dk))
    q, k = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    v = rng.normal(size=(tokens, heads, dv))
    beta = rng.uniform(0.05, 0.95, (tokens, heads))
    state = rng.normal(size=(heads, dv, dk))
    return q, k, v, np.full((tokens, heads), decay), beta, state


def as_mlx(arrays):
    q, k, v, decay, beta, state = (mx.array(array, mx.float32) for array in arrays)
    return q, k, v, decay, beta, state


@pytest.mark.parametrize("tokens", [1, 2, 64, 130])
@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.9, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("variant", DELTA_RULE)
def test_delta_rule(rng, variant, decay, tokens):
    inputs = delta_inputs(rng, tokens, decay)
    out, state = delta_rule(*as_mlx(inputs), variant=variant)
    expected = kernels.delta_rule_reference(*inputs)
    assert (out.dtype, state.dtype) == (mx.float32, mx.float32)
    np.testing.assert_allclose(np.array(out), expected[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.array(state), expected[1], rtol=0, atol=1e-5)


@on_cpu
@pytest.mark.parametrize("variant", DELTA_RULE)
def test_delta_rule_in_pieces(rng, variant):
    q, k, v, decay, beta, state = as_mlx(delta_inputs(rng, 130))
    whole, end = delta_rule(q, k, v, decay, beta, state, variant=variant)
    outs, edges = [], (0, 1, 8, 75, 130)
    for start, stop in zip(edges, edges[1:], strict=False):
        q1, k1, v1, decay1, beta1 = (part[start:stop] for part in (q, k, v, decay, beta))
        out, state = delta_rule(q1, k1, v1, decay1, beta1, state, variant=variant)
        outs.append(out)
    np.testing.assert_array_equal(np.array(mx.concatenate(outs)), np.array(whole))
    np.testing.assert_array_equal(np.array(state), np.array(end))


def test_delta_reference_learns_a_value():
    """beta 1 and no decay: what was stored under a key comes out when it is asked for."""
    key, value = np.array([[[0.6, 0.8]]]), np.array([[[1.0, 2, 3]]])
    one, other = np.ones((1, 1)), np.array([[[5.0, 5, 5]]])
    _, state = kernels.delta_rule_reference(key, key, other, one, one, np.zeros((1, 3, 2)))
    out, _ = kernels.delta_rule_reference(key, key, value, one, one, state)
    np.testing.assert_allclose(out, value)
