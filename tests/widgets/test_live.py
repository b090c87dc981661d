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
    taken = [one.layers_ns(len(engine.layers)) for one in passes]
    assert all(layers_ns is not None and (layers_ns > 0).all() for layers_ns in taken)
    figure.add(passes[:4])
    figure.add(passes[4:])
    assert figure.counts.ravel().tolist() == choices(run.trace)["count"].tolist()
    assert not live.taken()


def test_its_words_and_picture(engine, run_and_live):
    run, live = run_and_live
    figure = LiveFigure(len(engine.layers), engine.config.num_experts, engine.reader.threads)
    empty = figure.png()
    figure.add(live.taken(), live.last)
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
    figure.add(live.taken(), live.last)
    assert figure.png() == figure.png()


def test_another_run_begins_with_an_empty_figure(engine, run_and_live):
    _, live = run_and_live
    figure = LiveFigure(len(engine.layers), engine.config.num_experts, engine.reader.threads)
    empty = figure.png()
    figure.add(live.taken(), live.last)
    figure.png()
    figure.clear()
    figure.png()
    assert not figure.counts.any() and "0 reads" in figure.words
    assert figure.png() == empty


def test_layers_that_are_intercepted_are_followed_too(engine):
    live = Live(len(engine.layers))
    figure = LiveFigure(len(engine.layers), engine.config.num_experts, engine.reader.threads)
    with engine.intercept("layers.1.router", lambda routing, path: routing):
        run = engine.stream_generate("hello", max_tokens=9, trace="flow", watch=live).wait()
    passes = live.taken()
    assert all(one.layers_ns(len(engine.layers)) is not None for one in passes)
    figure.add(passes, live.last)
    assert figure.counts.ravel().tolist() == choices(run.trace)["count"].tolist()


def test_another_scale_changes_numbers_alone(engine):
    figure = LiveFigure(len(engine.layers), engine.config.num_experts, engine.reader.threads)

    def pixels(reach_ms):
        figure._fit({figure._reads: reach_ms, figure._time: reach_ms})
        return figure._background.copy()

    first, other = pixels(0.7), pixels(70)
    different = (first != other).mean()
    assert 0 < different < 0.01
    assert (pixels(0.7) == first).all()


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
    with tested:
        now[0] += 5
    now[0] += 1.99
    assert not tested.due
    now[0] += 0.02  # nobody waits longer for a sign of life
    assert tested.due
    quick = Pace(share=0.05, least_s=0.2)
    now[0] += 0.19
    assert not quick.due  # of a short run nothing is drawn before its end
    now[0] += 0.02
    assert quick.due
    with quick:
        pass
    now[0] += 0.19
    assert not quick.due
    now[0] += 0.02
    assert quick.due
