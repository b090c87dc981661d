"""Figures of reads: when, by which thread, from where, how fast."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.select import busiest_token, check_layer, pass_of, shown
from flashmoe_lab.plots.style import (
    BLUE,
    GREY,
    LANE,
    LANE_WORDS,
    ORANGE,
    SOURCE,
    SOURCE_WORDS,
    canvas,
    conditions,
    grid,
    legend,
    plain_log,
    styled,
)
from flashmoe_lab.trace import Trace
from flashmoe_lab.trace.export import reading_threads
from flashmoe_lab.units import format_nbytes

_MOST_LAYERS = 20
_LEAST_WIDTH = 1 / 600  # of the axis: a shorter bar would be invisible
_LETTER_WIDTH = 1 / 130  # of the axis
_BINS = 160
_AHEAD, _NEEDLESS = "read ahead of the router", "ahead, for nothing"
_HOW = {"": {}, _AHEAD: {"hatch": "/////"}, _NEEDLESS: {"hatch": "/////", "alpha": 0.4}}


def io_timeline(trace: Trace, token: int | None = None, layer: int | None = None) -> Plot:
    """Reads of one pass as bars by thread, coloured by source, over what the run itself was at.

    Args:
        token: position; None takes the decode step that read most.
        layer: only this layer's part of the pass.
    """
    check_layer(trace, layer)
    token = busiest_token(trace) if token is None else token
    data = _timeline(trace, pass_of(trace, token), layer)
    reads, spans = data[data.kind == "read"], data[data.kind == "span"]
    word = shown(str(trace.tokens.set_index("token").text[token]))
    where = "" if layer is None else f", layer {layer}"
    title = f"Reads while token {token} {word} went through the model{where}"
    threads = _threads_at_work(trace, reads)
    figure, axes = canvas(title, conditions(trace), height=2.0 + 0.25 * len(threads))
    ax = axes[0, 0]
    places = {thread: place for place, thread in enumerate(threads)}
    _bars(ax, spans, LANE, data)
    for how, mine in reads.assign(row=reads.row.map(places)).groupby("how"):
        _bars(ax, mine, SOURCE, data, **_HOW[str(how)])
    ax.set_yticks([-1, *places.values()], ["the run", *threads.values()])
    ax.set_ylim(len(threads) - 0.4, -1.6 - 0.5 * _name_layers(ax, spans))
    ax.set_xlabel("ms since the pass began")
    ax.set_xlim(data.start_ms.min(), data.end_ms.max())
    grid(ax, "x")
    legend(ax, 3, _entries(reads, spans))
    return Plot(figure=figure, data=data, title=title)


def _threads_at_work(trace: Trace, reads: pd.DataFrame) -> dict[int, str]:
    """Reading threads by their rows; where the run itself read all, the idle ones are left out."""
    threads, worked = reading_threads(trace), set(reads.row)
    idle = not worked - {trace.facts["threads"], -1}
    return {n: name for n, name in threads.items() if n in worked} if idle else threads


def _timeline(trace: Trace, token: int, layer: int | None) -> pd.DataFrame:
    """kind, row, label, layer, expert, nbytes, start_ms, end_ms, how (of `_HOW`)."""
    begin = trace.tokens.set_index("token").start_ns[token]
    reads, spans = (table[table.token == token] for table in (trace.reads, trace.spans))
    if layer is not None:
        reads, spans = reads[reads.layer == layer], spans[spans.layer == layer]
    reads = reads[reads.nbytes > 0]
    spans = spans[spans.start_ns >= begin]  # the sampler's span lies before the pass
    parts = [
        pd.DataFrame(
            {
                "kind": kind,
                "row": table.thread.astype(int) if kind == "read" else -1,
                "label": (table.source if kind == "read" else table.lane).astype(str),
                "layer": table.layer,
                "expert": table.expert if kind == "read" else -1,
                "nbytes": table.nbytes if kind == "read" else 0,
                "start_ms": (table.start_ns - begin) / 1e6,
                "end_ms": (table.end_ns - begin) / 1e6,
                "how": _how(table) if kind == "read" else "",
            }
        )
        for kind, table in (("span", spans), ("read", reads))
    ]
    return pd.concat(parts, ignore_index=True)


def _how(reads: pd.DataFrame) -> np.ndarray:
    ahead = np.where(reads.used, _AHEAD, _NEEDLESS)
    return np.where(reads.wanted == "prefetch", ahead, "")


def _name_layers(ax: Axes, spans: pd.DataFrame) -> bool:
    """Numbers of the layers over the run's bar, if there is room."""
    begins = spans[spans.layer >= 0].groupby("layer").start_ms.min()
    if len(begins) > _MOST_LAYERS:
        return False
    letter = (spans.end_ms.max() - spans.start_ms.min()) * _LETTER_WIDTH
    free = begins.min()
    for layer, start in begins.items():
        if start >= free:  # else it would lie on the one before
            words = f"layer {layer}" if layer == begins.index[0] else str(layer)
            ax.text(start, -1.5, words, size=7.5)
            free = start + letter * (len(words) + 0.5)
    return True


def _bars(
    ax: Axes, data: pd.DataFrame, colours: dict[str, str], whole: pd.DataFrame, **how: Any
) -> None:
    least = (whole.end_ms.max() - whole.start_ms.min()) * _LEAST_WIDTH
    ax.barh(
        data.row,
        np.maximum(data.end_ms - data.start_ms, least),
        left=data.start_ms,
        height=0.8,
        color=[colours[label] for label in data.label],
        edgecolor="white",
        linewidth=0.2,
        **how,
    )


