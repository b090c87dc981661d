"""The router: K experts, weights that sum to 1, bans that change nothing but the choice."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab.stages.router import Router, Routing, ban, route

E = 8


@pytest.fixture
def logits(rng):
    return rng.normal(size=(50, E)).astype(np.float32)


def reference(logits, k, banned=()):
    """Experts and weights in float64 over the experts that remain."""
    left = [expert for expert in range(logits.shape[1]) if expert not in banned]
    p = np.exp(logits[:, left].astype(np.float64))
    order = np.argsort(-p, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(p, order, -1)
    return np.array(left)[order], weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("k", range(1, E + 1))
def test_every_k(logits, k):
    routing = route(mx.array(logits), k)
    experts, weights = np.array(routing.experts), np.array(routing.weights)
    assert experts.shape == weights.shape == (50, k)
    assert routing.num_experts_per_tok == k
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert all(len(set(row)) == k for row in experts)
    assert (np.diff(weights) <= 0).all()
    expected = reference(logits, k)
    np.testing.assert_array_equal(experts, expected[0])
    np.testing.assert_allclose(weights, expected[1], atol=1e-6)


@pytest.mark.parametrize("k", [0, -1, E + 1])
def test_k_out_of_range(logits, k):
    with pytest.raises(ValueError, match=f"num_experts_per_tok is {k}.* between 1 and {E}"):
        route(mx.array(logits), k)


def test_against_reference(linear, rng):
    router, x = Router(linear(E, 64), 3), rng.normal(size=(20, 64))
    for k in (None, 1, E):
        routing = router(mx.array(x, mx.float32), k)
        experts, weights = router.reference(x, k)
        np.testing.assert_array_equal(np.array(routing.experts), experts)
        np.testing.assert_allclose(np.array(routing.weights), weights, atol=1e-6)


def test_k_of_a_call_comes_before_the_models(linear):
    router, x = Router(linear(E, 64), 3), mx.ones((1, 64))
    assert router(x).num_experts_per_tok == 3
    assert router(x, 5).num_experts_per_tok == 5
    with pytest.raises(ValueError, match="num_experts_per_tok is 0"):
        router(x, 0)


def test_routing_is_float32_whatever_the_activations(linear):
    routing = Router(linear(E, 64), 3)(mx.ones((1, 64), mx.bfloat16))
    assert (routing.logits.dtype, routing.weights.dtype) == (mx.float32, mx.float32)
    assert routing.experts.dtype == mx.int32


def test_probabilities_are_of_all_experts(logits):
    routing = route(mx.array(logits), 2)
    p = np.exp(logits.astype(np.float64))
    expected = p / p.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.array(routing.probabilities), expected, atol=1e-6)


def test_weights_not_divided_by_their_sum(logits):
    routing = route(mx.array(logits), 3, norm_topk_prob=False)
    p, experts = np.array(routing.probabilities), np.array(routing.experts)
    chosen = np.take_along_axis(p, experts, -1)
    np.testing.assert_allclose(np.array(routing.weights), chosen, rtol=1e-6)
    for changed in (routing.with_num_experts_per_tok(2), routing.without([0])):
        assert (np.array(changed.weights).sum(-1) < 0.999).all()
    assert (np.array(route(mx.array(logits), E, False).weights).sum(-1) > 0.999).all()


def test_reference_not_divided_by_the_sum(linear, rng):
    router, x = Router(linear(E, 64), 3, norm_topk_prob=False), rng.normal(size=(20, 64))
    found = np.array(router(mx.array(x, mx.float32)).weights)
    np.testing.assert_allclose(found, router.reference(x)[1], atol=1e-6)


def test_ties_go_to_the_lower_number(linear):
    routing = route(mx.array([[1.0, 2, 2, 1, 2, 1, 1, 1]]), 4)
    assert np.array(routing.experts).tolist() == [[1, 2, 4, 0]]
    assert np.array(route(mx.zeros((1, 512)), 10).experts).tolist() == [list(range(10))]


def test_another_k_of_the_same_logits(logits):
    again = route(mx.array(logits), 3).with_num_experts_per_tok(5)
    np.testing.assert_array_equal(np.array(again.experts), reference(logits, 5)[0])


@pytest.mark.parametrize("banned", [[], [3], [0, 7], [1, 2, 4, 5, 6], [6, 6]])
@pytest.mark.parametrize("k", [1, 3])
def test_ban(logits, banned, k):
    routing = ban(banned)(route(mx.array(logits), k), "layers.0.router")
    experts, weights = reference(logits, k, banned)
    np.testing.assert_array_equal(np.array(routing.experts), experts)
    np.testing.assert_allclose(np.array(routing.weights), weights, atol=1e-6)
    np.testing.assert_array_equal(np.array(routing.logits), logits)  # what the router said stays


def test_banned_experts_are_not_chosen_where_all_others_have_no_probability():
    """In float32 exp(-200) is 0, like a banned expert's probability."""
    routing = route(mx.array([[0.0, -200, -300, -310]]), 2).without([1])
    assert np.array(routing.experts).tolist() == [[0, 2]]


def test_order_where_probabilities_underflow():
    routing = route(mx.array([[-310.0, -200, -300, 0]]), 3)
    assert np.array(routing.experts).tolist() == [[3, 1, 2]]


@pytest.mark.parametrize("banned", [[E], [-1], [2, 100]])
def test_ban_of_an_expert_that_is_not_there(logits, banned):
    with pytest.raises(ValueError, match="cannot be banned; experts are 0 to 7"):
        route(mx.array(logits), 3).without(banned)


def test_ban_leaves_k(logits):
    routing = route(mx.array(logits), 3)
    assert set(np.array(routing.without(range(5)).experts).ravel().tolist()) == {5, 6, 7}
    with pytest.raises(ValueError, match="6 of 8 experts are banned; K = 3"):
        routing.without(range(6))


def test_of_all():
    assert np.array(Routing.of_all(5).experts).tolist() == [[0, 1, 2, 3, 4]]


def test_card(logits):
    html = route(mx.array(logits[:2]), 3)._repr_html_()
    assert "2 tokens, K = 3 of 8 experts" in html and "token 1" in html
