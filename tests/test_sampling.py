"""Choosing tokens: each cut keeps what it should, and draws follow the distribution."""

import numpy as np
import pytest

from flashmoe_lab.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


def draw(logits, count, recent=(), vocabulary=None, **settings):
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 1, **settings}), vocabulary or 5)
    return [sampler(logits, recent)[0] for _ in range(count)]


def chi_square(tokens, expected):
    """Of counts against probabilities; 5 outcomes stay below 25 but once in 20,000 times."""
    counts = np.bincount(tokens, minlength=len(expected))
    expected = np.asarray(expected) * len(tokens)
    assert not counts[expected == 0].any()
    used = expected > 0
    return float(((counts - expected)[used] ** 2 / expected[used]).sum())


def support(**settings):
    return set(draw(LOGITS, 400, **settings))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature):
    p = np.exp(LOGITS.astype(float) / temperature)
    assert chi_square(draw(LOGITS, 4000, temperature=temperature), p / p.sum()) < 25


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k(k):
    p = np.where(np.arange(5) < k, np.exp(LOGITS.astype(float)), 0)
    assert chi_square(draw(LOGITS, 2000, top_k=k), p / p.sum()) < 25


@pytest.mark.parametrize("k", [0, 5, 100])
def test_top_k_that_keeps_all(k):
    assert support(top_k=k) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("p", "kept"), [(0.01, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.96, 5), (1.0, 5)]
)
def test_top_p_keeps_the_token_that_crosses(p, kept):
    assert support(top_p=p) == set(range(kept))


def test_top_p_draws_in_proportion():
    tokens = draw(LOGITS, 2000, top_p=0.5)
    assert chi_square(tokens, np.array([4, 3, 0, 0, 0]) / 7) < 25


@pytest.mark.parametrize(("p", "kept"), [(0.0, 5), (0.2, 4), (0.3, 3), (0.5, 2), (0.9, 1), (1, 1)])
def test_min_p(p, kept):
    assert support(min_p=p) == set(range(kept))


def test_cuts_go_one_after_another():
    """Among the top 3, 0.4/0.85 and 0.3/0.85 reach 0.8 together; min_p then drops nothing."""
    assert support(top_k=3, top_p=0.8, min_p=0.5) == {0, 1}
    assert support(top_k=3, top_p=0.8, min_p=0.9) == {0}


def test_order_does_not_depend_on_the_ids():
    shuffle = np.array([3, 0, 4, 2, 1])
    logits = LOGITS[shuffle]
    assert set(draw(logits, 400, top_k=2)) == set(np.flatnonzero(shuffle < 2).tolist())


def test_temperature_0_takes_the_first_maximum():
    logits = np.array([1, 3, 3, 2, 0], np.float32)
    assert draw(logits, 3, temperature=0) == [1, 1, 1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 1e-308])
def test_tiny_temperature_takes_the_maximum(temperature):
    logits = np.array([-4, 30, 29, 2, 0], np.float32)
    assert set(draw(logits, 20, temperature=temperature)) == {1}


def test_repetition_penalty_pulls_both_signs_down():
    sampler = Sampler(Sampling(repetition_penalty=2.0), 4)
    logits = np.array([4.0, 3.0, -1.0, -1.5], np.float32)
    assert sampler(logits, [])[0] == 0
    assert sampler(logits, [0])[0] == 1  # 4 / 2 is below 3
    negative = np.array([-9.0, -9.0, -1.0, -1.5], np.float32)
    assert sampler(negative, [2])[0] == 3  # -1 * 2 is below -1.5
    np.testing.assert_array_equal(logits, [4.0, 3.0, -1.0, -1.5])  # the caller's stay


def test_repetition_penalty_counts_a_token_once():
    sampler = Sampler(Sampling(repetition_penalty=1.2), 2)
    assert sampler(np.array([4.0, 3.0], np.float32), [0, 0, 0, 0])[0] == 0


@pytest.mark.parametrize(("context", "token"), [(0, 0), (1, 0), (2, 1), (20, 1)])
def test_repetition_context(context, token):
    sampler = Sampler(Sampling(repetition_penalty=2.0, repetition_context=context), 4)
    assert sampler(np.array([4.0, 3.0, 0, 0], np.float32), [0, 3])[0] == token


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.99}])
@pytest.mark.parametrize("recent", [[], [3, 4]])
def test_padding_ids_are_never_sampled(settings, recent):
    logits = np.array([0, 1, 0, 50, 60], np.float32)
    tokens = draw(logits, 300, recent, vocabulary=3, repetition_penalty=1.5, **settings)
    assert set(tokens) <= {0, 1, 2}


