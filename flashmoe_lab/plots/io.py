"""Figures of reads: when, by which thread, from where, how fast."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.select import busiest_token, check_layer, check_token, shown
from flashmoe_lab.plots.style import (
    LANE,
    LANE_WORDS,
    SOURCE,
    SOURCE_WORDS,
    canvas,
    conditions,
    grid,
    legend,
)
from flashmoe_lab.trace import Trace

_MOST_LAYERS = 20
_LEAST_WIDTH = 1 / 600  # of the axis: a shorter bar would be invisible


def io_timeline(trace: Trace, token: int | None = None, layer: int | None = None) -> Plot:
    """Reads of one pass as bars by thread, coloured by source, over what the run itself was at.

    Args:
        token: position; None takes the decode step that read most.
        layer: only this layer's part of the pass.
    """
    check_layer(trace, layer)
    token = busiest_token(trace) if token is None else token
    check_token(trace, token)
    data = _timeline(trace, token, layer)
    reads, spans = data[data.kind == "read"], data[data.kind == "span"]
    word = shown(str(trace.tokens.set_index("token").text[token]))
    where = "" if layer is None else f", layer {layer}"
    title = f"Reads while token {token} {word} went through the model{where}"
    figure, axes = canvas(title, conditions(trace), height=4.4)
    ax = axes[0, 0]
    _bars(ax, spans, LANE, 0.8, (data.end_ms.max() - data.start_ms.min()) * _LEAST_WIDTH)
    _bars(ax, reads, SOURCE, 0.8, (data.end_ms.max() - data.start_ms.min()) * _LEAST_WIDTH)
    threads = range(trace.facts["threads"])
    ax.set_yticks([-1, *threads], ["the run", *(f"reader {n}" for n in threads)])
    ax.set_ylim(len(threads) - 0.4, -1.6 - 0.5 * _name_layers(ax, spans))
    ax.set_xlabel("ms since the pass began")
    ax.set_xlim(data.start_ms.min(), data.end_ms.max())
    grid(ax, "x")
    legend(ax, 3, _entries(reads, spans))
    return Plot(figure=figure, data=data, title=title)


def _timeline(trace: Trace, token: int, layer: int | None) -> pd.DataFrame:
    """kind, row, label, layer, expert, nbytes, start_ms, end_ms."""
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
            }
        )
        for kind, table in (("span", spans), ("read", reads))
    ]
    return pd.concat(parts, ignore_index=True)


def _name_layers(ax: Axes, spans: pd.DataFrame) -> bool:
    """Numbers of the layers over the run's bar, if there is room."""
    begins = spans[spans.layer >= 0].groupby("layer").start_ms.min()
    if len(begins) > _MOST_LAYERS:
        return False
    for layer, start in begins.items():
        ax.text(start, -1.5, f"layer {layer}" if layer == begins.index[0] else str(layer), size=7.5)
    return True


def _bars(
    ax: Axes, data: pd.DataFrame, colours: dict[str, str], height: float, least: float
) -> None:
    widths = np.maximum(data.end_ms - data.start_ms, least)
    ax.barh(
        data.row,
        widths,
        left=data.start_ms,
        height=height,
        color=[colours[label] for label in data.label],
        edgecolor="white",
        linewidth=0.2,
    )


def _entries(reads: pd.DataFrame, spans: pd.DataFrame) -> list[Patch]:
    found = [(LANE, LANE_WORDS, spans), (SOURCE, SOURCE_WORDS, reads)]
    return [
        Patch(color=colours[name], label=("read from " if words is SOURCE_WORDS else "") + word)
        for colours, words, table in found
        for name, word in words.items()
        if name in set(table.label)
    ]
