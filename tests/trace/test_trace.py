"""The tables: growing, spilling, going to disk and coming back."""

import json
import os
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pandas.testing import assert_frame_equal

from flashmoe_lab.trace import Recorder, Trace, parquet
from flashmoe_lab.trace.schema import TABLES, VERSION
from flashmoe_lab.trace.table import FIRST_ROWS, Table
from flashmoe_lab.trace.trace import NAMES
from flashmoe_lab.trace_routing import _rounded
from tests.trace.made import MS, made_trace, read_ahead


def _span(start: int) -> dict:
    return dict(token=start, layer=1, stage=2, lane=0, start_ns=start, end_ns=start + 1)


def test_a_table_grows_past_what_it_began_with(tmp_path):
    table = Table("spans", 1 << 20, tmp_path)
    for first in range(0, 3 * FIRST_ROWS, 1000):
        numbers = np.arange(first, first + 1000)
        table.extend(1000, **_span(0) | {"start_ns": numbers, "end_ns": numbers + 7})
    rows = table.finish()
    assert isinstance(rows, pd.DataFrame) and len(rows) == 13_000
    assert (rows.start_ns == np.arange(13_000)).all() and (rows.end_ns == rows.start_ns + 7).all()
    assert set(rows.stage) == {"mixer"} and set(rows.lane) == {"compute"}


def test_memory_is_bounded_and_spilled_rows_come_back_in_order(tmp_path):
    small, large = Table("spans", 50, tmp_path), Table("spans", 1 << 20, tmp_path / "none")
    held = 0
    for start in range(500):
        small.extend(1, **_span(start))
        large.extend(1, **_span(start))
        held = max(held, small.nbytes)
    assert held == 50 * sum(np.dtype(c.dtype).itemsize for c in TABLES["spans"].values())
    assert small.spilled == 450
    file, rows = small.finish(), large.finish()
    assert isinstance(rows, pd.DataFrame)
    tables: dict = {name: getattr(made_trace(), name) for name in NAMES}
    assert_frame_equal(Trace(tables | {"spans": file}).spans, rows)


def test_more_rows_at_once_than_memory_may_hold(tmp_path):
    table = Table("spans", 10, tmp_path)
    table.extend(3, **_span(1))
    table.extend(25, **_span(2) | {"token": np.arange(25)})
    tables: dict = {name: getattr(made_trace(), name) for name in NAMES}
    assert Trace(tables | {"spans": table.finish()}).spans.token.tolist() == [1] * 3 + [*range(25)]


def test_columns_must_be_all_there(tmp_path):
    columns = _span(0)
    del columns["lane"]
    with pytest.raises(ValueError, match="spans: columns .*lane"):
        Table("spans", 10, tmp_path).extend(1, **columns)


def test_temporary_files_go_with_the_trace():
    recorder = Recorder(max_rows=2)
    recorder.begin()
    for start in range(5):
        recorder.tables["spans"].extend(1, **_span(start))
    folder = recorder.tables["spans"].spill
    trace = recorder.finish()
    assert len(trace.spans) == 5 and folder.exists()
    del recorder, trace
    assert not folder.exists()


def test_recorder_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="trace is 'fast'.*'flow', 'stages'"):
        Recorder("fast")
    with pytest.raises(ValueError, match="max_rows is 0"):
        Recorder(max_rows=0)


def test_arrays_that_grow_are_filled_with_zeros():
    recorder = Recorder()
    recorder.begin()
    recorder.keep("a", np.array([0]), np.ones((1, 2, 1)))
    recorder.keep("a", np.array([1]), np.ones((1, 2, 3)))
    positions, rows = recorder.finish().arrays["a"]
    assert positions.tolist() == [0, 1]
    assert rows.tolist() == [[[1, 0, 0]] * 2, [[1, 1, 1]] * 2]


def test_write_and_read(tmp_path):
    trace = made_trace()
    again = Trace.read(trace.write(tmp_path / "run"))
    for name in NAMES:
        assert_frame_equal(getattr(again, name), getattr(trace, name))
    assert again.facts == trace.facts
    assert again.arrays.keys() == trace.arrays.keys()
    for name, (positions, rows) in trace.arrays.items():
        assert np.array_equal(again.arrays[name][0], positions)
        assert np.array_equal(again.arrays[name][1], rows)


