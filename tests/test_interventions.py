"""Ready-made acts: what they do to a routing, and what they cost in a run."""

import mlx.core as mx
import numpy as np
import pytest

import flashmoe_lab as fl
from flashmoe_lab.interventions import ban, by_mass, edit_state, force, num_experts, substitute
from flashmoe_lab.stages.router import route

PATH = "layers.0.router"
PROMPT = [5, 17, 301, 44]


@pytest.fixture
def routing():
    """Two tokens over five experts, K = 3: the first takes 4, 2, 0 and the second 1, 3, 4."""
    logits = np.log([[0.15, 0.05, 0.3, 0.1, 0.4], [0.05, 0.4, 0.1, 0.25, 0.2]])
    return route(mx.array(logits.astype(np.float32)), 3)


def test_force_takes_the_place_of_the_least_probable(routing):
    forced = force([3])(routing, PATH)
    assert forced.experts.tolist() == [[4, 2, 3], [1, 3, 4]]
    weights = np.array([0.4, 0.3, 0.1]) / 0.8
    assert np.array(forced.weights)[0] == pytest.approx(weights)
    # who chose it anyway keeps every bit
    assert np.array(forced.weights)[1].tobytes() == np.array(routing.weights)[1].tobytes()


def test_force_several_and_keep_the_order_of_probability(routing):
    forced = force([1, 3])(routing, PATH)
    assert forced.experts.tolist() == [[4, 3, 1], [1, 3, 4]]


def test_forcing_what_was_chosen_changes_not_one_bit(routing):
    assert force([4])(routing, PATH) is routing


@pytest.mark.parametrize("experts, message", [
    ([5], "there is no expert 5; experts are 0 to 4"), ([0, 1, 2, 3], "4 experts forced, K is 3"),
])  # fmt: skip
def test_force_refuses(routing, experts, message):
    with pytest.raises(ValueError, match=f"{PATH}: {message}"):
        force(experts)(routing, PATH)


def test_substitute_keeps_the_weight(routing):
    swapped = substitute({4: 1, 0: 3})(routing, PATH)
    assert swapped.experts.tolist() == [[1, 2, 3], [1, 3, 1]]
    assert swapped.weights.tolist() == routing.weights.tolist()
    with pytest.raises(ValueError, match="there is no expert 9"):
        substitute({0: 9})(routing, PATH)


def test_num_experts(routing):
    assert num_experts(2)(routing, PATH).experts.tolist() == [[4, 2], [1, 3]]
    assert num_experts(4)(routing, PATH).experts.shape == (2, 4)


def test_by_mass_keeps_only_what_reaches_it(routing):
    # Weights of the three: 0.47 0.35 0.18, and 0.47 0.29 0.24.
    kept = by_mass(0.8)(routing, PATH)
    assert kept.experts.tolist() == [[4, 2, 4], [1, 3, 4]]  # the first needs two, and repeats one
    weights = np.array(kept.weights)
    assert weights[0] == pytest.approx([0.4 / 0.7, 0.3 / 0.7, 0])
    assert weights[1] == pytest.approx(np.array(routing.weights)[1])
    assert by_mass(0.45)(routing, PATH).experts.tolist() == [[4], [1]]
    assert by_mass(1.0)(routing, PATH).experts.tolist() == routing.experts.tolist()
    with pytest.raises(ValueError, match="share is 0; it must be above 0 and at most 1"):
        by_mass(0)


@pytest.fixture
def both(open_engine, packed):
    """`both(pattern, act)`: a run, and the same tokens with the act, from an empty bank each."""
    engine = open_engine(packed("golden/hf", 4))
    options: dict = {"trace": "flow", "record": ["lm_head.logits"]}
    plain = engine.stream_generate(PROMPT, 12, **options).wait()

    def run(pattern, act):
        engine.bank.forget(engine.bank.contents())
        with engine.intercept(pattern, act):
            return plain, engine.stream_generate(PROMPT, 12, follow=plain.tokens, **options).wait()

    run.engine = engine  # pyright: ignore[reportFunctionMemberAccess]
    return run


def test_the_price_of_banning_the_most_used_expert(both):
    plain, _ = both("layers.1.router", lambda routing, path: None)
    most = int(plain.trace.routing.query("layer == 1").expert.mode()[0])
    plain, banned = both("layers.1.router", ban([most]))
    table = fl.compare(plain, banned)
    assert most not in set(banned.trace.routing.query("layer == 1").expert)
    assert table.tokens.kl_nats.max() > 0 and len(table.tokens) == 12
    assert table.summary.nbytes_per_token_b[0] != table.summary.nbytes_per_token_a[0]


def test_forcing_the_same_experts_costs_exactly_nothing(both):
    plain, _ = both("layers.1.router", lambda routing, path: None)
    chosen = plain.trace.routing.groupby(["layer", "token"]).expert.apply(list)

    def same(routing, path):
        layer, position = int(path.split(".")[1]), both.engine.model.state.length
        if len(routing.experts) > 1:
            return routing
        return force(chosen[layer, position])(routing, path)

    plain, forced = both("layers.*.router", same)
    assert forced.tokens == plain.tokens
    assert fl.compare(plain, forced).tokens.kl_nats.tolist() == [0] * 12


def test_k_of_one_layer_is_what_is_recorded_and_read(both):
    _, fewer = both("layers.2.router", num_experts(1))
    sizes = fewer.trace.routing.groupby(["layer", "token"]).size().unstack("layer")
    assert set(sizes[2]) == {1} and set(sizes[1]) == {3}
    asked = fewer.trace.reads.query("layer == 2 and token >= 4").groupby("token").expert.nunique()
    assert set(asked) == {1}


def test_edit_state_reaches_the_next_token(both):
    engine = both.engine
    right = engine.logits([*PROMPT, 7])
    with edit_state(engine.model, 0, lambda state: state):
        assert np.array_equal(engine.logits([*PROMPT, 7], prefill_chunk=1), right)
    seen: list[tuple[int, ...]] = []

    def forget(state):
        seen.append(tuple(state.shape))
        return state * 0

    with edit_state(engine.model, 0, forget):
        changed = engine.logits([*PROMPT, 7], prefill_chunk=1)
    config = engine.config
    heads, dv, dk = (
        config.linear_num_value_heads, config.linear_value_head_dim, config.linear_key_head_dim,
    )  # fmt: skip
    assert seen == [(heads, dv, dk)] * 5
    assert np.array_equal(changed[0], right[0])  # the first token knows no past
    assert not np.allclose(changed[1:], right[1:], atol=1e-4)


def test_edit_state_refuses(both):
    model = both.engine.model
    for layer in (3, 4, -1):
        with pytest.raises(ValueError, match=f"layer {layer} has no recurrent state"):
            with edit_state(model, layer, lambda state: state):
                pass
    with pytest.raises(ValueError, match="layers.0.mixer: the state is .* fn gave"):
        with edit_state(model, 0, lambda state: state[:1]):
            both.engine.logits([1])
