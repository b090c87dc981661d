"""How figures look: size, colours, captions. The colours are told apart by colour-blind readers.

The palette is Okabe and Ito's; a colour means the same thing in every figure.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from flashmoe_lab.trace import Trace

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW, GREY, PALE = "#56B4E9", "#CC79A7", "#F0E442", "#8C8C8C", "#D9D9D9"
INK, FAINT = "#222222", "#666666"
SERIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY)
HEAT = "cividis"
_CAPTION_WIDTH = 132  # characters that a figure is wide

SOURCE = {"bank": GREEN, "page_cache": SKY, "ssd": RED, "unknown": GREY}
SOURCE_WORDS = {
    "bank": "bank (no read)",
    "page_cache": "page cache",
    "ssd": "SSD",
    "unknown": "file",
}
LANE = {"compute": BLUE, "wait": PURPLE, "io": ORANGE, "host": GREY}
LANE_WORDS = {
    "compute": "computing",
    "wait": "waiting for the device",
    "io": "fetching experts",
    "host": "Python",
}
# (stage, lane) in the order in which they are stacked.
STAGE = {
    ("embed", "compute"): ("embed", PALE),
    ("input_norm", "compute"): ("input norm", PALE),
    ("submit", "host"): ("building the graph", GREY),
    ("to_router", "compute"): ("norms, mixer, router, shared expert", BLUE),
    ("mixer", "compute"): ("mixer", BLUE),
    ("post_norm", "compute"): ("post norm", YELLOW),
    ("router", "compute"): ("router", PURPLE),
    ("router", "wait"): ("waiting for expert ids", PURPLE),
    ("shared_expert", "compute"): ("shared expert", SKY),
    ("look_ahead", "compute"): ("next layer's router, ahead", PURPLE),
    ("fetch", "io"): ("fetching experts", ORANGE),
    ("experts", "host"): ("submitting experts", GREEN),
    ("experts", "compute"): ("experts", GREEN),
    ("residual", "compute"): ("adding to the stream", GREY),
    ("norm", "compute"): ("final norm", PALE),
    ("lm_head", "compute"): ("head", RED),
    ("lm_head", "wait"): ("waiting for logits", RED),
    ("setup", "host"): ("getting ready", PALE),
    ("sample", "host"): ("sampling", INK),
    ("record", "host"): ("recording", FAINT),
}
_RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def styled() -> AbstractContextManager[None]:
    """For axes that are made later than the canvas."""
    return rc_context(_RC)


def canvas(
    title: str, caption: str, *, height: float = 4.0, rows: int = 1, columns: int = 1, **grid: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of 800 points' width with a title and a caption, and its axes as an array."""
    with styled():
        figure = Figure(figsize=(8, height), dpi=100, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # pyright: ignore
        axes = figure.subplots(rows, columns, squeeze=False, **grid)
    caption = "\n".join(fill(line, _CAPTION_WIDTH) for line in caption.splitlines())
    figure.suptitle(f"{title}", x=0.012, ha="left", fontsize=11.5, fontweight="bold", color=INK)
    lines = "\n".join(" " for _ in caption.splitlines())
    axes[0, 0].set_title(
        lines, fontsize=8, pad=8
    )  # room for the caption, which starts further left
    words = axes[0, 0].annotate(
        caption,
        xy=(0.012, 1.0),
        xycoords=("figure fraction", "axes fraction"),
        xytext=(0, 8),
        textcoords="offset points",
        fontsize=8,
        color=FAINT,
    )
    words.set_in_layout(False)
    return figure, axes


def conditions(trace: Trace) -> str:
    """A caption: the model and how it ran."""
    facts = trace.facts
    name = str(facts["model"]).rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"-[0-9a-f]{16}$", "", name)  # the digest of a pack in the cache
    bank = f"bank {facts['bank_slots']} slots" if facts["bank_keeps"] else "no bank"
    if facts.get("prefetch"):
        bank += f", prefetch {facts['prefetch']}"
    notes = [f"lossy: {facts['lossy']}"] if facts.get("lossy") else []
    notes += [f"intercepted {facts['intercepted']}"] if facts.get("intercepted") else []
    ended = str(facts.get("finish_reason"))
    notes += {"cancelled": ["stopped before its end"], "error": ["ended by an error"]}.get(
        ended, []
    )
    return (
        f"{name}, {facts['num_hidden_layers']} layers, experts {facts['experts']}, "
        f"K={facts['num_experts_per_tok']} of {facts['num_experts']}, {bank}, "
        f"{facts['reader']}, page cache {trace.cached_words}; {facts['machine']}; trace mode "
        f"{trace.mode}" + (f"\n{'; '.join(notes)}" if notes else "")
    )


def grid(axes: Axes, axis: str = "y") -> None:
    """Faint lines to read values by."""
    axes.grid(True, axis=axis)  # pyright: ignore[reportArgumentType]


def layer_ticks(axis: Axis, count: int) -> None:
    """Whole numbers; each one where there is room."""
    axis.set_major_locator(FixedLocator(range(count)) if count <= 16 else MaxNLocator(integer=True))


def plain_log(axis: Axis, dense: bool = False) -> None:
    """A logarithmic axis with numbers as people write them: 1, 2, 5, 10, 20; more where `dense`."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8) if dense else (1, 2, 5)))

    def words(value: float, place: object) -> str:
        low, high = axis.get_view_interval()
        crowded = high > 2000 * max(low, 1e-12) and not np.log10(value).is_integer()
        return "" if crowded else f"{value:,g}"

    axis.set_major_formatter(FuncFormatter(words))
    axis.set_minor_formatter(NullFormatter())


def colourbar(figure: Figure, image: Any, axes: Axes, label: str) -> None:
    """A scale beside an image."""
    with styled():
        bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05)
    bar.set_label(label)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def legend(axes: Axes, columns: int = 4, entries: Sequence[Any] | None = None) -> None:
    """A legend under the axes, where it covers nothing."""
    options: dict[str, Any] = {"handles": list(entries)} if entries is not None else {}
    with styled():
        axes.figure.legend(loc="outside lower left", ncols=columns, **options)


def band(groups: Any, name: str) -> pd.DataFrame:
    """of, <group>, mean, p10, p90 of a grouped column."""
    found = groups.agg(
        mean="mean", p10=lambda x: x.quantile(0.1), p90=lambda x: x.quantile(0.9)
    ).reset_index()
    found.insert(0, "of", name)
    return found
