"""Figures of tables that studies make: a setting swept, banks of many sizes, budgets of time,
errors of quantisation. They draw what they are given and compute no model."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SERIES,
    SKY,
    canvas,
    conditions,
    grid,
    legend,
    plain_log,
)
from flashmoe_lab.trace import Comparison, Trace
from flashmoe_lab.trace.export import requests

_PARTS = (BLUE, GREEN, ORANGE, RED, GREY, PURPLE, SKY)
_POLICY = {"lru": (BLUE, "LRU"), "belady": (GREEN, "Belady: knows the future, a bound")}


def sweep(comparisons: Mapping[str, Comparison], base: Trace | None = None) -> Plot:
    """What each value of a setting costs in quality, and what it reads and takes: `{"K=4": c}`,
    every c against the same run, whose trace may be `base`."""
    if not comparisons:
        raise ValueError("there are no comparisons; it needs at least one")
    rows = [c.summary.iloc[0].rename(name) for name, c in comparisons.items()]
    data = pd.DataFrame(rows).rename_axis("setting").reset_index()
    title = f"What a setting costs: KL, agreement, bytes and time of {len(data)} values"
    figure, axes = canvas(title, _words(data, base), rows=2, columns=2, height=5.2)
    panels = (
        ("kl_nats_mean", 1.0, "KL in nats, mean", RED),
        ("top1_agreement", 100.0, "% where the first choice agrees", GREEN),
        ("nbytes_per_token_b", 1e-6, "MB read a token", ORANGE),
        ("ms_per_token_b", 1.0, "ms a token", BLUE),
    )
    for ax, (column, scale, label, colour) in zip(axes.ravel(), panels, strict=True):
        values = scale * data[column]
        ax.bar(data.setting, values, color=colour, width=0.7)
        for place, value in enumerate(values):
            ax.text(place, value, f"{value:.3g}", ha="center", va="bottom", size=8, color=INK)
        ax.set_ylabel(label)
        ax.set_ylim(0, max(1.15 * values.max(), 1e-9))
        grid(ax)
    return Plot(figure=figure, data=data, title=title)


def _words(data: pd.DataFrame, base: Trace | None) -> str:
    ms, nbytes = data.ms_per_token_a.median(), data.nbytes_per_token_a.median()
    words = f"compared with a run that read {nbytes / 1e6:.2f} MB and took {ms:.2f} ms a token"
    return words if base is None else f"{words}:\n{conditions(base)}"


def hit_rate_by_size(simulated: pd.DataFrame, measured: Sequence[Trace] = ()) -> Plot:
    """Hit rate against the size of the bank: simulated (`study.bank_simulation.simulate`) as lines,
    and what runs really hit as dots."""
    facts = [trace.facts for trace in measured]
    dots = pd.DataFrame(
        {
            "policy": "measured",
            "slots": [row["bank_slots"] for row in facts],
            "hit_rate": [float(requests(trace).hit.mean()) for trace in measured],
        }
    )
    title = "Share of the experts asked for that a bank of a size holds"
    words = "simulated from one run's requests, prompt included; each bank empty at first"
    figure, axes = canvas(title, words)
    ax = axes[0, 0]
    for name, rows in simulated.groupby("policy", sort=False):
        colour, label = _POLICY.get(str(name), (GREY, str(name)))
        ax.plot(rows.slots, 100 * rows.hit_rate, color=colour, marker="o", ms=3, label=label)
    if len(dots):
        options = {"color": RED, "zorder": 3, "label": "measured"}
        ax.scatter(dots.slots, 100 * dots.hit_rate, s=46, marker="D", **options)
    ax.set_xlabel("slots of the bank (experts held)")
    ax.set_ylabel("% found in the bank")
    ax.set_ylim(0, 102)
    ax.set_xlim(0)
    grid(ax)
    legend(ax)
    data = pd.concat([simulated, dots], ignore_index=True)
    return Plot(figure=figure, data=data, title=title)


def budgets(parts: Mapping[str, Mapping[str, float]], measured: Trace | None = None) -> Plot:
    """The milliseconds of a token by part, a bar each: `{"measured": budget.ms, ...}`.

    Args:
        measured: the trace that they come from, for the caption.
    """
    if not parts:
        raise ValueError("there are no budgets; it needs at least one")
    data = pd.DataFrame(parts).T.fillna(0.0)
    title = "Where the milliseconds of a token go, and what would change them"
    figure, axes = canvas(
        title, conditions(measured) if measured else " ", height=1.6 + 0.42 * len(data)
    )
    ax = axes[0, 0]
    left = np.zeros(len(data))
    for name, colour in zip(data.columns, cycle(_PARTS), strict=False):
        values = data[name].to_numpy()
        ax.barh(range(len(data)), values, left=left, color=colour, height=0.7, label=name)
        left = left + values
    for place, total in enumerate(left):
        words = f" {total:.2f} ms, {1e3 / total:,.0f} tok/s"
        ax.text(total, place, words, va="center", size=8, color=INK).set_in_layout(False)
    ax.set_yticks(range(len(data)), list(data.index))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.25 * left.max())
    ax.set_xlabel("ms a token")
    grid(ax, "x")
    legend(ax, 5)
    data = data.rename_axis("budget").reset_index()
    return Plot(figure=figure, data=data, title=title)


def quantization_errors(errors: Mapping[int, np.ndarray], weights: np.ndarray) -> Plot:
    """Errors of the same weights at several bits: their spread, and their root mean square."""
    spread = float(np.sqrt(np.mean(weights.astype(np.float64) ** 2)))
    rows = [
        {
            "bits": bits,
            "rms": float(np.sqrt(np.mean(error.astype(np.float64) ** 2))),
            "largest": float(np.abs(error).max()),
        }
        for bits, error in sorted(errors.items())
    ]
    data = pd.DataFrame(rows)
    data["relative"] = data.rms / spread
    title = "What quantisation does to the weights, by bits"
    words = f"{weights.size:,} weights, root mean square {spread:.4g}"
    figure, axes = canvas(title, words, columns=2)
    left, right = axes[0]
    reach = 3 * float(data.rms.max())
    bins = np.linspace(-reach, reach, 121)
    for (bits, error), colour in zip(sorted(errors.items()), SERIES, strict=False):
        left.hist(
            error.ravel(),
            bins,
            density=True,
            histtype="step",
            color=colour,
            lw=1.5,
            label=f"{bits} bits",
        )
    left.set_yscale("log")
    left.set_xlabel("error of a weight")
    left.set_ylabel("density")
    right.plot(data.bits, 100 * data.relative, color=RED, marker="o")
    for row in data.itertuples():
        right.annotate(
            f"{row.relative:.1%}",
            (row.bits, 100 * row.relative),  # pyright: ignore
            xytext=(5, 5),
            textcoords="offset points",
            size=8,
        )
    right.set_yscale("log")
    plain_log(right.yaxis)
    right.set_xlabel("bits")
    right.set_ylabel("root mean square error, % of the weights'")
    right.set_xticks(data.bits)
    grid(left)
    grid(right)
    legend(left, 6)
    return Plot(figure=figure, data=data, title=title)


def quantized_group(weights: np.ndarray, stored: Mapping[int, np.ndarray]) -> Plot:
    """One group's weights and what is left of them at several bits."""
    data = pd.DataFrame({"place": range(len(weights)), "weight": weights})
    for bits, values in stored.items():
        data[f"at_{bits}_bits"] = values
    title = f"A group of {len(weights)} weights, and what its codes stand for"
    figure, axes = canvas(
        title,
        "each code is one step of the group's scale from its bias",
        rows=len(stored),
        sharex=True,
        height=1.2 + 1.5 * len(stored),
    )
    for ax, (bits, values) in zip(axes[:, 0], stored.items(), strict=True):
        for level in np.unique(values):
            ax.axhline(level, color="#E6E6E6", linewidth=0.8)
        ax.vlines(data.place, weights, values, color=RED, linewidth=1.2)
        ax.scatter(data.place, weights, s=14, color=BLUE, label="the weight", zorder=3)
        ax.scatter(
            data.place,
            values,
            s=14,
            color=ORANGE,
            marker="D",
            zorder=3,
            label="what is stored of it",
        )
        ax.set_ylabel(f"{bits} bits")
    axes[-1, 0].set_xlabel("place in the group (red: the error)")
    legend(axes[0, 0], 2, axes[0, 0].get_legend_handles_labels()[0])
    return Plot(figure=figure, data=data, title=title)
