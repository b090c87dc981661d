"""Guesses of what a router will say, against the reference's own stream."""

import numpy as np
import pytest

from flashmoe_lab.study.router_guess import ALL, BEFORE, SHARED, STREAM, router_guesses

IDS = [5, 17, 301, 44, 8, 9, 77, 123, 400, 3]


def test_guesses_are_the_routers_own_of_another_input(engine):
    found = router_guesses(engine, IDS, most=8).set_index(["layer", "given", "first"]).named
    layers, x = engine.layers, engine.model.embed.reference(np.array(IDS))
    expected = {}
    for layer in layers:
        h = x + layer.mixer.reference(layer.input_norm.reference(x))
        normed = layer.post_norm.reference(h)
        chosen, weights = layer.router.reference(normed)
        routed = layer.experts.reference(normed, chosen, weights, layer.fetch.reference)
        shared = h + layer.shared_expert.reference(normed)
        x = shared + routed
        if layer.index:
            for given, guess in expected[layer.index].items():
                for first in (1, 3, 8):
                    right = [
                        len(set(g[:first]) & set(c)) for g, c in zip(guess, chosen, strict=True)
                    ]
                    assert found[layer.index, given, first] == pytest.approx(np.mean(right))
            again = [len(set(a) & set(b)) for a, b in zip(chosen[:-1], chosen[1:], strict=True)]
            assert found[layer.index, BEFORE, 3] == pytest.approx(np.mean(again))
        if layer.index + 1 < len(layers):
            after = layers[layer.index + 1]
            expected[layer.index + 1] = {
                given: after.router.reference(after.post_norm.reference(stream), 8)[0]
                for given, stream in ((STREAM, h), (SHARED, shared), (ALL, x))
            }


def test_a_guess_that_names_all_has_all_and_shares_add_up(engine):
    found = router_guesses(engine, IDS)
    assert set(found.layer) == {1, 2, 3} and found["first"].max() == 8  # of 12, there are 8
    whole = found[found["first"] == 8]
    assert (whole.recall == 1).all() and np.allclose(whole.precision, 3 / 8)
    assert np.allclose(found.named, found.precision * found["first"])
    assert np.allclose(found.named, found.recall * 3)
    assert (found.groupby(["layer", "given"]).named.diff().dropna() >= 0).all()
    assert found[found.given == BEFORE]["first"].max() == 3


def test_chunks_of_a_prompt_are_one_text(engine, monkeypatch):
    whole = router_guesses(engine, IDS)
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *args: generate(*args, prefill_chunk=3))
    assert router_guesses(engine, IDS).equals(whole)


def test_one_token_has_none_before_it(engine):
    with pytest.raises(ValueError, match="4 layers and 1 tokens: a guess needs 2 of each"):
        router_guesses(engine, [5])


def test_a_guess_names_something(engine):
    with pytest.raises(ValueError, match="most is 0; a guess names 1 expert or more"):
        router_guesses(engine, IDS, most=0)
