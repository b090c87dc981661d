"""A plot shows and saves itself; what it is made of is the same whoever draws."""

from base64 import b64encode
from typing import Any

import numpy as np
import pytest

from flashmoe_lab import plots
from flashmoe_lab.plots.select import busiest_token
from tests.trace.made import made_trace


@pytest.fixture(scope="module")
def plot():
    return plots.expert_histogram(made_trace())


@pytest.mark.parametrize(
    "ending, begins", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_save_gives_the_same_file_for_the_same_data(tmp_path, ending, begins):
    first, second = (
        plots.layer_latency(made_trace()).save(tmp_path / f"{name}.{ending}").read_bytes()
        for name in "ab"
    )
    assert first.startswith(begins) and first == second


def test_save_refuses_other_endings(plot, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg, \.pdf"):
        plot.save(tmp_path / "a.gif")


def test_a_notebook_gets_a_crisp_png_and_words(plot):
    bundle, metadata = plot._repr_mimebundle_()
    assert set(bundle) == {"image/png", "text/plain"}
    width = int.from_bytes(bundle["image/png"][16:20], "big")
    assert metadata == {"image/png": {"width": 800, "height": 400}} and width == 1536
    assert bundle["text/plain"].startswith("<Plot: How often each expert was chosen")


def test_a_card_gets_the_picture_itself(plot):
    html = plot.html()
    assert html.startswith('<img alt="How often each expert was chosen') and 'width="800"' in html
    assert f"base64,{b64encode(plot.png(144)).decode()}" in html


def test_draw_all_draws_or_says_why(tmp_path):
    trace = made_trace()
    trace.arrays = {}
    (tmp_path / "state_norm.svg").write_text("of an older trace")
    found = {name: (plot, why) for name, plot, why in plots.draw_all(trace, tmp_path, ["svg"])}
    assert found.keys() == plots.FIGURES.keys()
    for name, (plot, why) in found.items():
        assert (tmp_path / f"{name}.svg").exists() == (plot is not None) == (why == "")
    assert {n for n, (p, _) in found.items() if p is None} == {
        "mass_by_k", "state_norm", "delta_gates", "memory_length", "attention_map",
    }  # fmt: skip
    assert found["delta_gates"][1].endswith("generate with record=['layers.*.mixer.decay']")


@pytest.mark.parametrize("name", plots.FIGURES)
def test_every_figure_has_a_title_axes_with_names_and_data(name):
    plot = plots.FIGURES[name](made_trace())
    figure = plot.figure
    assert figure.get_suptitle() == plot.title and len(plot.data)
    for ax in figure.axes:
        if ax.axison and not ax.get_shared_x_axes().get_siblings(ax)[1:]:
            assert ax.get_ylabel() or ax.get_yticklabels() or ax.get_xlabel()
    assert any(ax.get_xlabel() for ax in figure.axes) or name.startswith("token_strip")
    plot.png(dpi=50)  # nothing collapses: warnings are errors here


def test_a_dollar_or_a_line_end_in_the_text_breaks_nothing():
    words = plots.token_strip(made_trace(), by="entropy")
    words.png(dpi=50)
    assert words.data.text.tolist() == [" c", "\n", " d$"]


def test_colours_are_told_apart_without_red_and_green():
    """Every two colours that mean something keep a distance also for a deuteranope."""
    from matplotlib.colors import to_rgb

    from flashmoe_lab.plots.style import LANE, SOURCE

    # Viénot's matrix for deuteranopia in linear RGB.
    see = np.array(
        [[0.29275, 0.70725, -0.02298], [0.29275, 0.70725, -0.02298], [-0.02234, 0.02234, 1]]
    )
    for colours in (LANE, SOURCE):
        seen = [see @ (np.array(to_rgb(colour)) ** 2.2) for colour in colours.values()]
        gaps = [np.linalg.norm(a - b) for n, a in enumerate(seen) for b in seen[:n]]
        assert min(gaps) > 0.04, gaps


def test_a_timeline_has_no_rows_of_readers_that_never_read():
    trace = made_trace()
    names = [t.get_text() for t in plots.io_timeline(trace).figure.axes[0].get_yticklabels()]
    assert names == ["the run", "reader 0", "reader 1"]
    trace.reads.loc[trace.reads.thread >= 0, "thread"] = 2  # the run's own, of two readers
    axes = plots.io_timeline(trace).figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["the run", "run itself"]
    bars: list[Any] = list(axes.patches)
    assert {round(bar.get_y() + bar.get_height() / 2) for bar in bars} == {-1, 0}
    token = trace.reads.token.max()
    trace.reads.loc[trace.reads.token != token, "thread"] = 0  # at work in other passes only
    axes = plots.io_timeline(trace, int(token)).figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["the run", "run itself"]


def test_names_of_layers_do_not_lie_on_each_other():
    trace = made_trace()
    token = busiest_token(trace)
    of_layers = (trace.spans.token == token) & (trace.spans.layer >= 0)
    trace.spans.loc[of_layers, "start_ns"] = trace.spans[of_layers].start_ns.min()
    texts = plots.io_timeline(trace, token).figure.axes[0].texts
    assert [text.get_text() for text in texts[1:]] == ["layer 0"]  # the first is the caption