def _entries(reads: pd.DataFrame, spans: pd.DataFrame) -> list[Patch]:
    found = [(LANE, LANE_WORDS, spans), (SOURCE, SOURCE_WORDS, reads)]
    entries = [
        Patch(color=colours[name], label=("read from " if words is SOURCE_WORDS else "") + word)
        for colours, words, table in found
        for name, word in words.items()
        if name in set(table.label)
    ]
    kinds = [how for how in _HOW if how and how in set(reads.how)]
    return entries + [
        Patch(facecolor=GREY, edgecolor="white", label=how, **_HOW[how]) for how in kinds
    ]


def io_rate(trace: Trace, token: int | None = None) -> Plot:
    """How many reads are under way, and how fast bytes come, over the run or one pass."""
    reads, where = trace.reads[trace.reads.nbytes > 0], "over the run"
    row: Any = trace.facts
    if token is not None:
        reads = reads[reads.token == pass_of(trace, token)]
        row = trace.tokens.set_index("token").loc[token]
        where = f"while token {token} went through the model"
    if reads.empty:
        raise ValueError("the trace has no reads: the bank held every expert")
    data = _rates(reads, int(row["start_ns"]), int(row["end_ns"]))
    title = f"Reads under way and bytes a second, {where}"
    figure, axes = canvas(title, conditions(trace), rows=2, sharex=True, height=4.6)
    top, bottom = axes[:, 0]
    top.fill_between(data.ms, data.most_reads, step="post", color=ORANGE, alpha=0.35, linewidth=0)
    top.step(data.ms, data.mean_reads, where="post", color=ORANGE, label="mean")
    top.fill_between([], [], color=ORANGE, alpha=0.35, label="most at once")
    top.set_ylabel("reads under way")
    bottom.fill_between(data.ms, data.mb_per_s, step="post", color=BLUE, linewidth=0)
    bottom.set_ylabel("MB/s")
    bottom.set_xlabel("ms since the run began" if token is None else "ms since the pass began")
    bottom.set_xlim(0, data.ms.iloc[-1])
    for ax in (top, bottom):
        ax.set_ylim(0)
        grid(ax)
    with styled():
        top.legend(loc="upper right", ncols=2)
    return Plot(figure=figure, data=data, title=title)


def _rates(reads: pd.DataFrame, begin: int, end: int) -> pd.DataFrame:
    """ms, mean_reads, most_reads, mb_per_s: in equal parts of the time."""
    edges = np.linspace(begin, end, _BINS + 1)
    submit, ended = (np.sort(reads[name].to_numpy()) for name in ("submit_ns", "end_ns"))
    moments = np.sort(np.concatenate([submit, edges[:-1]]))
    depth = np.searchsorted(submit, moments, "right") - np.searchsorted(ended, moments, "right")
    place = np.clip(np.searchsorted(edges, moments, "right") - 1, 0, _BINS - 1)
    most = np.zeros(_BINS)
    np.maximum.at(most, place, depth)
    # A read's bytes are spread evenly over its own time.
    dur = np.maximum((reads.end_ns - reads.start_ns).to_numpy(), 1)
    starts, ends = (reads[name].to_numpy()[:, None] for name in ("start_ns", "end_ns"))
    nbytes, busy = np.zeros(_BINS), np.zeros(_BINS)
    submits = reads.submit_ns.to_numpy()[:, None]
    for part in range(0, len(reads), 4096):
        rows = slice(part, part + 4096)
        low, high = edges[None, :-1], edges[None, 1:]
        inside = np.clip(np.minimum(ends[rows], high) - np.maximum(starts[rows], low), 0, None)
        share = reads.nbytes.to_numpy()[rows, None] / dur[rows, None]
        nbytes += (inside * share).sum(0)
        under = np.minimum(ends[rows], high) - np.maximum(submits[rows], low)
        busy += np.clip(under, 0, None).sum(0)
    width = edges[1] - edges[0]
    return pd.DataFrame(
        {
            "ms": (edges[:-1] - begin) / 1e6,
            "mean_reads": busy / width,
            "most_reads": most,
            "mb_per_s": nbytes / 1e6 / (width / 1e9),
        }
    )


def read_latency(trace: Trace) -> Plot:
    """How long reads take from submission to end, by source, as a cumulative distribution."""
    reads = trace.reads[trace.reads.nbytes > 0]
    if reads.empty:
        raise ValueError("the trace has no reads: the bank held every expert")
    block = format_nbytes(float(reads.nbytes.median()))
    title = f"Time of {len(reads):,} reads of {block}, by where the bytes were"
    figure, axes = canvas(title, conditions(trace))
    ax, parts = axes[0, 0], list[pd.DataFrame]()
    for source, colour in SOURCE.items():
        mine = reads[reads.source == source]
        if mine.empty:
            continue
        for name, since, line in (("read", "start_ns", "-"), ("with queue", "submit_ns", ":")):
            us = np.sort((mine.end_ns - mine[since]).to_numpy() / 1e3)
            share = np.arange(1, len(us) + 1) / len(us)
            words = f"{SOURCE_WORDS[source]}, {name}: median {np.median(us):,.0f} us"
            ax.step(us, 100 * share, where="post", color=colour, linestyle=line, label=words)
            parts.append(pd.DataFrame({"source": source, "time": name, "us": us, "share": share}))
    ax.set_xscale("log")
    plain_log(ax.xaxis)
    ax.set_xlabel("us (solid: in the reading thread; dotted: since submission)")
    ax.set_ylabel("% of reads that took at most so long")
    ax.set_ylim(0, 101)
    grid(ax, "both")
    legend(ax, 2)
    return Plot(figure=figure, data=pd.concat(parts, ignore_index=True), title=title)