def test_an_empty_trace_is_the_same_on_disk(tmp_path):
    recorder = Recorder()
    recorder.begin()
    trace = recorder.finish()
    again = Trace.read(trace.write(tmp_path))
    for name in TABLES:
        assert_frame_equal(getattr(again, name), getattr(trace, name))
        assert len(getattr(again, name)) == 0


def test_a_trace_takes_the_place_of_an_older_one_whole(tmp_path, monkeypatch):
    old, new = made_trace(), made_trace()
    old.write(tmp_path)
    (tmp_path / "figure.png").write_bytes(b"")
    new.arrays = {"only": (np.arange(2), np.ones((2, 3)))}
    new.write(tmp_path)
    assert list(Trace.read(tmp_path).arrays) == ["only"]
    assert (tmp_path / "figure.png").exists()  # what is not of a trace is left alone

    def fails(file, **arrays):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(np, "savez", fails)
        old.write(tmp_path)
    assert list(Trace.read(tmp_path).arrays) == ["only"]  # the one before, whole
    names = {f"{name}.parquet" for name in NAMES} | {"array.only.npz", "figure.png"}
    assert {file.name for file in tmp_path.iterdir()} == names

    replace, moved = os.replace, []

    def interrupted(source, target):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        old.write(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a trace"):
        Trace.read(tmp_path)


def test_a_long_run_is_told_and_written_without_loading_it(tmp_path, monkeypatch):
    recorder = Recorder(max_rows=10)
    recorder.begin(threads=2)
    for start in range(0, 60, 6):
        row = _span(0) | {"start_ns": np.arange(start, start + 6)}
        recorder.tables["spans"].extend(6, **row | {"end_ns": row["start_ns"] + 2, "lane": 2})
        read = dict.fromkeys(TABLES["reads"], 0) | {"nbytes": np.array([5, 0, 5, 0, 5, 0])}
        recorder.tables["reads"].extend(6, **read)
    trace = recorder.finish()

    def loads(file):
        raise AssertionError(f"{file} is loaded whole")

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "read_table", loads)
        assert "30 reads of 150 B" in trace.summary() and trace.lane_ns["io"] == 120
        trace.write(tmp_path)
    assert_frame_equal(Trace.read(tmp_path).spans, trace.spans)
    assert len(trace.spans) == 60


def test_arrays_are_not_held_twice():
    recorder = Recorder()
    recorder.begin()
    for position in range(40):
        recorder.keep("a", np.array([position]), np.ones((1, 25_000, 1 + position % 2), np.float32))
    held = sum(rows.nbytes for _, rows in recorder.arrays["a"])
    tracemalloc.start()
    try:
        rows = recorder.finish().arrays["a"][1]
        extra = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert extra < rows.nbytes + 1_000_000 and held == 6_000_000
    assert not recorder.arrays


def test_parquet_says_version_and_units(tmp_path):
    made_trace().write(tmp_path)
    file = pq.ParquetFile(tmp_path / "reads.parquet")
    said = json.loads(file.schema_arrow.metadata[b"flashmoe_lab"])
    assert said["version"] == list(VERSION) and said["table"] == "reads"
    assert said["units"]["submit_ns"] == "ns" and said["units"]["nbytes"] == "byte"
    column = file.metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"


def _rewrite(file, version, **columns):
    table = pq.read_table(file)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    said = json.loads(table.schema.metadata[b"flashmoe_lab"]) | {"version": version}
    metadata = {**table.schema.metadata, b"flashmoe_lab": json.dumps(said).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), file)


def test_a_newer_minor_version_is_read_and_its_columns_kept(tmp_path):
    made_trace().write(tmp_path)
    newer = [VERSION[0], VERSION[1] + 1]
    _rewrite(tmp_path / "spans.parquet", newer, energy_nj=np.arange(17))
    spans = Trace.read(tmp_path).spans
    assert spans.energy_nj.tolist() == list(range(17)) and len(spans.stage) == 17


