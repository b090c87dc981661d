"""GatedDeltaNet, whole and in pieces."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab.stages.delta_net import GatedDeltaNet
from flashmoe_lab.stages.norm import RMSNorm
from flashmoe_lab.state import DeltaState, SequenceState

on_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="bitwise on a CPU only")


@pytest.fixture
def make(linear, rng):
    def make(config):
        hidden, heads = config.hidden_size, config.linear_num_value_heads
        value = config.linear_value_dim
        shapes = [(rows, hidden) for rows in (config.conv_dim, value, heads, heads)]
        conv = rng.normal(size=(config.conv_dim, config.linear_conv_kernel_dim, 1))
        scale = mx.array(rng.normal(1, 0.3, config.linear_value_head_dim), mx.float32)
        return GatedDeltaNet(
            config,
            *(linear(*shape) for shape in [*shapes, (hidden, value)]),
            conv1d=mx.array(conv, mx.float32),
            A_log=mx.array(rng.uniform(-3, 1, heads), mx.float32),
            dt_bias=mx.array(rng.normal(size=heads), mx.float32),
            norm=RMSNorm(scale, config.rms_norm_eps),
        )

    return make


def state_of(config, dtype=mx.float32) -> DeltaState:
    state = SequenceState.empty(config, dtype)[0]
    assert isinstance(state, DeltaState)
    return state


def run(stage, config, x, chunk=None):
    state, chunk = state_of(config), chunk or len(x)
    x = mx.array(x, mx.float32)
    outs = [np.array(stage(x[i : i + chunk], state)) for i in range(0, len(x), chunk)]
    return np.concatenate(outs), state


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        dict(linear_num_value_heads=2),
        dict(linear_num_key_heads=1),
        dict(linear_key_head_dim=32, linear_value_head_dim=8),
        dict(linear_conv_kernel_dim=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_against_reference(make, config, rng, sizes, tokens):
    config = replace(config, **sizes)
    stage, x = make(config), rng.normal(size=(tokens, 64))
    np.testing.assert_allclose(run(stage, config, x)[0], stage.reference(x), rtol=0, atol=2e-5)


def test_state_keeps_no_more_than_it_shows(make, config, rng):
    """What is kept of a long prompt are its last inputs, not the buffer that they lie in."""
    stage, tokens = make(config), 4000
    x = mx.array(rng.normal(size=(tokens, 64)), mx.float32)
    mx.eval(x)
    before = mx.get_active_memory()
    state = state_of(config)
    mx.eval(stage(x, state), state.conv, state.recurrent)
    kept = mx.get_active_memory() - before
    assert kept < tokens * config.conv_dim * 4 / 2


@on_cpu
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_pieces_are_the_whole(make, config, rng, chunk):
    stage, x = make(config), rng.normal(size=(70, 64))
    whole, end = run(stage, config, x)
    pieces, state = run(stage, config, x, chunk)
    np.testing.assert_array_equal(pieces, whole)
    np.testing.assert_array_equal(np.array(state.recurrent), np.array(end.recurrent))
    np.testing.assert_array_equal(np.array(state.conv), np.array(end.conv))


def test_state_is_the_last_inputs_of_the_convolution(make, config, rng):
    stage, x = make(config), rng.normal(size=(9, 64))
    _, state = run(stage, config, x, 4)
    expected = stage.in_proj_qkv.reference(x)[-3:]
    np.testing.assert_allclose(np.array(state.conv), expected, rtol=0, atol=5e-6)


def test_half_precision_keeps_a_float32_state(make, config, rng):
    stage, state = make(config), state_of(config, mx.bfloat16)
    stage.conv1d = stage.conv1d.astype(mx.bfloat16)
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"):
        matrix = getattr(stage, name)
        matrix.weight = matrix.weight.astype(mx.bfloat16)
    out = stage(mx.array(rng.normal(size=(3, 64)), mx.bfloat16), state)
    assert (out.dtype, state.conv.dtype) == (mx.bfloat16, mx.bfloat16)
    assert state.recurrent.dtype == mx.float32
