"""Runs side by side, by value."""

import pytest

from flashmoe_lab import plots
from tests.trace.made import made_trace


@pytest.fixture
def both():
    other = made_trace(end_ns=200_000_000)
    other.reads["nbytes"] = 0
    return {"a": made_trace(), "b": other}


def test_compare_runs(both):
    data = plots.compare_runs(both).data
    steps = data[data["of"] == "token"].set_index(["run", "token"])
    assert steps.ms.to_dict() == {("a", 2): 20, ("a", 3): 30, ("b", 2): 20, ("b", 3): 30}
    assert steps.mb.to_dict() == {("a", 2): 0.001, ("a", 3): 0.002, ("b", 2): 0, ("b", 3): 0}
    hits = data[data["of"] == "layer"].set_index(["run", "layer"]).hit
    assert hits.to_dict() == {("a", 0): 0.75, ("a", 1): 0.5, ("b", 0): 1, ("b", 1): 1}
    lanes = data[data["of"] == "lane"].set_index(["run", "lane"]).share
    assert lanes["a", "io"] == pytest.approx(0.17) and lanes["b", "io"] == pytest.approx(0.085)
    assert lanes["a", "unexplained"] == pytest.approx(0.05)
    assert lanes["b"].sum() == pytest.approx(1)


def test_it_draws_without_a_warning_and_refuses_a_single_run(both, tmp_path):
    plots.compare_runs(both).save(tmp_path / "a.svg")
    with pytest.raises(ValueError, match="1 runs; this draws 2 to 7"):
        plots.compare_runs({"a": made_trace()})
