"""Figures of memory: what the run holds, and what a longer context would."""

import numpy as np
import pandas as pd

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    PURPLE,
    SKY,
    canvas,
    conditions,
    grid,
    legend,
)
from flashmoe_lab.trace import Trace
from flashmoe_lab.units import format_nbytes

_CONTEXTS = 2.0 ** np.arange(7, 19)  # 128 to 262,144 tokens


def memory_budget(trace: Trace) -> Plot:
    """What the run held at its end, beside the experts on disk and the page cache."""
    facts, tokens = trace.facts, int((trace.tokens.end_ns > 0).sum())
    rows = [
        ("resident weights", facts["resident_nbytes"], BLUE, "memory"),
        (f"KV cache, {tokens:,} tokens", facts["kv_nbytes"], PURPLE, "memory"),
        ("recurrent state", facts["recurrent_nbytes"], SKY, "memory"),
        (f"bank, {facts['bank_slots']:,} slots", facts["bank_nbytes"], GREEN, "memory"),
        ("page cache at the start", facts["page_cache_nbytes"], ORANGE, "operating system"),
        ("all experts", facts["expert_nbytes"], PALE, "disk"),
    ]
    known = [row for row in rows if row[1] is not None and not np.isnan(row[1])]
    data = pd.DataFrame([(n, v, w) for n, v, _, w in known], columns=["what", "nbytes", "where"])
    held = data.nbytes[data["where"] == "memory"].sum()
    title = f"Memory: the run holds {format_nbytes(held)}"
    figure, axes = canvas(title, conditions(trace), height=1.5 + 0.3 * len(data))
    ax = axes[0, 0]
    ax.barh(range(len(data)), data.nbytes / 1e6, color=[row[2] for row in known], height=0.75)
    for place, nbytes in enumerate(data.nbytes):
        words = f" {format_nbytes(nbytes)}"
        ax.text(nbytes / 1e6, place, words, va="center", size=8.5).set_in_layout(False)
    names = [f"{row.what} ({row.where})" for row in data.itertuples()]
    ax.set_yticks(range(len(data)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, data.nbytes.max() / 1e6 * 1.15)
    ax.set_xlabel("MB (10**6 bytes)")
    grid(ax, "x")
    return Plot(figure=figure, data=data, title=title)


def context_memory(trace: Trace) -> Plot:
    """Bytes of the sequence's state against context length: attention's grows, DeltaNet's does
    not."""
    facts = trace.facts
    data = pd.DataFrame({"context_tokens": _CONTEXTS.astype(int)})
    data["kv_nbytes"] = data.context_tokens * facts["kv_nbytes_per_token"]
    data["recurrent_nbytes"] = facts["recurrent_nbytes"]
    kinds = facts["layer_types"].split(",")
    count = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    full, linear = count.get("full_attention", 0), count.get("linear_attention", 0)
    data["all_attention_nbytes"] = data.kv_nbytes * len(kinds) / max(full, 1)
    title = "State of a sequence by context length"
    figure, axes = canvas(title, conditions(trace))
    ax = axes[0, 0]
    lines = (
        ("kv_nbytes", PURPLE, "-", f"keys and values of {full} attention layers"),
        ("recurrent_nbytes", SKY, "-", f"recurrent state of {linear} DeltaNet layers"),
        ("all_attention_nbytes", GREY, "--", f"if all {len(kinds)} layers were attention"),
    )
    for name, colour, line, label in lines:
        ax.plot(
            data.context_tokens, data[name] / 1e6, color=colour, linestyle=line, label=label, lw=2
        )
    ax.axvline(len(trace.tokens), color=GREY, linewidth=0.8, linestyle=":", label="this run")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(data.context_tokens, [f"{n:,}" for n in data.context_tokens], rotation=30)
    ax.set_xlabel("tokens of context")
    ax.set_ylabel("MB")
    grid(ax)
    legend(ax, 2)
    return Plot(figure=figure, data=data, title=title)
