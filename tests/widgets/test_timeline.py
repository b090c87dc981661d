"""What the timeline's canvas is given: the trace's own rows, in the order that it counts on."""

import numpy as np
import pytest

from flashmoe_lab.widgets import Timeline, show_timeline
from flashmoe_lab.widgets import timeline as module
from tests.trace.made import MS, made_trace


@pytest.fixture(scope="module")
def trace():
    return made_trace()


def unpacked(widget):
    times = np.frombuffer(widget.times).reshape(2, -1)
    numbers = np.frombuffer(widget.numbers, np.int32).reshape(7, -1)
    return times, dict(zip(module._NUMBERS, numbers, strict=True))


def test_it_has_every_span_and_every_read(trace):
    (start, end), column = unpacked(Timeline(trace))
    reads = trace.reads[trace.reads.nbytes > 0]
    assert (column["row"] == 0).sum() == len(trace.spans)
    assert (column["row"] > 0).sum() == len(reads)
    assert column["nbytes"].sum() == reads.nbytes.sum()
    spans_ns = int((trace.spans.end_ns - trace.spans.start_ns).sum())
    assert (end - start)[column["row"] == 0].sum() * MS == pytest.approx(spans_ns)
    assert set(column["expert"][column["row"] > 0]) == set(reads.expert)
    order = np.lexsort((start, column["row"]))
    assert order.tolist() == list(range(len(start)))


def test_names_match_numbers(trace):
    widget = Timeline(trace)
    (start, _), column = unpacked(widget)
    rows, colours = widget.names["rows"], widget.names["colours"]
    reads = trace.reads[trace.reads.nbytes > 0].sort_values(["thread", "start_ns"])
    mine = column["row"] > 0
    assert [rows[n] for n in column["row"][mine]] == [f"reader {n}" for n in reads.thread]
    words = {"page_cache": "read from page cache", "ssd": "read from SSD"}
    told = [colours[n]["words"] for n in column["colour"][mine]]
    assert told == [words[source] for source in reads.source]
    spans = trace.spans.sort_values("start_ns")
    stages = [widget.names["stages"][n] for n in column["stage"][~mine]]
    assert stages == [stage.replace("_", " ") for stage in spans.stage]
    assert start[~mine] * MS + trace.facts["start_ns"] == pytest.approx(spans.start_ns.to_numpy())


def test_passes_say_where_a_token_lies(trace):
    passes = Timeline(trace, token=3).names["passes"]
    assert [row[:2] for row in passes] == [[0, 1], [2, 2], [3, 3]]
    tokens = trace.tokens.set_index("token")
    for first, last, low, high in passes:
        assert low * MS + trace.facts["start_ns"] == pytest.approx(tokens.start_ns[first])
        assert high * MS + trace.facts["start_ns"] == pytest.approx(tokens.end_ns[last])


def test_too_long_a_trace_is_refused_with_another_way(trace, monkeypatch):
    monkeypatch.setattr(module, "_MOST_ITEMS", 5)
    with pytest.raises(ValueError, match="write_chrome"):
        Timeline(trace)


def test_the_same_without_widgets(trace):
    assert show_timeline(trace, 3).title.startswith("Reads while token 3")


def test_its_javascript_comes_with_the_package_and_fetches_nothing():
    for file in (Timeline._esm, Timeline._css):
        text = str(file)
        assert text.strip() and "http" not in text and "import " not in text
