"""The explorer's figures by value, against the router itself."""

import numpy as np
import pytest

from flashmoe_lab.widgets import RoutedText, RouterExplorer, explore_router


@pytest.fixture
def routings(engine):
    steps = engine.step("hello")
    return [step.result for step in steps if step.path.endswith(".router")]


def test_the_engines_own_choice(engine, routings):
    choice = explore_router(engine, "hello", layer=1)
    chosen = choice.data[choice.data.chosen]
    assert chosen.expert.tolist() == np.array(routings[1].experts)[-1].tolist()
    np.testing.assert_allclose(chosen.weight, np.array(routings[1].weights)[-1], atol=1e-6)
    assert choice.mass == pytest.approx(chosen.probability.sum())
    assert choice.kl_nats == 0 and choice.token == 3
    assert choice.data.probability.sum() == pytest.approx(1)


@pytest.mark.parametrize("k, word", [(1, "left out by K=1"), (5, "added by K=5")])
def test_another_k(engine, k, word):
    routed = RoutedText(engine, "hello")
    own, other = routed.choice(0, 2), routed.choice(0, 2, k)
    low, high = sorted([3, k])
    assert other.rows[word] == ", ".join(map(str, own.data.expert[low:high]))
    assert other.data.weight.sum() == pytest.approx(1)
    p, q = (np.exp(log) for log in (routed.answer(3)[2], routed.answer(k)[2]))
    assert other.kl_nats == pytest.approx((p * np.log(p / q)).sum(), rel=1e-6) and other.kl_nats > 0
    assert f"{other.kl_nats:.4f} nats" in other.rows["answer moved by"]


def test_its_plot_draws_its_data(engine):
    choice = explore_router(engine, "hello", 0, 0, 2)
    left, right = choice.plot.figure.axes[:2]
    heights = [bar.get_height() for bar in left.patches]  # pyright: ignore
    assert heights == pytest.approx((100 * choice.data.probability).tolist())
    assert right.lines[-1].get_ydata() == pytest.approx([100 * choice.mass])


@pytest.mark.parametrize(
    "arguments, words",
    [((4,), "layer is 4; it must be 0 to 3"), ((0, 4), "token is 4"), ((0, 0, 9), "1 to 8")],
)
def test_what_is_out_of_range(engine, arguments, words):
    with pytest.raises(ValueError, match=words):
        explore_router(engine, "hello", *arguments)


def test_sliders_choose(engine):
    explorer = RouterExplorer(engine, "hello")
    choice = explorer.wait()
    assert choice and (choice.layer, choice.token, choice.num_experts_per_tok) == (0, 3, 3)
    explorer.layer.value, explorer.token.value, explorer.k.value = 1, 0, 7
    choice = explorer.wait()
    assert choice and (choice.layer, choice.token, choice.num_experts_per_tok) == (1, 0, 7)
    assert f"K=7 keeps {choice.mass:.1%}" in explorer.status.value
    assert explorer._shown.content is choice and "<img alt=" in choice._repr_html_()
    explorer.text.value = "hell"
    choice = explorer.wait()
    assert choice and choice.token == 2 and len(explorer.token.options) == 3


def test_a_wrong_text_is_told(engine):
    explorer = RouterExplorer(engine, "")
    explorer.wait()
    assert "ValueError" in explorer.status.value and explorer.choice is None