def test_another_major_version_is_refused(tmp_path):
    made_trace().write(tmp_path)
    _rewrite(tmp_path / "spans.parquet", [VERSION[0] + 1, 0])
    with pytest.raises(ValueError, match=r"spans\.parquet: trace version 2\.0, this is 1\."):
        Trace.read(tmp_path)


def test_what_is_no_trace_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokens\.parquet: no such file; not a trace"):
        Trace.read(tmp_path)
    made_trace().write(tmp_path)
    (tmp_path / "reads.parquet").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"reads\.parquet: not a table of a trace"):
        Trace.read(tmp_path)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "reads.parquet")
    with pytest.raises(ValueError, match=r"reads\.parquet: not a table of a trace"):
        Trace.read(tmp_path)
    with pytest.raises(ValueError, match="a trace needs the tables .*; no spans"):
        Trace({name: pd.DataFrame() for name in NAMES if name != "spans"})


def test_summary_says_lanes_closure_and_cost():
    trace = made_trace()
    assert trace.lane_ns == {"compute": 23 * MS, "wait": 30 * MS, "io": 17 * MS, "host": 25 * MS}
    assert trace.closure == 0.95
    words = trace.summary()
    assert "trace (flow): 5 tokens in 0.10 s, 16 choices, 9 reads of 9 kB" in words
    assert "spans explain 95.0% of the time (compute 23%, wait 30%, io 17%, host 25%)" in words
    assert words.endswith("recording took 5.0%")
    assert "10 reads of 10 kB (1 kB for nothing); the page" in read_ahead(trace).summary()


def test_a_large_trace_is_small_on_disk(tmp_path):
    """Half of 1,000 tokens x 60 layers x K=10 in `flow` mode, every expert read, must take at most
    half of 10 MB."""
    rng, tokens, layers, k = np.random.default_rng(0), 500, 60, 10
    rows = tokens * layers * k
    token, layer = (
        np.repeat(np.arange(tokens), layers * k),
        np.tile(np.repeat(np.arange(layers), k), tokens),
    )
    p = -np.sort(-rng.dirichlet(np.ones(k), tokens * layers), axis=1).astype(np.float32)
    clock = np.cumsum(rng.integers(1000, 90_000, rows))
    recorder = Recorder()
    recorder.begin()
    recorder.tables["routing"].extend(
        rows,
        token=token,
        layer=layer,
        rank=np.tile(np.arange(k), tokens * layers),
        expert=rng.integers(0, 512, rows),
        probability=_rounded((p * rng.uniform(0.5, 0.9, (len(p), 1))).ravel()),
        weight=_rounded(p.ravel()),
        margin=np.repeat(_rounded(p[:, -1] * rng.random(len(p))), k),
        entropy=np.repeat(_rounded(rng.uniform(3, 5, len(p))), k),
    )
    recorder.tables["reads"].extend(
        rows,
        token=token,
        layer=layer,
        expert=rng.integers(0, 512, rows),
        offset=rng.integers(0, 512, rows) * 7_077_888,
        nbytes=7_077_888,
        submit_ns=np.repeat(clock[::k], k),
        start_ns=clock,
        end_ns=clock + 1_000_000 + rng.integers(0, 90_000, rows),
        thread=rng.integers(0, 8, rows),
        source=rng.integers(0, 3, rows),
        wanted=0,
        used=True,
    )
    ends = np.cumsum(rng.integers(1000, 900_000, 3 * tokens * layers))
    recorder.tables["spans"].extend(
        3 * tokens * layers,
        token=np.repeat(np.arange(tokens), 3 * layers),
        layer=np.tile(np.repeat(np.arange(layers), 3), tokens),
        stage=np.tile([12, 6, 7], tokens * layers),
        lane=np.tile([0, 2, 0], tokens * layers),
        start_ns=[0, *ends[:-1]],
        end_ns=ends,
    )
    path = recorder.finish().write(tmp_path)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert sum(sizes.values()) < 4.8e6, sizes
