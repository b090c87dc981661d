"""A trace in other tools' formats: CSV, Chrome's trace JSON (opens in Perfetto), libCacheSim.

Times in Chrome's format are microseconds since the run began. Each reading thread and each lane of
the run is a track of its own, and no two events of a track overlap: Perfetto shows such traces
rightly and no others.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flashmoe_lab.trace.schema import LANES
from flashmoe_lab.trace.trace import NAMES, Trace

_RUN, _READERS = 1, 2  # process numbers
Event = dict[str, Any]


def write_csv(trace: Trace, directory: str | Path) -> Path:
    """One file a table, with the columns of docs/trace_schema.md."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        getattr(trace, name).to_csv(path / f"{name}.csv", index=False)
    return path


def write_chrome(trace: Trace, file: str | Path) -> Path:
    """A .json or .json.gz file for https://ui.perfetto.dev or chrome://tracing."""
    path = Path(file)
    text = json.dumps({"traceEvents": chrome_events(trace), "displayTimeUnit": "ms"})
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as stream:
            stream.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


def chrome_events(trace: Trace) -> list[Event]:
    """Every event, times ascending; names of tracks first."""
    begin = trace.facts["start_ns"]
    events = [*_spans(trace.spans, begin), *_reads(trace.reads, begin)]
    events += [*_depth(trace.reads, begin), *_bank(trace.reads, begin)]
    return _names(trace) + sorted(events, key=lambda event: event["ts"])


def _names(trace: Trace) -> list[Event]:
    lanes = {(_RUN, n): lane for n, lane in enumerate(LANES)}
    threads = {(_READERS, n): name for n, name in reading_threads(trace).items()}
    processes = {_RUN: f"the run ({trace.mode})", _READERS: "reading threads"}
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "ts": 0, "args": {"name": name}}
        for pid, name in processes.items()
    ] + [
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}
        for (pid, tid), name in (lanes | threads).items()
    ]


def reading_threads(trace: Trace) -> dict[int, str]:
    """Number -> name of every reading thread; the run's own too, if it read anything itself."""
    own = trace.facts["threads"]
    names = {n: f"reader {n}" for n in range(own)}
    return names | ({own: "run itself"} if (trace.reads.thread == own).any() else {})


def _spans(spans: pd.DataFrame, begin: int) -> Iterator[Event]:
    tids = {lane: n for n, lane in enumerate(LANES)}
    for row in spans.itertuples():
        yield {
            "ph": "X",
            "name": row.stage,
            "cat": row.lane,
            "pid": _RUN,
            "tid": tids[str(row.lane)],
            "ts": _us(row.start_ns - begin),  # pyright: ignore[reportOperatorIssue]
            "dur": _us(row.end_ns - row.start_ns),  # pyright: ignore[reportOperatorIssue]
            "args": {"token": row.token, "layer": row.layer},
        }


def _reads(reads: pd.DataFrame, begin: int) -> Iterator[Event]:
    for row in reads[reads.nbytes > 0].itertuples():
        yield {
            "ph": "X",
            "name": f"layer {row.layer} expert {row.expert}",
            "cat": row.source,
            "pid": _READERS,
            "tid": row.thread,
            "ts": _us(row.start_ns - begin),  # pyright: ignore[reportOperatorIssue]
            "dur": _us(row.end_ns - row.start_ns),  # pyright: ignore[reportOperatorIssue]
            "args": {"token": row.token, "nbytes": row.nbytes, "offset": row.offset},
        }


def _depth(reads: pd.DataFrame, begin: int) -> Iterator[Event]:
    """Reads handed over and not yet ended."""
    asked = reads[reads.nbytes > 0]
    times = np.concatenate([asked.submit_ns, asked.end_ns])
    steps = np.repeat([1, -1], len(asked))
    order = np.lexsort((-steps, times))
    for time, depth in zip(times[order], np.cumsum(steps[order]), strict=True):
        yield _counter("queue depth", time - begin, {"reads": int(depth)})


def _bank(reads: pd.DataFrame, begin: int) -> Iterator[Event]:
    """Experts found in the bank and read, so far."""
    asked = reads[reads.used].drop_duplicates(["token", "layer", "expert"])
    steps = asked.assign(hit=asked.nbytes == 0).groupby(["token", "layer"], sort=False)
    sums = steps.agg(time=("submit_ns", "max"), hits=("hit", "sum"), count=("hit", "size"))
    sums = sums.sort_values("time")
    hits, misses = sums.hits.cumsum(), (sums["count"] - sums.hits).cumsum()
    for time, hit, miss in zip(sums.time, hits, misses, strict=True):
        yield _counter("bank", time - begin, {"hits": int(hit), "misses": int(miss)})


def _counter(name: str, ns: int, values: dict[str, int]) -> Event:
    return {"ph": "C", "name": name, "pid": _READERS, "tid": 0, "ts": _us(ns), "args": values}


def _us(ns: Any) -> float:
    return int(ns) / 1e3


def write_libcachesim(trace: Trace, file: str | Path) -> Path:
    """The blocks asked for, in order, as libCacheSim reads them.

    A .txt file holds one object a line; a .csv file time (the pass, from 0), object and bytes. An
    object is layer * experts + expert.
    """
    path = Path(file)
    asked = requests(trace)
    objects = asked.layer.astype(int) * trace.facts["num_experts"] + asked.expert
    if path.suffix == ".csv":
        sizes = block_nbytes(trace)[asked.layer]
        rows = {"time": asked["pass"], "obj_id": objects, "obj_size": sizes}
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        objects.to_csv(path, index=False, header=False)
    return path


def block_nbytes(trace: Trace) -> np.ndarray:
    """Bytes of an expert of each layer: layers may be packed differently."""
    facts = trace.facts
    each = str(facts.get("layer_block_nbytes") or facts["block_nbytes"]).split(",")
    return np.resize(np.array([int(n) for n in each]), facts["num_hidden_layers"])


def requests(trace: Trace) -> pd.DataFrame:
    """pass, token, layer, expert, hit: every block that a pass asked for, once, in order."""
    key = ["token", "layer", "expert"]
    asked = trace.reads[trace.reads.used].drop_duplicates(key).sort_values(key, kind="stable")
    table = asked[["token", "layer", "expert"]].reset_index(drop=True)
    table.insert(0, "pass", table.token.rank(method="dense").astype(int) - 1)
    return table.assign(hit=(asked.nbytes == 0).to_numpy())
