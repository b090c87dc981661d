"""Figures of the two memories: DeltaNet's matrices, and what attention looks back at.

They draw arrays that a trace holds only if it was told to:
`record=["layers.*.mixer.state_norm", "layers.*.mixer.decay", "layers.*.mixer.write_strength",
"layers.*.mixer.attention"]`.
"""

import numpy as np
import pandas as pd

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.select import shown
from flashmoe_lab.plots.style import (
    BLUE,
    HEAT,
    ORANGE,
    SERIES,
    canvas,
    colourbar,
    conditions,
    grid,
    layer_ticks,
    legend,
)
from flashmoe_lab.trace import Trace

_LABELS = 32  # tokens up to which each is named on an axis


def _kept(trace: Trace, name: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """layer -> (positions, rows) of one kind of array."""
    found = {
        int(key.split(".")[1]): value
        for key, value in trace.arrays.items()
        if key.endswith(f".mixer.{name}")
    }
    if not found:
        raise ValueError(
            f"the trace holds no {name}; generate with record=['layers.*.mixer.{name}']"
        )
    return dict(sorted(found.items()))


def _one_layer(trace: Trace, name: str, layer: int | None) -> tuple[int, np.ndarray, np.ndarray]:
    kept = _kept(trace, name)
    layer = next(iter(kept)) if layer is None else layer
    if layer not in kept:
        raise ValueError(f"layer {layer} has no {name}; kept are layers {sorted(kept)}")
    return layer, *kept[layer]


def state_norm(trace: Trace, layer: int | None = None) -> Plot:
    """Norm of each head's recurrent matrix over the text."""
    layer, positions, rows = _one_layer(trace, "state_norm", layer)
    heads = rows.shape[1]
    data = pd.DataFrame(
        {
            "layer": layer,
            "token": np.repeat(positions, heads),
            "head": np.tile(np.arange(heads), len(rows)),
            "norm": rows.ravel(),
        }
    )
    title = f"Norm of the DeltaNet state of each head, layer {layer}"
    figure, axes = canvas(title, conditions(trace))
    ax = axes[0, 0]
    for head in range(min(heads, 16)):
        ax.plot(
            positions,
            rows[:, head],
            color=SERIES[head % len(SERIES)],
            linestyle=("-", "--", ":")[head // len(SERIES)],
            label=f"head {head}",
        )
    if heads > 16:
        ax.plot(positions, rows.mean(1), color="black", linewidth=2.5, label=f"mean of {heads}")
    ax.set_xlabel("token")
    ax.set_ylabel("Frobenius norm")
    ax.set_ylim(0)
    grid(ax)
    legend(ax, 6)
    return Plot(figure=figure, data=data, title=title)


def delta_gates(trace: Trace) -> Plot:
    """Decay and write strength of every head: what is kept of the old, and written of the new."""
    figure, axes = canvas(
        "DeltaNet gates, mean over tokens: decay and write strength",
        conditions(trace),
        columns=2,
        height=4.2,
    )
    parts: list[pd.DataFrame] = []
    labels = (("decay", "decay (1: nothing is forgotten)"), ("write_strength", "write strength"))
    for ax, (name, label) in zip(axes[0], labels, strict=True):
        kept = _kept(trace, name)
        means = np.array([rows.mean(0) for _, rows in kept.values()])
        image = ax.imshow(means, aspect="auto", cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
        ax.set_yticks(range(len(kept)), list(kept))
        ax.set_ylabel("layer")
        ax.set_xlabel("head")
        layer_ticks(ax.xaxis, means.shape[1])
        colourbar(figure, image, ax, label)
        heads = means.shape[1]
        parts.append(
            pd.DataFrame(
                {
                    "gate": name,
                    "layer": np.repeat(list(kept), heads),
                    "head": np.tile(np.arange(heads), len(kept)),
                    "mean": means.ravel(),
                }
            )
        )
    title = "DeltaNet gates, mean over tokens: decay and write strength"
    return Plot(figure=figure, data=pd.concat(parts, ignore_index=True), title=title)


def memory_length(trace: Trace) -> Plot:
    """After how many tokens a head's decay alone has halved what it held, by layer."""
    kept, parts = _kept(trace, "decay"), list[pd.DataFrame]()
    for layer, (_, rows) in kept.items():
        rate = -np.log(np.clip(rows, 1e-30, 1)).mean(0)  # of forgetting, by token
        parts.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "head": np.arange(rows.shape[1]),
                    "half_life_tokens": np.log(2) / np.maximum(rate, 1e-9),
                }
            )
        )
    data = pd.concat(parts, ignore_index=True)
    title = "Effective memory of each DeltaNet head: tokens until half is forgotten"
    figure, axes = canvas(title, conditions(trace))
    ax = axes[0, 0]
    places = data.layer.map({layer: place for place, layer in enumerate(kept)})
    heads = data.groupby("layer")["head"].transform("size")
    spread = (data["head"] + 0.5) / heads * 0.7 - 0.35
    ax.scatter(places + spread, data.half_life_tokens, s=22, color=BLUE, label="one head")
    medians = data.groupby("layer").half_life_tokens.median()
    ax.scatter(
        range(len(kept)), medians, marker="_", s=700, color=ORANGE, linewidth=2, label="median"
    )
    ax.set_xticks(range(len(kept)), list(kept))
    ax.set_yscale("log")
    ax.set_xlabel("layer")
    ax.set_ylabel("half-life in tokens")
    grid(ax)
    legend(ax)
    return Plot(figure=figure, data=data, title=title)


def attention_map(trace: Trace, layer: int | None = None, head: int | None = None) -> Plot:
    """What each token looks back at in an attention layer; the mean of all heads unless one is
    named."""
    layer, positions, rows = _one_layer(trace, "attention", layer)
    if head is not None and not 0 <= head < rows.shape[1]:
        raise ValueError(f"head is {head}; heads are 0 to {rows.shape[1] - 1}")
    weights = rows.mean(1) if head is None else rows[:, head]
    data = pd.DataFrame(
        {
            "layer": layer,
            "token": np.repeat(positions, weights.shape[1]),
            "position": np.tile(np.arange(weights.shape[1]), len(weights)),
            "weight": weights.ravel(),
        }
    )
    data = data[data.position <= data.token].reset_index(drop=True)
    which = f"mean of {rows.shape[1]} heads" if head is None else f"head {head}"
    title = f"Attention weights, layer {layer}, {which}"
    figure, axes = canvas(title, conditions(trace), height=5.2)
    ax = axes[0, 0]
    image = ax.imshow(
        np.where(np.arange(weights.shape[1]) <= positions[:, None], weights, np.nan),
        aspect="auto",
        cmap=HEAT,
        vmin=0,
        interpolation="nearest",
    )  # a row for each token kept: of a chunk of the prompt, its last alone
    ax.set_xlabel("position looked at")
    ax.set_ylabel("token")
    if len(positions) <= _LABELS:
        text = trace.tokens.set_index("token").text
        words = [shown(str(text.get(p, "")), 10) for p in positions]
        ax.set_yticks(range(len(positions)), words, size=7)
    else:
        rows = np.linspace(0, len(positions) - 1, 9).round().astype(int)
        ax.set_yticks(rows, positions[rows])
    colourbar(figure, image, ax, "weight")
    return Plot(figure=figure, data=data, title=title)
