"""Figures of studies' tables, by the data that they draw."""

import numpy as np
import pandas as pd
import pytest

from flashmoe_lab import plots
from flashmoe_lab.plots.mass import router_mass
from flashmoe_lab.study.bank_simulation import simulate
from flashmoe_lab.trace import Comparison
from tests.trace.made import made_trace


def _comparison(kl: float) -> Comparison:
    row = {
        "kl_nats_mean": kl,
        "top1_agreement": 0.5,
        "nbytes_per_token_a": 4e6,
        "nbytes_per_token_b": 2e6,
        "ms_per_token_a": 8.0,
        "ms_per_token_b": 5.0,
    }
    return Comparison(tokens=pd.DataFrame(), summary=pd.DataFrame([row]))


def test_sweep_draws_each_setting_in_its_order(tmp_path) -> None:
    plot = plots.sweep({"K=2": _comparison(0.25), "K=1": _comparison(1.0)})
    assert plot.data.setting.tolist() == ["K=2", "K=1"]
    assert plot.data.kl_nats_mean.tolist() == [0.25, 1.0]
    assert plot.data.top1_agreement.tolist() == [0.5, 0.5]
    assert plot.data.nbytes_per_token_b.tolist() == [2e6, 2e6]
    assert plot.data.ms_per_token_b.tolist() == [5, 5]
    bars = plot.figure.axes[2].patches
    assert [bar.get_height() for bar in bars] == [2, 2]  # pyright: ignore
    plot.save(tmp_path / "a.svg")
    with pytest.raises(ValueError, match="no comparisons"):
        plots.sweep({})


def test_hit_rate_by_size_holds_lines_and_dots() -> None:
    trace = made_trace()
    data = plots.hit_rate_by_size(simulate(trace, [2, 8]), [trace]).data
    rates = data.set_index(["policy", "slots"]).hit_rate
    assert rates["lru", 8] == rates["belady", 8] == 6 / 14
    assert rates["measured", 6] == 5 / 14


def test_budgets_add_up(tmp_path) -> None:
    plot = plots.budgets({"measured": {"a": 1.0, "b": 3.0}, "guess": {"a": 1.0, "b": 1.0}})
    words = [text.get_text().strip() for text in plot.figure.axes[0].texts]
    assert words[1:] == ["4.00 ms, 250 tok/s", "2.00 ms, 500 tok/s"]
    assert plot.data.budget.tolist() == ["measured", "guess"]
    assert plot.data.a.tolist() == [1, 1] and plot.data.b.tolist() == [3, 1]
    plot.save(tmp_path / "a.png")
    many = plots.budgets({"measured": {str(n): 1.0 for n in range(9)}})
    assert many.figure.axes[0].texts[1].get_text().strip() == "9.00 ms, 111 tok/s"
    with pytest.raises(ValueError, match="no budgets"):
        plots.budgets({})


def test_quantization_errors() -> None:
    weights = np.array([[3.0, -4.0], [0.0, 0.0]])
    errors = {8: np.full((2, 2), 0.025), 2: np.array([[0.5, -0.5], [0.5, 0.5]])}
    data = plots.quantization_errors(errors, weights).data.set_index("bits")
    assert data.index.tolist() == [2, 8]
    assert data.relative.tolist() == pytest.approx([0.5 / 2.5, 0.01])
    assert data.largest.tolist() == pytest.approx([0.5, 0.025])
    assert data.rms.tolist() == pytest.approx([0.5, 0.025])


def test_quantized_group_keeps_what_it_draws(tmp_path) -> None:
    weights = np.linspace(-1, 1, 8)
    plot = plots.quantized_group(weights, {2: np.round(weights), 4: weights})
    assert plot.data.weight.tolist() == weights.tolist()
    assert plot.data.place.tolist() == list(range(8))
    assert plot.data.at_2_bits.tolist() == np.round(weights).tolist()
    assert plot.data.at_4_bits.tolist() == weights.tolist()
    plot.save(tmp_path / "a.png")


def test_mass_by_k() -> None:
    trace = made_trace()
    data = plots.mass_by_k(trace).data
    assert data.layer.tolist() == [1, 1, 1, 1] and data.k.tolist() == [1, 2, 3, 4]
    assert data.mass.tolist() == pytest.approx([0.55, 0.75, 0.9, 1.0])
    assert router_mass(trace).equals(data)
    trace.arrays = {}
    with pytest.raises(ValueError, match="holds no router logits"):
        plots.mass_by_k(trace)


def test_the_caption_and_the_summary_say_what_the_page_cache_held() -> None:
    assert "page cache held 38% of the experts" in made_trace().summary()
    assert "an unknown share of the experts" in made_trace(page_cache_nbytes=None).summary()
    words = [text.get_text() for text in plots.hit_rate(made_trace()).figure.axes[0].texts]
    assert any("pread, page cache 38%" in word for word in words)
