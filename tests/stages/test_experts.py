"""The experts' sum depends on routing and weights, not on where and when experts came."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab.stages.router import route

on_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="bitwise on a CPU only")
LAYER = 1


@pytest.fixture
def routing(rng):
    return route(mx.array(rng.normal(size=(20, 8)), mx.float32), 3)


@pytest.fixture
def x(rng):
    return rng.normal(size=(20, 128))


def run(model, x, routing):
    layer = model.layers[LAYER]
    return np.array(layer.experts(mx.array(x, mx.float32), routing, layer.fetch(routing)))


def reference(model, x, routing):
    layer = model.layers[LAYER]
    experts, weights = np.array(routing.experts), np.array(routing.weights).astype(np.float64)
    return layer.experts.reference(x, experts, weights, layer.fetch.reference)


@pytest.mark.parametrize("name", ["golden/hf", "golden/mlx4"])
@pytest.mark.parametrize("variant", [None, "by_expert", "gather"])
def test_against_reference(packed, make_model, x, routing, name, variant):
    model = make_model(packed(name), variant=variant)
    np.testing.assert_allclose(
        run(model, x, routing), reference(model, x, routing), rtol=0, atol=1e-5
    )


def test_one_token_and_all_experts(packed, make_model, x, rng):
    model, routing = make_model(packed("golden/hf")), route(mx.array(rng.normal(size=(1, 8))), 8)
    np.testing.assert_allclose(
        run(model, x[:1], routing), reference(model, x[:1], routing), rtol=0, atol=1e-5
    )


@on_cpu
@pytest.mark.parametrize("slots", [0, 1, 2, 5])
@pytest.mark.parametrize("form", ["block", "stacked"])
@pytest.mark.parametrize("variant", ["by_expert", "gather", None])
def test_waves_are_the_whole(packed, make_model, use_kernels, x, routing, slots, form, variant):
    use_kernels("mlx" if variant else None)
    path = packed("golden/hf")
    expected = run(make_model(path), x, routing)
    block = make_model(path).layers[0].fetch.file.layout.block_nbytes
    model = make_model(path, capacity=slots * block, form=form, variant=variant)
    for _ in range(2):  # the second time some are in the bank already
        np.testing.assert_array_equal(run(model, x, routing), expected)


@on_cpu
def test_a_token_does_not_depend_on_the_others(packed, make_model, x, routing):
    model = make_model(packed("golden/hf"))
    whole = run(model, x, routing)
    one = replace(routing, experts=routing.experts[7:8], weights=routing.weights[7:8])
    np.testing.assert_array_equal(run(model, x[7:8], one)[0], whole[7])


def test_product_survives_what_comes_after(packed, make_model, x, routing):
    """Lazy products of layer 1, then all slots given to layer 2, then the evaluation."""
    expected = run(make_model(packed("golden/hf")), x, routing)
    model = make_model(packed("golden/hf"), capacity=0)
    layer, after = model.layers[LAYER], model.layers[2]
    product = layer.experts(mx.array(x, mx.float32), routing, layer.fetch(routing))
    for _ in after.fetch(routing).waves():
        pass
    np.testing.assert_array_equal(np.array(product), expected)


def test_another_shape_is_refused(packed, make_model, x, routing):
    layer = make_model(packed("golden/hf")).layers[LAYER]
    fetched = layer.fetch(routing)
    with pytest.raises(ValueError, match=r"layer 1: routing is \[20, 2\], .* fetched \[20, 3\]"):
        layer.experts(mx.array(x), routing.with_num_experts_per_tok(2), fetched)


def test_another_routing_is_refused(packed, make_model, x, routing):
    """The docstring says so: the experts of another routing of the same shape."""
    layer = make_model(packed("golden/hf")).layers[LAYER]
    fetched = layer.fetch(routing)
    other = replace(routing, experts=(routing.experts + 1) % 8)
    with pytest.raises(ValueError, match="layer 1"):
        layer.experts(mx.array(x, mx.float32), other, fetched)


def test_stale_fetch_is_refused(packed, make_model, x, routing):
    model = make_model(packed("golden/hf"), capacity=0)
    fetched = model.layers[LAYER].fetch(routing)
    model.layers[2].fetch(routing)
    with pytest.raises(ValueError, match="fetch them again"):
        model.layers[LAYER].experts(mx.array(x, mx.float32), routing, fetched)


def test_result_has_the_type_of_x(packed, make_model, x, routing):
    layer = make_model(packed("golden/mlx4")).layers[LAYER]
    out = layer.experts(mx.array(x, mx.bfloat16), routing, layer.fetch(routing))
    assert out.dtype == mx.bfloat16
