"""Several runs in one figure: what a setting changed, in time, bytes, hits and where time went."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.select import decode_tokens
from flashmoe_lab.plots.style import (
    LANE,
    LANE_WORDS,
    PALE,
    SERIES,
    canvas,
    grid,
    layer_ticks,
    legend,
    plain_log,
)
from flashmoe_lab.trace import Trace
from flashmoe_lab.trace.export import requests

_MOST = len(SERIES)


def compare_runs(traces: Mapping[str, Trace]) -> Plot:
    """Runs beside one another, each under its name: `{"4 GB bank": a, "8 GB bank": b}`.

    Decode steps only. The panels: time a token and bytes a token as cumulative distributions, hits
    by layer, and the time of the whole run by kind.
    """
    if not 2 <= len(traces) <= _MOST:
        raise ValueError(f"{len(traces)} runs; this draws 2 to {_MOST}")
    steps = pd.concat([_steps(trace).assign(run=name) for name, trace in traces.items()])
    hits = pd.concat([_hits(trace).assign(run=name) for name, trace in traces.items()])
    lanes = pd.concat([_lanes(trace).assign(run=name) for name, trace in traces.items()])
    title = f"{len(traces)} runs compared"
    modes = ", ".join(dict.fromkeys(trace.mode for trace in traces.values()))
    figure, axes = canvas(title, f"decode steps; trace mode {modes}", height=6.2, rows=2, columns=2)
    colours = dict(zip(traces, SERIES, strict=False))
    for ax, column, unit in ((axes[0, 0], "ms", "ms a token"), (axes[0, 1], "mb", "MB a token")):
        for name, colour in colours.items():
            values = np.sort(steps[steps.run == name][column].to_numpy())
            share = 100 * np.arange(1, len(values) + 1) / len(values)
            ax.step(values, share, where="post", color=colour)
            ax.axvline(values.mean(), color=colour, linewidth=0.8, linestyle=":")
        if column == "ms":  # a single slow token would press all others into a line
            ax.set_xscale("log")
            plain_log(ax.xaxis)
        ax.set_xlabel(f"{unit} (dotted: mean)")
        ax.set_ylabel("% of tokens at most")
        ax.set_ylim(0, 101)
        grid(ax, "both")
    ax = axes[1, 0]
    for name, colour in colours.items():
        mine = hits[hits.run == name]
        ax.plot(mine.layer, 100 * mine.hit, color=colour, marker="o", ms=3.5)
    ax.set_xlabel("layer")
    ax.set_ylabel("% found in the bank")
    ax.set_ylim(-2, 102)
    layer_ticks(ax.xaxis, max(trace.facts["num_hidden_layers"] for trace in traces.values()))
    grid(ax)
    _stack(axes[1, 1], lanes, list(traces))
    entries = [Patch(color=colour, label=name) for name, colour in colours.items()]
    present = [lane for lane in LANE if (lanes.lane == lane).any()]
    entries += [Patch(color=LANE[lane], label=LANE_WORDS[lane], alpha=0.55) for lane in present]
    legend(axes[0, 0], 4, entries)
    data = pd.concat(
        [steps.assign(of="token"), hits.assign(of="layer"), lanes.assign(of="lane")],
        ignore_index=True,
    )
    return Plot(figure=figure, data=data, title=title)


def _stack(ax: Axes, lanes: pd.DataFrame, names: list[str]) -> None:
    left = np.zeros(len(names))
    for lane in (*LANE, "unexplained"):
        part = lanes[lanes.lane == lane].set_index("run").share.reindex(names, fill_value=0.0)
        if lane == "unexplained" or part.any():
            colour, alpha = LANE.get(lane, PALE), 0.55 if lane in LANE else 1.0
            width = 100 * part.to_numpy()
            ax.barh(range(len(names)), width, left=left, color=colour, alpha=alpha)
            left = left + width
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("% of the run's time, by kind")


def _steps(trace: Trace) -> pd.DataFrame:
    """token, ms, mb of every decode step."""
    positions = decode_tokens(trace)
    tokens = trace.tokens.set_index("token").loc[positions]
    nbytes = trace.reads.groupby("token").nbytes.sum().reindex(positions, fill_value=0)
    ms = (tokens.end_ns - tokens.start_ns).to_numpy() / 1e6
    return pd.DataFrame({"token": positions.to_numpy(), "ms": ms, "mb": nbytes.to_numpy() / 1e6})


def _hits(trace: Trace) -> pd.DataFrame:
    """layer, hit: share of what decode steps asked for."""
    asked = requests(trace)
    asked = asked[asked.token.isin(decode_tokens(trace))]
    return asked.groupby("layer").hit.mean().reset_index()


def _lanes(trace: Trace) -> pd.DataFrame:
    """lane, share of the wall time."""
    shares = {lane: ns / trace.dur_ns for lane, ns in trace.lane_ns.items()}
    shares["unexplained"] = 1 - sum(shares.values())
    return pd.DataFrame({"lane": list(shares), "share": list(shares.values())})