def test_padding_ids_have_no_probability():
    _, logprobs = Sampler(Sampling(), 3)(np.array([0, 0, 0, 50, 60], np.float32), [])
    np.testing.assert_allclose(logprobs, [np.log(1 / 3)] * 3 + [-np.inf] * 2, rtol=1e-6)


class Highest:
    """The largest number that a generator can draw."""

    def random(self):
        return 1 - 2.0**-53


@pytest.mark.parametrize("tokens", [3, 7, 10, 49, 1000])
def test_highest_draw_is_a_token(tokens):
    """Probabilities that are rounded may add up to less than 1; padding must not win by that."""
    sampler = Sampler(Sampling(temperature=1.0), tokens)
    sampler._random = Highest()  # pyright: ignore[reportAttributeAccessIssue]
    assert sampler(np.zeros(tokens + 5, np.float32), [])[0] == tokens - 1


def test_same_seed_same_tokens():
    assert draw(LOGITS, 50, seed=3) == draw(LOGITS, 50, seed=3)
    assert draw(LOGITS, 50, seed=3) != draw(LOGITS, 50, seed=4)
    assert draw(LOGITS, 50, seed=None) != draw(LOGITS, 50, seed=None)


def test_logprobs_are_of_the_uncut_distribution(rng):
    logits = (rng.normal(size=1000) * 10).astype(np.float32)
    cut = Sampling(temperature=0.3, top_k=2, repetition_penalty=2.0, seed=0)
    _, logprobs = Sampler(cut, 1000)(logits, [1, 2, 3])
    assert logprobs.dtype == np.float32
    assert abs(np.exp(logprobs.astype(float)).sum() - 1) < 1e-5
    exact = logits.astype(float) - np.logaddexp.reduce(logits.astype(float))
    np.testing.assert_allclose(logprobs, exact, rtol=1e-5, atol=1e-5)


def test_nan_is_refused():
    with pytest.raises(FloatingPointError, match="NaN logits; load with checks=True"):
        Sampler(Sampling(), 3)(np.array([0, np.nan, 1], np.float32), [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_context", -1),
        ("seed", -1),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", ["top_k", "repetition_context"])
def test_counts_are_whole(name):
    with pytest.raises((TypeError, ValueError), match=name):
        Sampling(**{name: 2.5})  # pyright: ignore[reportArgumentType]


class Only:
    """A constraint: these ids, of the first four."""

    def __init__(self, *ids):
        self.ids, self.taken = ids, []

    def allowed(self):
        return np.isin(np.arange(4), self.ids)

    def take(self, token):
        self.taken.append(token)
        return True


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "min_p": 0.1, "seed": 0}])
def test_constraint_forbids_and_is_told(settings):
    """Also what it does not know, id 4, which is the most probable; and a penalty, which divides,
    must not bring back what is forbidden."""
    constraint = Only(1, 3)
    sampler = Sampler(Sampling(repetition_penalty=2.0, **settings), 5, constraint)
    logits = np.array([5, 1, 5, 1.5, 9], np.float32)
    tokens = [sampler(logits, [0, 2])[0] for _ in range(60)]
    assert set(tokens) == ({1, 3} if settings else {3})
    assert constraint.taken == tokens


def test_constraint_refuses_what_was_drawn():
    """Then another is drawn among those that are left."""

    class Refusing(Only):
        def take(self, token):
            self.ids = tuple(id for id in self.ids if id != token)
            return super().take(token) and len(self.ids) < 2

    constraint = Refusing(0, 1, 2)
    assert Sampler(Sampling(), 5, constraint)(LOGITS, [])[0] == 1
    assert constraint.taken == [0, 1]


def test_logprobs_are_those_without_the_constraint():
    _, free = Sampler(Sampling(), 5)(LOGITS, [])
    _, bound = Sampler(Sampling(), 5, Only(1))(LOGITS, [])
    np.testing.assert_array_equal(free, bound)
