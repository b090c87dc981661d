"""Figures of where time goes."""

import numpy as np
import pandas as pd

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.select import decode_tokens
from flashmoe_lab.plots.style import STAGE, canvas, conditions, grid, legend
from flashmoe_lab.trace import Trace


def layer_latency(trace: Trace) -> Plot:
    """Mean time of a decode step in each layer, stacked by stage."""
    positions = decode_tokens(trace)
    data = _by_stage(trace, positions)
    title = f"Time of a decode step in each layer, mean of {len(positions)} tokens"
    figure, axes = canvas(title, conditions(trace))
    ax = axes[0, 0]
    bottom = np.zeros(trace.facts["num_hidden_layers"])
    for key, (label, colour) in STAGE.items():
        part = data[(data.stage == key[0]) & (data.lane == key[1])]
        if part.empty:
            continue
        heights = part.set_index("layer").mean_ms.reindex(range(len(bottom)), fill_value=0)
        ax.bar(range(len(bottom)), heights, bottom=bottom, color=colour, label=label, width=0.8)
        bottom += heights.to_numpy()
    ax.set_xlabel("layer")
    ax.set_ylabel("ms a token")
    if len(bottom) <= 20:
        ax.set_xticks(range(len(bottom)))
    grid(ax)
    legend(ax, 4)
    return Plot(figure=figure, data=data, title=title)


def _by_stage(trace: Trace, positions: pd.Series) -> pd.DataFrame:
    """layer, stage, lane, mean_ms over the tokens at these positions."""
    spans = trace.spans
    spans = spans[spans.token.isin(positions) & (spans.layer >= 0)]
    dur = (spans.end_ns - spans.start_ns).groupby(
        [spans.layer, spans.stage.astype(str), spans.lane.astype(str)]
    )
    return (dur.sum() / len(positions) / 1e6).rename("mean_ms").reset_index()
