"""Figures of what the router chose: which experts, how surely, and how it changes over a text."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.select import check_layer
from flashmoe_lab.plots.style import (
    BLUE,
    GREY,
    HEAT,
    ORANGE,
    RED,
    SKY,
    band,
    canvas,
    colourbar,
    conditions,
    grid,
    layer_ticks,
    legend,
    styled,
)
from flashmoe_lab.trace import Trace
from flashmoe_lab.trace.export import block_nbytes


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
    if len(data) > 100:
        ax.fill_between(data.index, data["count"], step="mid", color=BLUE, linewidth=0)
    else:
        ax.bar(data.index, data["count"], width=0.85, color=BLUE)
    even = data["uniform"].mean()  # layers may have different K
    share = data["count"].nlargest(max(1, len(data) // 4)).sum() / max(data["count"].sum(), 1)
    unused = int((data["count"] == 0).sum())
    words = f"the top quarter takes {share:.0%} of the choices; never chosen: {unused}"
    ax.axhline(even, color=RED, linewidth=1.5, label=f"even choice: {even:.1f} each ({words})")
    names = "(layer, expert)" if layer is None else "expert"
    ax.set_xlabel(f"{names}, most chosen first" if ordered else names)
    ax.set_ylabel("times chosen")
    ax.set_xlim(-0.01 * len(data) - 0.5, len(data) - 0.5)
    ax.set_ylim(0)
    grid(ax)
    legend(ax)
    return Plot(figure=figure, data=data, title=title)


def choices(trace: Trace, layer: int | None = None) -> pd.DataFrame:
    """layer, expert, count, uniform: every expert of the layer or layers, chosen or not."""
    facts, routing = trace.facts, trace.routing
    layers = range(facts["num_hidden_layers"]) if layer is None else [layer]
    experts = facts["num_experts"]
    flat = routing.layer.to_numpy().astype(np.int64) * experts + routing.expert.to_numpy()
    counts = np.bincount(flat, minlength=facts["num_hidden_layers"] * experts)
    chosen = counts.reshape(-1, experts)[list(layers)]
    return pd.DataFrame(
        {
            "layer": np.repeat(list(layers), experts),
            "expert": np.tile(np.arange(experts), len(chosen)),
            "count": chosen.ravel(),
            "uniform": np.repeat(chosen.sum(1) / experts, experts),
        }
    )


def expert_heatmap(trace: Trace, ordered: bool = False) -> Plot:
    """How often each expert of each layer was chosen; `ordered` sorts each layer by it."""
    data = choices(trace)
    experts, tokens = trace.facts["num_experts"], trace.routing.token.nunique()
    share = data["count"].to_numpy().reshape(-1, experts) / max(tokens, 1)
    if ordered:
        share = -np.sort(-share, axis=1)
    title = f"Share of {tokens} tokens that chose each expert of each layer"
    figure, axes = canvas(title, conditions(trace), height=4.2)
    ax = axes[0, 0]
    image = ax.imshow(100 * share, aspect="auto", cmap=HEAT, interpolation="nearest", vmin=0)
    ax.set_xlabel("expert, most chosen of its layer first" if ordered else "expert")
    ax.set_ylabel("layer")
    layer_ticks(ax.yaxis, len(share))
    even = 100 * data["uniform"].mean() / max(tokens, 1)
    colourbar(figure, image, ax, f"% of tokens (even choice: {even:.1f} %)")
    return Plot(figure=figure, data=data.assign(share=data["count"] / max(tokens, 1)), title=title)


def token_overlap(trace: Trace) -> Plot:
    """How many of a token's experts the token before it had too, by layer."""
    data = _overlap(trace)
    title = "Share of a token's experts that the token before it chose too"
    figure, axes = canvas(title, conditions(trace))
    ax = axes[0, 0]
    ax.bar(data.layer, 100 * data["mean"], color=BLUE, width=0.8, label="mean over tokens")
    even = 100 * data.chance
    words = f"by chance: {data.chance.mean():.0%}"
    ax.hlines(even, data.layer - 0.4, data.layer + 0.4, color=RED, linewidth=1.5, label=words)
    ax.set_xlabel("layer")
    ax.set_ylabel("% of experts shared")
    layer_ticks(ax.xaxis, len(data))
    grid(ax)
    legend(ax)
    return Plot(figure=figure, data=data, title=title)


def _overlap(trace: Trace) -> pd.DataFrame:
    """layer, mean, pairs, chance: what even choices would share."""
    table = trace.routing[["token", "layer", "expert"]].drop_duplicates()
    sizes = table.groupby(["token", "layer"]).size()
    again = table.assign(token=table.token + 1)
    shared = table.merge(again).groupby(["token", "layer"]).size()
    seen = set(table.token)
    sizes = sizes[[token - 1 in seen for token, _ in sizes.index]]
    share = (shared.reindex(sizes.index, fill_value=0) / sizes).reset_index(name="share")
    found = share.groupby("layer").share.agg(["mean", "size"]).reset_index()
    chance = _mean_k(trace)[found.layer] / trace.facts["num_experts"]
    return found.rename(columns={"size": "pairs"}).assign(chance=chance)


