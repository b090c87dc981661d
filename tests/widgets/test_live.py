"""The live view counts what the record counts, and draws seldom enough."""

from io import BytesIO

import pytest
from PIL import Image

from flashmoe_lab.plots.routing import choices
from flashmoe_lab.widgets import pace
from flashmoe_lab.widgets.live import Live
from flashmoe_lab.widgets.live_figure import HEIGHT, WIDTH, LiveFigure, _round_up
from flashmoe_lab.widgets.pace import Pace


@pytest.fixture
def run_and_live(engine):
    live = Live(len(engine.layers))
    run = engine.stream_generate("hello", max_tokens=9, trace="flow", watch=live).wait()
    return run, live


def test_it_counts_what_the_trace_has(engine, run_and_live):
    run, live = run_and_live
    figure = LiveFigure(len(engine.layers), engine.config.num_experts, engine.reader.threads)
    passes = live.taken()
    assert [one.tokens for one in passes] == [run.stats.prefill.tokens] + [1] * 8
    assert all(len(one.layer_end_ns) == len(engine.layers) for one in passes)
    figure.add(passes[:4])
    figure.add(passes[4:])
    assert figure.counts.ravel().tolist() == choices(run.trace)["count"].tolist()
    assert not live.taken()


def test_its_words_and_picture(engine, run_and_live):
    run, live = run_and_live
    figure = LiveFigure(len(engine.layers), engine.config.num_experts, engine.reader.threads)
    empty = figure.png()
    figure.add(live.taken())
    full = figure.png()
    assert Image.open(BytesIO(full)).size == (WIDTH, HEIGHT) and full != empty
    last = run.trace.reads[run.trace.reads.token == run.trace.reads.token.max()]
    hits, reads = int((last.nbytes == 0).sum()), int((last.nbytes > 0).sum())
    assert f"{hits} found in the bank, {reads} reads of" in figure.words
    assert "median of the last 8" in figure.words
    assert f"of {run.trace.routing.token.nunique()} tokens" in figure.words


def test_a_frame_without_news_is_the_same(engine, run_and_live):
    _, live = run_and_live
    figure = LiveFigure(len(engine.layers), engine.config.num_experts, engine.reader.threads)
    figure.add(live.taken())
    assert figure.png() == figure.png()


def test_a_run_without_trace_can_be_followed(engine):
    live = Live(len(engine.layers))
    engine.stream_generate("hello", max_tokens=3, watch=live).wait()
    assert len(live.taken()) == 3


@pytest.mark.parametrize("value, limit", [(0.7, 1), (0.8, 2), (3.8, 5), (38, 50), (0.07, 0.1)])
def test_limits_of_axes(value, limit):
    assert _round_up(value) == pytest.approx(limit)


def test_pace_keeps_drawing_to_its_share(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace, "perf_counter", lambda: now[0])
    tested, drawn = Pace(share=0.05, least_s=0.2), 0.0
    for _ in range(2000):
        now[0] += 0.01
        if tested.due:
            with tested:
                now[0] += 0.05
                drawn += 0.05
    assert drawn / now[0] == pytest.approx(0.05, abs=0.01)
    for wait_s in (1.01, 2.01):  # one slow drawing is forgiven, no number of them waits for long
        with tested:
            now[0] += 5
        assert not tested.due
        now[0] += wait_s
        assert tested.due
    quick = Pace(share=0.05, least_s=0.2)
    with quick:
        pass
    now[0] += 0.19
    assert not quick.due
    now[0] += 0.02
    assert quick.due
