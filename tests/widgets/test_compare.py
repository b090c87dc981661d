"""Two settings of one prompt side by side."""

from dataclasses import replace

import pytest

import flashmoe_lab as fl
from flashmoe_lab.widgets import Compare, Setting, run_settings, side_by_side
from flashmoe_lab.widgets.forms import forms_of


@pytest.fixture
def runs(engine):
    few = {"max_tokens": 8}
    eight = forms_of(engine.checkpoint)[1].label
    return run_settings(
        engine,
        "hello",
        {
            "own": few,
            "K=1": few | {"num_experts_per_tok": 1},
            "8 bits": Setting(bits=eight, max_tokens=8),
        },
    )


def test_each_setting_writes_its_own_text_and_goes_over_the_first_ones(engine, runs):
    own = engine.stream_generate("hello", max_tokens=8).wait()
    one = engine.stream_generate("hello", max_tokens=8, num_experts_per_tok=1).wait()
    assert runs["own"].played.text == own.text and runs["K=1"].played.text == one.text
    for run in runs.values():
        tokens = run.forced.tokens
        assert tokens[tokens.phase == "decode"].id.tolist() == own.tokens
    assert runs["8 bits"].played.conditions["experts"].startswith("8 bits")
    assert runs["K=1"].forced.facts["num_experts_per_tok"] == 1


def test_predictions_are_compared(runs):
    side = side_by_side(runs["own"], runs["K=1"])
    expected = fl.compare(runs["own"].forced, runs["K=1"].forced).summary.iloc[0]
    assert expected.kl_nats_mean > 0
    assert side.rows["divergence (KL)"].startswith(f"{expected.kl_nats_mean:.4f} nats on average")
    drawn = sum(len(part) for part in side.plot.figure.axes[0].containers)  # pyright: ignore
    assert drawn == len(side.comparison.tokens) == 8
    html = side._repr_html_()
    assert "K=1 of the model" in html and "<b>own</b>" in html
    same = side_by_side(runs["own"], runs["own"])
    assert same.rows["same text"] == "yes" and same.comparison.summary.kl_nats_max[0] == 0


@pytest.mark.parametrize("other, same", [("xb", 0), ("ax", 1), ("abc", 2)])
def test_how_far_two_texts_are_the_same(runs, other, same):
    a, b = (
        replace(runs["own"], played=replace(runs["own"].played, text=text))
        for text in ("ab", other)
    )
    words = side_by_side(a, b).rows["same text"]
    assert words == f"no; the first {same} characters are the same"


def test_runs_of_other_prompts_are_refused(engine, runs):
    other = run_settings(engine, "hell", {"own": {"max_tokens": 2}})["own"]
    with pytest.raises(ValueError, match="different prompts"):
        side_by_side(runs["own"], other)


def test_the_widget_chooses_two(runs):
    widget = Compare(runs)
    shown = widget.wait()
    assert shown and (shown.a.name, shown.b.name) == ("own", "K=1")
    widget.right.value = "8 bits"
    shown = widget.wait()
    assert shown and (shown.a.name, shown.b.name) == ("own", "8 bits")
    assert "own and 8 bits" in widget.status.value and widget._shown.content is shown
    with pytest.raises(ValueError, match="1 runs"):
        Compare({"own": runs["own"]})
