"""Stepping a token by slider shows what a plain run computes."""

import numpy as np
import pytest

from flashmoe_lab.widgets import Stepper, step_token


@pytest.fixture
def stepper(engine):
    found = Stepper(engine, "hello")
    found.wait()
    return found


def test_a_token_is_stepped_after_what_comes_before_it(engine):
    token = step_token(engine, "hello", 2)
    assert list(token.steps) == engine.model.paths()
    logits = engine.logits("hello", 2)[-1]
    np.testing.assert_allclose(np.array(token.steps["lm_head"].result)[-1], logits, atol=1e-5)
    assert token.next_id == int(logits[:258].argmax()) and token.text == "o"
    assert np.array(token.steps["layers.0.router"].result.experts).shape == (1, 2)
    assert "most probable next" in token._repr_html_()


@pytest.mark.parametrize("prompt, k, words", [("", None, "empty"), ("a", 9, "between 1 and 8")])
def test_what_cannot_be_stepped(engine, prompt, k, words):
    with pytest.raises(ValueError, match=words):
        step_token(engine, prompt, k)


def test_it_shows_the_chosen_stage(stepper):
    assert stepper.path == "layers.0.router"
    stepper.layer.value = 1
    assert "layers.1.router" in stepper.wait()._repr_html_()
    stepper.stage.value = "fetch"
    assert "found in the bank" in stepper.wait()._repr_html_()
    stepper.stage.value = "lm_head"
    assert "most probable next" in stepper.wait()._repr_html_() and stepper.layer.disabled
    assert "lm_head of token 3" in stepper.status.value  # "he", "l", "l", "o"


def test_back_and_on_go_through_every_stage(engine, stepper):
    stepper.stage.value = "embed"
    seen = [stepper.path]
    for _ in engine.model.paths():
        stepper.on_button.click()
        seen.append(stepper.path)
    assert seen[:-1] == engine.model.paths() and seen[-1] == "lm_head"
    stepper.back_button.click()
    assert stepper.path == "norm"


def test_next_token_goes_on_from_the_state(engine, stepper):
    run = engine.stream_generate("hello", max_tokens=3).wait()
    made = []
    for _ in range(3):
        made.append(stepper.token.next_id)
        stepper.next_button.click()
        stepper.wait()
    assert made == run.tokens and len(stepper.token.ids) == 4 + 3


def test_a_wrong_text_is_told_and_the_next_is_read(stepper):
    stepper.prompt.value = ""
    stepper.wait()
    assert "ValueError: the prompt is empty" in stepper.status.value
    stepper.prompt.value = "hell"
    stepper.wait()
    assert len(stepper.token.ids) == 3
