"""Gated attention, whole and in pieces."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab.stages import attention as attention_module
from flashmoe_lab.stages.attention import GatedAttention
from flashmoe_lab.stages.norm import RMSNorm
from flashmoe_lab.state import KV_STEP, AttentionState, SequenceState

on_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="bitwise on a CPU only")


@pytest.fixture
def make(linear, rng):
    def make(config):
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        hidden = config.hidden_size
        shapes = ((2 * query, hidden), (key, hidden), (key, hidden), (hidden, query))
        weights = [mx.array(rng.normal(1, 0.3, config.head_dim), mx.float32) for _ in range(2)]
        norms = [RMSNorm(weight, config.rms_norm_eps) for weight in weights]
        return GatedAttention(config, *(linear(*shape) for shape in shapes), *norms)

    return make


def state_of(config) -> AttentionState:
    state = SequenceState.empty(config, mx.float32)[1]
    assert isinstance(state, AttentionState)
    return state


def run(stage, config, x, chunk=None):
    state, chunk = state_of(config), chunk or len(x)
    x = mx.array(x, mx.float32)
    outs = [np.array(stage(x[i : i + chunk], state)) for i in range(0, len(x), chunk)]
    assert state.length == len(x)
    return np.concatenate(outs)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        dict(num_attention_heads=8, num_key_value_heads=1),
        dict(num_attention_heads=4, num_key_value_heads=4),
        dict(partial_rotary_factor=1.0),
        dict(rope_theta=1e7, head_dim=32, partial_rotary_factor=0.25),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 70])
def test_against_reference(make, config, rng, sizes, tokens):
    config = replace(config, **sizes)
    stage, x = make(config), rng.normal(size=(tokens, 64))
    np.testing.assert_allclose(run(stage, config, x), stage.reference(x), rtol=0, atol=5e-6)


@on_cpu
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_pieces_are_the_whole(make, config, rng, chunk):
    stage, x = make(config), rng.normal(size=(70, 64))
    np.testing.assert_array_equal(run(stage, config, x, chunk), run(stage, config, x))


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("position", [0, 5, 100])
def test_fused_variant_is_the_same(rng, tokens, position):
    q = mx.array(rng.normal(size=(6, tokens, 16)), mx.float32)
    shape = (2, KV_STEP, 16)
    keys, values = (mx.array(rng.normal(size=shape), mx.float32) for _ in range(2))
    by_row = attention_module._attend_by_row(q, keys, values, position)
    fused = attention_module._attend_fused(q, keys, values, position)
    np.testing.assert_allclose(np.array(by_row), np.array(fused), rtol=0, atol=2e-6)


@on_cpu
def test_growing_the_buffer_keeps_what_is_there(make, config, rng):
    stage, x = make(config), rng.normal(size=(KV_STEP + 4, 64))
    found = run(stage, config, x, KV_STEP - 1)
    np.testing.assert_allclose(found, stage.reference(x), rtol=0, atol=5e-6)


def test_later_tokens_change_nothing(make, config, rng):
    stage, x = make(config), rng.normal(size=(20, 64))
    changed = np.concatenate([x[:12], rng.normal(size=(8, 64))])
    np.testing.assert_array_equal(run(stage, config, x)[:12], run(stage, config, changed)[:12])


def test_position_matters(make, config, rng):
    """The same two tokens, one or nine apart: only rotation tells them apart."""
    stage = make(config)
    a, b = rng.normal(size=(2, 1, 64))
    near = stage.reference(np.concatenate([a, b]))[-1]
    far = stage.reference(np.concatenate([a] * 9 + [b]))[-1]
    near32 = run(stage, config, np.concatenate([a, b]))[-1]
    assert abs(near - far).max() > 1e-2
    np.testing.assert_allclose(near32, near, rtol=0, atol=5e-6)
