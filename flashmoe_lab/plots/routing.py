"""Figures of what the router chose."""

import numpy as np
import pandas as pd

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.select import check_layer
from flashmoe_lab.plots.style import BLUE, RED, canvas, conditions, grid, legend
from flashmoe_lab.trace import Trace


def expert_histogram(trace: Trace, layer: int | None = None, ordered: bool = True) -> Plot:
    """How often each expert was chosen, against what an even router would do.

    Args:
        layer: one layer; None takes every (layer, expert) of the model.
        ordered: most chosen first; False keeps the experts' numbers.
    """
    check_layer(trace, layer)
    data = choices(trace, layer)
    if ordered:
        data = data.sort_values("count", ascending=False, kind="stable")
    data = data.reset_index(drop=True)
    tokens = trace.routing.token.nunique()
    where = "all layers" if layer is None else f"layer {layer}"
    title = f"How often each expert was chosen, {where}, {tokens} tokens"
    figure, axes = canvas(title, conditions(trace))
    ax = axes[0, 0]
    ax.bar(data.index, data["count"], width=1.0 if len(data) > 100 else 0.85, color=BLUE)
    even = data["uniform"].iloc[0]
    share = data["count"].nlargest(max(1, len(data) // 4)).sum() / max(data["count"].sum(), 1)
    unused = int((data["count"] == 0).sum())
    words = f"the top quarter takes {share:.0%} of the choices; {unused} were never chosen"
    ax.axhline(even, color=RED, linewidth=1.5, label=f"even choice: {even:.1f} each ({words})")
    names = "(layer, expert)" if layer is None else "expert"
    ax.set_xlabel(f"{names}, most chosen first" if ordered else names)
    ax.set_ylabel("times chosen")
    ax.set_xlim(-0.01 * len(data) - 0.5, len(data) - 0.5)
    grid(ax)
    legend(ax)
    return Plot(figure=figure, data=data, title=title)


def choices(trace: Trace, layer: int | None = None) -> pd.DataFrame:
    """layer, expert, count, uniform: every expert of the layer or layers, chosen or not."""
    facts, routing = trace.facts, trace.routing
    layers = range(facts["num_hidden_layers"]) if layer is None else [layer]
    experts = facts["num_experts"]
    counts = np.zeros((facts["num_hidden_layers"], experts), np.int64)
    np.add.at(counts, (routing.layer.to_numpy(), routing.expert.to_numpy()), 1)
    chosen = counts[list(layers)]
    return pd.DataFrame(
        {
            "layer": np.repeat(list(layers), experts),
            "expert": np.tile(np.arange(experts), len(chosen)),
            "count": chosen.ravel(),
            "uniform": np.repeat(chosen.sum(1) / experts, experts),
        }
    )