def _mean_k(trace: Trace) -> np.ndarray:
    """Experts that a token went to, on average, by layer."""
    layers = range(trace.facts["num_hidden_layers"])
    counts = trace.routing.groupby("layer").token.agg(["size", "nunique"])
    return (counts["size"] / counts["nunique"]).reindex(layers, fill_value=0).to_numpy()


def working_set(trace: Trace) -> Plot:
    """How many different (layer, expert) blocks a text has needed after so many tokens."""
    data = _working_set(trace)
    facts = trace.facts
    total = facts["num_hidden_layers"] * facts["num_experts"]
    title = f"Different experts needed so far, of {total:,} in the model"
    figure, axes = canvas(title, conditions(trace))
    ax = axes[0, 0]
    ax.plot(data.tokens, data.blocks, color=BLUE, linewidth=2, label="this run")
    ax.plot(data.tokens, data.even, color=RED, linewidth=1.5, linestyle="--", label="even router")
    if facts["bank_keeps"]:
        slots = facts["bank_slots"]
        ax.axhline(slots, color=GREY, linewidth=1, label=f"bank: {slots:,} slots")
    ax.set_xlabel("tokens")
    ax.set_ylabel("different (layer, expert)")
    ax.set_xlim(0, data.tokens.max())
    ax.set_ylim(0)
    megabytes = float(block_nbytes(trace).mean()) / 1e6
    scale = (lambda n: n * megabytes, lambda m: m / megabytes)
    with styled():
        right = ax.secondary_yaxis("right", functions=scale)
    right.set_ylabel("MB")
    grid(ax)
    legend(ax)
    return Plot(figure=figure, data=data, title=title)


def _working_set(trace: Trace) -> pd.DataFrame:
    """tokens, blocks, even: distinct blocks after so many tokens, and an even router's mean."""
    facts, routing = trace.facts, trace.routing
    if routing.empty:
        raise ValueError("the trace has no routing: no pass went through the model")
    first = routing.groupby(["layer", "expert"]).token.min()
    count = int(routing.token.max()) + 1
    blocks = np.bincount(first, minlength=count).cumsum()
    tokens = np.arange(1, count + 1)
    missed = 1 - _mean_k(trace) / facts["num_experts"]
    even = facts["num_experts"] * (1 - missed[None] ** tokens[:, None]).sum(1)
    return pd.DataFrame({"tokens": tokens, "blocks": blocks, "even": even})


def router_weights(trace: Trace) -> Plot:
    """The weight of each rank, and by how much the last expert taken beats the first left out."""
    weights = band(trace.routing.groupby("rank").weight, "weight")
    once = trace.routing[trace.routing["rank"] == 0]
    margins = band(once.groupby("layer").margin, "margin")
    title = "Router weights by rank, and margin of the last expert taken"
    figure, axes = canvas(title, conditions(trace), columns=2)
    left, right = axes[0]
    _banded(left, weights, "rank", BLUE)
    left.set_xlabel("rank (0: the router's first choice)")
    left.set_ylabel("weight in the sum")
    layer_ticks(left.xaxis, len(weights))
    _banded(right, margins, "layer", ORANGE)
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set_xlabel("layer")
    right.set_ylabel("margin in probability")
    layer_ticks(right.xaxis, len(margins))
    legend(left, entries=[*left.get_legend_handles_labels()[0]])
    data = pd.concat([weights, margins], ignore_index=True)
    return Plot(figure=figure, data=data, title=title)


def router_entropy(trace: Trace) -> Plot:
    """How spread the router's probabilities are, and how much of them the K experts cover."""
    once = trace.routing[trace.routing["rank"] == 0]
    entropy = band(once.groupby("layer").entropy, "entropy")
    mass = trace.routing.groupby(["token", "layer"]).probability.sum().reset_index()
    coverage = band(mass.groupby("layer").probability, "coverage")
    experts = trace.facts["num_experts"]
    title = "Router entropy, and the probability that the chosen experts cover"
    figure, axes = canvas(title, conditions(trace), columns=2)
    left, right = axes[0]
    _banded(left, entropy, "layer", BLUE)
    left.axhline(np.log(experts), color=RED, linewidth=1.5)
    left.text(0, np.log(experts), "even over all experts", color=RED, size=8, va="bottom")
    left.set_ylabel("entropy in nats")
    left.set_ylim(0, np.log(experts) * 1.12)
    _banded(right, coverage, "layer", SKY)
    right.set_ylabel("probability covered by K experts")
    right.set_ylim(0, 1)
    for ax in (left, right):
        ax.set_xlabel("layer")
        layer_ticks(ax.xaxis, len(entropy))
    legend(left, entries=[*left.get_legend_handles_labels()[0]])
    data = pd.concat([entropy, coverage], ignore_index=True)
    return Plot(figure=figure, data=data, title=title)


def _banded(ax: Axes, data: pd.DataFrame, x: str, colour: str) -> None:
    label = "mean of all tokens; the bars reach from the 10th to the 90th percentile"
    low, high = data["mean"] - data.p10, data.p90 - data["mean"]
    errors = np.maximum([low, high], 0)  # a mean may lie outside
    ax.errorbar(
        data[x], data["mean"], yerr=errors, color=colour, marker="o", ms=4, capsize=2, label=label
    )
    grid(ax)
