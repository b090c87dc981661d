"""Other tools' formats: what Perfetto and libCacheSim ask of a file."""

import gzip
import json

import pandas as pd
import pytest

from flashmoe_lab.trace.export import (
    chrome_events,
    requests,
    write_chrome,
    write_csv,
    write_libcachesim,
)
from flashmoe_lab.trace.trace import NAMES
from tests.trace.made import made_trace, read_ahead


@pytest.fixture(scope="module")
def events():
    return chrome_events(made_trace())


def check_chrome(events):
    """What the format asks: every event has its fields, times ascend, and no track overlaps."""
    for event in events:
        assert {"ph", "ts", "pid", "tid", "name"} <= event.keys()
        assert event["ph"] in "MXC" and event["ts"] >= 0
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    ends: dict[tuple, float] = {}
    for event in (event for event in events if event["ph"] == "X"):
        track = event["pid"], event["tid"]
        assert event["ts"] >= ends.get(track, 0) - 1e-6, event
        ends[track] = event["ts"] + event["dur"]


def test_events_are_whole_in_order_and_never_overlap(events):
    check_chrome(events)


def test_every_track_is_named(events):
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert named == {
        (1, 0): "compute", (1, 1): "wait", (1, 2): "io", (1, 3): "host",
        (2, 0): "reader 0", (2, 1): "reader 1",
    }  # fmt: skip
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} <= named.keys()


def test_totals_are_the_tables(events):
    trace = made_trace()
    spans = trace.spans
    totals = (spans.end_ns - spans.start_ns).groupby(spans.stage, observed=True).sum()
    for stage, ns in totals.items():
        durs = [e["dur"] for e in events if e["ph"] == "X" and e["name"] == stage]
        assert sum(durs) == pytest.approx(ns / 1e3)
    reads = [e for e in events if e["ph"] == "X" and e["pid"] == 2]
    assert len(reads) == 9 and sum(e["args"]["nbytes"] for e in reads) == 9000
    assert {e["cat"] for e in reads} == {"ssd", "page_cache"}


def test_counters(events):
    depth = [(e["ts"], e["args"]["reads"]) for e in events if e["name"] == "queue depth"]
    # Three reads asked for at 1 ms; two end at 3, one at 5.
    assert depth[:6] == [(1e3, 1), (1e3, 2), (1e3, 3), (3e3, 2), (3e3, 1), (5e3, 0)]
    assert depth[-1][1] == 0
    bank = [(e["ts"], e["args"]) for e in events if e["name"] == "bank"]
    assert bank == [
        (1e3, {"hits": 0, "misses": 3}),
        (6e3, {"hits": 0, "misses": 6}),
        (31e3, {"hits": 2, "misses": 6}),
        (36e3, {"hits": 3, "misses": 7}),
        (61e3, {"hits": 4, "misses": 8}),
        (70e3, {"hits": 5, "misses": 9}),
    ]


def test_files(tmp_path, events):
    plain = json.loads(write_chrome(made_trace(), tmp_path / "t.json").read_text())
    with gzip.open(write_chrome(made_trace(), tmp_path / "t.json.gz"), "rt") as stream:
        packed = json.load(stream)
    assert plain == packed == {"traceEvents": events, "displayTimeUnit": "ms"}


def test_csv_holds_every_table(tmp_path):
    path = write_csv(made_trace(), tmp_path / "csv")
    for name in NAMES:
        table = getattr(made_trace(), name)
        again = pd.read_csv(path / f"{name}.csv", keep_default_na=False)
        assert list(again.columns) == list(table.columns) and len(again) == len(table)
    assert pd.read_csv(path / "spans.csv").stage.tolist() == made_trace().spans.stage.tolist()


def test_requests_are_each_block_once_a_pass():
    asked = requests(made_trace())
    assert asked["pass"].tolist() == [0] * 6 + [1] * 4 + [2] * 4
    assert asked.expert.tolist() == [0, 1, 2, 1, 2, 3, 0, 1, 2, 3, 0, 3, 0, 1]
    assert asked.hit.tolist() == [False] * 6 + [True, True, True, False, True, False, False, True]


def test_what_was_read_for_nothing_is_no_request():
    trace, ahead = made_trace(), read_ahead(made_trace())
    assert len(ahead.reads) == len(trace.reads) + 1
    assert requests(ahead).equals(requests(trace))
    counters = [[e for e in chrome_events(t) if e["name"] == "bank"] for t in (trace, ahead)]
    assert counters[0] == counters[1]


def test_libcachesim(tmp_path):
    lines = write_libcachesim(made_trace(), tmp_path / "t.txt").read_text().split()
    assert list(map(int, lines)) == [0, 1, 2, 5, 6, 7, 0, 1, 6, 7, 0, 3, 4, 5]
    table = pd.read_csv(write_libcachesim(made_trace(), tmp_path / "t.csv"))
    assert list(table.columns) == ["time", "obj_id", "obj_size"]
    assert table.obj_id.tolist() == list(map(int, lines)) and set(table.obj_size) == {1000}
    assert table.time.tolist() == [0] * 6 + [1] * 4 + [2] * 4


def test_libcachesim_knows_each_layers_own_size(tmp_path):
    trace = made_trace(layer_block_nbytes="1000,600")
    table = pd.read_csv(write_libcachesim(trace, tmp_path / "t.csv"))
    assert table.obj_size.tolist() == [1000 if n < 4 else 600 for n in table.obj_id]
