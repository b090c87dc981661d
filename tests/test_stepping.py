"""Cards of a step by hand: they say what the result is, and never more than it."""

from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import stepping
from flashmoe_lab.stepping import Step

IDS = [5, 17, 301]


@pytest.fixture(scope="module")
def steps(packed):
    import flashmoe_lab as fl

    with pytest.warns(UserWarning, match=r"no tokenizer\.json"):
        engine = fl.load(packed("golden/hf", 4), bank_gb=0.0)
    with engine:
        yield {step.path: step for step in engine.step(IDS)}, engine


def test_a_step_is_timed_and_of_its_stage(steps):
    found, engine = steps
    assert list(found) == engine.model.paths()
    assert all(step.dur_ns > 0 for step in found.values())
    logits = np.array(found["lm_head"].result)
    np.testing.assert_allclose(logits, engine.logits(IDS), atol=1e-5)


def test_what_a_mixer_keeps_is_computed_in_its_time(packed, make_model, use_kernels, monkeypatch):
    """Else the next stage's time would have it: states are lazy where MLX computes."""
    use_kernels("mlx")
    model, evaluated = make_model(packed("golden/hf")), []
    monkeypatch.setattr(stepping, "finish", lambda result: evaluated.append(result))
    state = model.empty_state()
    for step in stepping.walk(model.step(IDS, state), state, None):
        if step.path.endswith(".mixer"):
            assert evaluated[-1] is state[int(step.path.split(".")[1])]
        else:
            assert evaluated[-1] is step.result


def test_the_routers_card(steps):
    rows = steps[0]["layers.1.router"].rows()
    routing = steps[0]["layers.1.router"].result
    experts = np.array(routing.experts)[-1].tolist()
    words = str(rows["experts of the last token"])
    assert [int(part.split()[0]) for part in words.split(", ")] == experts
    p = np.array(routing.probabilities)[-1]
    assert rows["probability covered"] == f"{p[experts].sum():.1%}"
    assert float(str(rows["margin to the first left out"])) > 0
    assert rows["tokens, K, experts"] == "3, 3, 8"


def test_the_cards_of_arrays_and_of_what_was_read(steps):
    rows = steps[0]["layers.0.mixer"].rows()
    assert rows["shape"] == "[3, 128] float32" and rows["bytes"] == "1.54 kB"
    last = np.array(steps[0]["layers.0.mixer"].result)[-1]
    at = int(np.abs(last).argmax())
    assert rows["largest"] == f"{last[at]:.4g} at {at}"
    fetched = steps[0]["layers.0.fetch"].rows()
    experts = len(np.unique(np.array(steps[0]["layers.0.router"].result.experts)))
    assert fetched["experts"] == experts and str(fetched["read"]).startswith(f"{experts}, ")


def test_the_heads_card_names_the_most_probable(steps):
    logits = np.array(steps[0]["lm_head"].result)[-1]
    words = str(steps[0]["lm_head"].rows()["most probable next"])
    assert words.split()[0] == str(int(logits.argmax()))


def test_every_card_is_well_formed_and_has_its_picture(steps):
    for path, step in steps[0].items():
        html = f"<div>{step._repr_html_().replace('width=', ' width=')}</div>".replace('">', '"/>')
        images = html.count("<img")
        assert images == (0 if path.endswith("fetch") else 1)
        table = step._repr_html_().split("<img")[0]
        assert ElementTree.fromstring(table).find("caption").text == path  # pyright: ignore


def test_a_result_that_a_hook_replaced_by_something_else_still_has_a_card():
    step = Step(path="layers.0.mixer", result=mx.zeros((2, 4)), dur_ns=1500)
    assert step.rows()["time"] == "2 us" and step.rows()["largest"] == "0 at 0"


def test_the_engines_card_says_what_a_token_costs(steps):
    html = steps[1]._repr_html_()
    block = steps[1].checkpoint.layers[0].layout.block_nbytes
    assert f"12 experts, {12 * block / 1e3:.3g} kB where the bank has none" in html
    assert "it can hold 0% of all" in html
