"""What is made of weights once and kept: it must see every change of them, in place or not, and
never memory that they have left."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import native
from flashmoe_lab.stages.linear import Linear

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu or not native.available, reason="native on a CPU only"
)


def scale(array):
    array *= 2


def add(array):
    array += 1


def write(array):
    array[3] = 7


IN_PLACE = [scale, add, write]


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("held", [True, False])
def test_a_weight_written_in_place_is_used(rng, change, held):
    """Python sees the same object, with or without somebody who keeps the numbers of before."""
    linear = Linear(mx.array(rng.normal(size=(64, 256)), mx.float32))
    mx.eval(linear.weight)
    x = mx.array(rng.normal(size=(1, 256)), mx.float32)
    before = np.array(linear(x))
    second = linear.weight[:] if held else None
    change(linear.weight)
    after = np.array(linear(x))
    assert not np.array_equal(after, before)
    np.testing.assert_allclose(after, np.array(x @ linear.weight.T), rtol=1e-4, atol=1e-4)
    if second is not None:
        np.testing.assert_allclose(np.array(Linear(second)(x)), before)


@pytest.mark.parametrize("change", IN_PLACE)
def test_a_norm_in_a_layer_written_in_place_is_used(packed, sample, make_model, change):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:5]
    full = next(layer for layer in model.layers if layer.kind == "full_attention")
    for norm in (full.post_norm, full.mixer.q_norm):
        before = np.array(model(ids, model.empty_state()))
        change(norm.weight)
        changed = np.array(model(ids, model.empty_state()))
        assert not np.array_equal(changed, before)
        with model.intercept("layers.*", lambda result, path: None):
            np.testing.assert_array_equal(np.array(model(ids, model.empty_state())), changed)


def test_a_native_matrix_keeps_its_numbers(rng):
    """It reads its own alias: the caller's object may get other memory and the old be reused."""
    weight = mx.array(rng.normal(size=(64, 256)), mx.float32)
    x = mx.array(rng.normal(size=(1, 256)), mx.float32)
    matrix = native.matrix(weight, None, None, None)
    before = np.array(native.product(matrix, x))
    weight *= 2
    mx.eval(weight)
    others = [mx.full((64, 256), 777.0) for _ in range(20)]
    mx.eval(others)
    np.testing.assert_array_equal(np.array(native.product(matrix, x)), before)


def test_what_did_not_change_is_not_made_again():
    """Or every token would pay for it."""
    kept, part, made = native.Kept(), mx.ones(8), []
    for _ in range(3):
        kept.get((part, 1e-6, None), lambda: made.append(1))
    assert len(made) == 1
    part += 1
    kept.get((part, 1e-6, None), lambda: made.append(1))
    kept.get((part, 2e-6, None), lambda: made.append(1))
    assert len(made) == 3


def test_a_part_that_cannot_be_used_is_tried_again():
    kept, part = native.Kept(), mx.ones(8)

    def fail():
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            kept.get((part,), fail)
