"""What a sequence carries: copies are apart, files bring it back, strangers are refused."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import SequenceState
from flashmoe_lab.config import FULL, LINEAR
from flashmoe_lab.state import KV_STEP, AttentionState, DeltaState

NAMES = ["golden/hf", "layer_types", "next_mlx4"]


@pytest.fixture(params=NAMES)
def model(request, packed, make_model):
    return make_model(packed(request.param))


@pytest.fixture
def ids(rng):
    return rng.integers(0, 128, 40).tolist()


def read(model, tokens, state):
    return np.array(model(tokens, state))


def contents(state):
    """Every array of a state without unused room, in NumPy."""
    found = []
    for layer in state.layers:
        if isinstance(layer, AttentionState):
            found += [layer.keys[:, : layer.length], layer.values[:, : layer.length]]
        else:
            found += [layer.conv, layer.recurrent]
    return [np.array(array) for array in found]


def test_a_state_is_found_among_others_of_the_same_shape(config):
    """As in a list of those under way: comparing their arrays would raise."""
    states = [SequenceState.empty(config, mx.float32) for _ in range(3)]
    assert states.index(states[2]) == 2 and states[0] != states[1]
    layers = [layer for state in states for layer in state.layers]
    assert [layers.index(layer) for layer in layers] == list(range(len(layers)))


def assert_same(state, expected):
    for found, wanted in zip(contents(state), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_snapshot_is_not_moved_by_its_source(model, ids):
    state = model.empty_state()
    read(model, ids[:10], state)
    snapshot, before = state.snapshot(), contents(state)
    for token in ids[10:20]:
        read(model, [token], state)
    assert_same(snapshot, before)
    assert (snapshot.length, state.length) == (10, 20)
    assert snapshot.tokens == ids[:10]


def test_source_is_not_moved_by_its_snapshot(model, ids):
    state = model.empty_state()
    read(model, ids[:10], state)
    snapshot, before = state.snapshot(), contents(state)
    for token in ids[20:30]:
        read(model, [token], snapshot)
    assert_same(state, before)
    fresh = model.empty_state()
    expected = read(model, ids[:20], fresh)[10:]
    np.testing.assert_array_equal(read(model, ids[10:20], state), expected)


def test_two_branches_do_not_meet(model, ids):
    """Both go on from the same point with other tokens, in turns."""
    state = model.empty_state()
    read(model, ids[:10], state)
    other = state.snapshot()
    read(model, ids[10:15], state)
    read(model, ids[20:25], other)
    found = read(model, ids[15:20], state), read(model, ids[25:30], other)
    for logits, tokens in zip(found, (ids[:20], ids[:10] + ids[20:30]), strict=True):
        expected = read(model, tokens, model.empty_state())[15:]
        np.testing.assert_array_equal(logits, expected)


def test_restore_goes_back_again_and_again(model, ids):
    state = model.empty_state()
    read(model, ids[:10], state)
    snapshot, before = state.snapshot(), contents(state)
    answers = []
    for _ in range(3):
        answers.append(read(model, ids[10:20], state))
        state.restore(snapshot)
        assert_same(state, before)
        assert state.tokens == ids[:10]
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


def test_save_and_load(model, ids, tmp_path):
    state = model.empty_state()
    read(model, ids[:10], state)
    file = tmp_path / "state.safetensors"
    state.save(file)
    loaded = SequenceState.load(file, model.config)
    assert_same(loaded, contents(state))
    assert loaded.tokens == ids[:10]
    np.testing.assert_array_equal(read(model, ids[10:20], loaded), read(model, ids[10:20], state))


def test_save_leaves_unused_room_out(model, ids, tmp_path):
    state = model.empty_state()
    read(model, ids[:10], state)
    file = tmp_path / "state.safetensors"
    state.save(file)
    room = (KV_STEP - 10) * model.config.kv_nbytes_per_token(4)
    assert file.stat().st_size - (state.nbytes - room) < 10_000


def test_empty_state_is_saved_too(model, ids, tmp_path):
    file = tmp_path / "state.safetensors"
    model.empty_state().save(file)
    loaded = SequenceState.load(file, model.config)
    assert loaded.length == 0
    expected = read(model, ids, model.empty_state())
    np.testing.assert_array_equal(read(model, ids, loaded), expected)


def filled(config, dtype, tokens=5):
    """A state of a geometry without any model."""
    state = SequenceState.empty(config, dtype)
    for layer in state.layers:
        if isinstance(layer, AttentionState):
            shape = (config.num_key_value_heads, tokens, config.head_dim)
            layer.append(mx.ones(shape, dtype), mx.ones(shape, dtype))
    state.tokens = list(range(tokens))
    return state


@pytest.mark.parametrize("layers", range(1, 8))
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_types_come_back(config, tmp_path, dtype, layers):
    """Whichever array comes first in the file: the matrices are float32 always."""
    kinds = ((LINEAR, LINEAR, LINEAR, FULL) * 2)[:layers]
    for layer_types in (kinds, kinds[::-1]):
        geometry = replace(config, num_hidden_layers=layers, layer_types=layer_types)
        state = filled(geometry, dtype)
        state.save(tmp_path / "state.safetensors")
        loaded = SequenceState.load(tmp_path / "state.safetensors", geometry)
        for found, layer in zip(loaded.layers, state.layers, strict=True):
            if isinstance(found, AttentionState) and isinstance(layer, AttentionState):
                assert (found.keys.dtype, found.values.dtype) == (dtype, dtype)
                assert found.length == layer.length
            elif isinstance(found, DeltaState):
                assert (found.conv.dtype, found.recurrent.dtype) == (dtype, mx.float32)


GEOMETRIES = {
    "fewer key heads": dict(num_key_value_heads=1),
    "more key heads": dict(num_key_value_heads=6),
    "longer heads": dict(head_dim=32),
    "head of one": dict(head_dim=4),
    "value heads": dict(linear_num_value_heads=2),
    "value width": dict(linear_value_head_dim=8),
    "key width": dict(linear_key_head_dim=24),
    "convolution": dict(linear_conv_kernel_dim=3),
    "one layer less": dict(num_hidden_layers=1, layer_types=(LINEAR,)),
    "one layer more": dict(num_hidden_layers=3, layer_types=(LINEAR, FULL, LINEAR)),
    "kinds swapped": dict(layer_types=(FULL, LINEAR)),
}


@pytest.mark.parametrize("changed", GEOMETRIES)
def test_another_geometry_is_refused(config, tmp_path, changed):
    other = replace(config, **GEOMETRIES[changed])
    file = tmp_path / "state.safetensors"
    for written, wanted in ((config, other), (other, config)):
        filled(written, mx.float32).save(file)
        with pytest.raises(ValueError, match="state.safetensors: does not fit this model"):
            SequenceState.load(file, wanted)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100], ids=["empty", "short", "long"])
def test_damaged_file(config, tmp_path, content):
    file = tmp_path / "state.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="state.safetensors"):
        SequenceState.load(file, config)


def test_file_that_is_no_state(config, tmp_path):
    file = tmp_path / "weights.safetensors"
    mx.save_safetensors(str(file), {"a": mx.ones(3)})
    with pytest.raises(ValueError, match="weights.safetensors"):
        SequenceState.load(file, config)


def test_missing_file(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        SequenceState.load(tmp_path / "nowhere.safetensors", config)


@pytest.mark.parametrize(("dtype", "item"), [(mx.float32, 4), (mx.bfloat16, 2)])
def test_sizes_are_those_of_the_config(config, dtype, item):
    state = SequenceState.empty(config, dtype)
    assert state.nbytes == config.recurrent_nbytes(item)
    for tokens, room in ((1, KV_STEP), (KV_STEP, KV_STEP), (KV_STEP + 1, 2 * KV_STEP)):
        grown = filled(config, dtype, tokens).nbytes - state.nbytes
        assert grown == room * config.kv_nbytes_per_token(item)


def test_a_models_state_has_the_configs_size(model, ids):
    state, config = model.empty_state(), model.config
    read(model, ids, state)
    kv = KV_STEP * config.kv_nbytes_per_token(4)
    assert state.nbytes == config.recurrent_nbytes(4) + kv


def test_append_keeps_what_is_there(rng):
    state = AttentionState(mx.zeros((2, 0, 4)), mx.zeros((2, 0, 4)))
    keys, values = (rng.normal(size=(2, KV_STEP + 9, 4)).astype(np.float32) for _ in range(2))
    for start in range(0, KV_STEP + 9, 7):
        part = slice(start, start + 7)
        state.append(mx.array(keys[:, part]), mx.array(values[:, part]))
    assert (state.length, state.keys.shape[1]) == (KV_STEP + 9, 2 * KV_STEP)
    np.testing.assert_array_equal(np.array(state.keys[:, : state.length]), keys)
    np.testing.assert_array_equal(np.array(state.values[:, : state.length]), values)
    assert not np.array(state.keys[:, state.length :]).any()
