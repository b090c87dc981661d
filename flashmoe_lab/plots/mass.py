"""How much of the router's probability K experts hold, for every K: the cost of a smaller one.

It draws the router's logits, which a trace holds only if it was told to:
`record=["layers.*.router.logits"]`.
"""

import numpy as np
import pandas as pd
from matplotlib import colormaps

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.style import HEAT, RED, canvas, conditions, grid, legend
from flashmoe_lab.trace import Trace


def mass_by_k(trace: Trace) -> Plot:
    """Share of the router's probability that its K most probable experts hold, mean over tokens,
    a line a layer."""
    data = router_mass(trace)
    layers, own = sorted(data.layer.unique()), trace.facts["model_num_experts_per_tok"]
    title = "Probability that the K most probable experts hold, by layer"
    figure, axes = canvas(title, conditions(trace))
    ax = axes[0, 0]
    experts, colours = trace.facts["num_experts"], colormaps[HEAT]
    for place, layer in enumerate(layers):
        mine = data[data.layer == layer]
        named = len(layers) <= 8 or layer in (layers[0], layers[len(layers) // 2], layers[-1])
        label = f"layer {layer}" if named else None
        colour = colours(place / max(len(layers) - 1, 1) * 0.9)
        ax.plot(mine.k, 100 * mine.mass, color=colour, label=label)
    ks = np.arange(1, experts + 1)
    ax.plot(ks, 100 * ks / experts, color="grey", linestyle="--", label="even over all experts")
    ax.axvline(own, color=RED, linewidth=1.5, label=f"the model's own K = {own}")
    ax.set_xlabel("K")
    ax.set_ylabel("% of the probability")
    ax.set_xlim(1, experts)
    ax.set_ylim(0, 102)
    grid(ax)
    legend(ax, 5)
    return Plot(figure=figure, data=data, title=title)


def router_mass(trace: Trace) -> pd.DataFrame:
    """layer, k, mass: mean over tokens.

    Raises:
        ValueError: the trace kept no router logits.
    """
    kept = {
        int(name.split(".")[1]): rows
        for name, (_, rows) in trace.arrays.items()
        if name.endswith(".router.logits")
    }
    if not kept:
        raise ValueError(
            "the trace holds no router logits; generate with record=['layers.*.router.logits']"
        )
    parts: list[pd.DataFrame] = []
    for layer, logits in sorted(kept.items()):
        p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
        p = -np.sort(-p / p.sum(-1, keepdims=True), axis=-1)
        mass = p.cumsum(-1).mean(0)
        parts.append(pd.DataFrame({"layer": layer, "k": range(1, len(mass) + 1), "mass": mass}))
    return pd.concat(parts, ignore_index=True)
