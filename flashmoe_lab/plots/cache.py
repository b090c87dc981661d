"""Figures of what is asked for again: reuse distance, hit rate, bytes a token."""

import numpy as np
import pandas as pd

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.style import (
    BLUE,
    GREEN,
    GREY,
    RED,
    SKY,
    canvas,
    conditions,
    grid,
    layer_ticks,
    legend,
    plain_log,
    styled,
)
from flashmoe_lab.trace import Trace
from flashmoe_lab.trace.export import block_nbytes, requests

_WINDOW = 16  # tokens that the hit rate over time is averaged over


def reuse_distance(trace: Trace) -> Plot:
    """How many other blocks are asked for before the same one is again, and what an LRU bank of a
    size would hit."""
    asked = requests(trace)
    keys = (asked.layer.astype(int) * trace.facts["num_experts"] + asked.expert).to_numpy()
    distances = stack_distances(keys)
    again = distances[distances >= 0]
    if not len(again):
        raise ValueError("no expert was asked for twice; generate more tokens")
    low, high = int(again.min()) + 1, int(again.max()) + 2
    edges = np.unique(np.round(np.geomspace(low, max(high, low + 1), 33)).astype(int))
    counts, _ = np.histogram(again + 1, edges)
    data = pd.DataFrame(
        {
            "from": edges[:-1],
            "below": edges[1:],
            "requests": counts,
            "lru_hit_rate": [float((again + 1 <= edge).sum() / len(keys)) for edge in edges[1:]],
        }
    )
    first = int((distances < 0).sum())
    title = f"Distance to the last use of the same expert, {len(keys):,} requests"
    figure, axes = canvas(title, conditions(trace))
    ax = axes[0, 0]
    words = f"requests ({first:,} first uses, which no bank hits, are left out)"
    ax.stairs(data.requests, edges, fill=True, color=SKY, label=words)
    ax.set_xscale("log")
    plain_log(ax.xaxis, dense=high < 20 * low)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_xlabel("different blocks asked for since, itself included (slots an LRU bank needs)")
    ax.set_ylabel("requests")
    with styled():
        right = ax.twinx()
    right.spines["right"].set_visible(True)
    right.plot(edges[1:], 100 * data.lru_hit_rate, color=RED, label="an LRU bank would hit")
    right.set_ylabel("% of all requests hit")
    right.set_ylim(0, 100)
    grid(ax)
    legend(ax)
    return Plot(figure=figure, data=data, title=title)


def stack_distances(keys: np.ndarray) -> np.ndarray:
    """For each request, how many different other keys came since the last of its own; -1 for the
    first.

    The keys between are those whose own last use lies before that of this one, or further back; so
    it is the gap less the requests in it that repeat within it, counted by merging.
    """
    count = len(keys)
    order = np.argsort(keys, kind="stable")
    last = np.full(count, -1)
    same = keys[order][1:] == keys[order][:-1]
    last[order[1:][same]] = order[:-1][same]
    gaps = np.arange(count) - last - 1
    return np.where(last < 0, -1, gaps - _greater_before(last))


def _greater_before(values: np.ndarray) -> np.ndarray:
    """For each element, how many earlier ones are greater: merge sort's counts, a level at once."""
    count, size = np.zeros(len(values), np.int64), len(values)
    places, span = np.arange(size), int(values.max(initial=0)) + 2
    width = 1
    while width < size:
        block = places // width
        left = block % 2 == 0
        scaled = (block // 2) * span + values + 1
        ends = np.sort(scaled[left])
        mine = scaled[~left]
        pair_end = np.searchsorted(ends, (block[~left] // 2 + 1) * span, side="left")
        count[~left] += pair_end - np.searchsorted(ends, mine, side="right")
        width *= 2
    return count


def hit_rate(trace: Trace) -> Plot:
    """Share of the experts asked for that the bank held: over the text, and by layer."""
    asked = requests(trace)
    time = asked.groupby("token").hit.mean().reset_index()
    time["smoothed"] = time.hit.rolling(_WINDOW, min_periods=1).mean()
    layers = asked.groupby("layer").hit.mean().reset_index()
    title = (
        f"Bank hits, prompt included: {asked.hit.mean():.1%} of {len(asked):,} experts asked for"
    )
    figure, axes = canvas(title, conditions(trace), columns=2, sharey=True)
    left, right = axes[0]
    left.plot(time.token, 100 * time.hit, color=SKY, linewidth=0.8, label="each pass")
    left.plot(
        time.token, 100 * time.smoothed, color=BLUE, linewidth=2, label=f"mean of {_WINDOW} passes"
    )
    left.set_xlabel("token")
    left.set_ylabel("% found in the bank")
    left.set_ylim(0, 102)
    right.bar(layers.layer, 100 * layers.hit, color=GREEN, width=0.8)
    right.set_xlabel("layer")
    layer_ticks(right.xaxis, trace.facts["num_hidden_layers"])
    for ax in (left, right):
        grid(ax)
    legend(left)
    data = pd.concat([time.assign(of="token"), layers.assign(of="layer")], ignore_index=True)
    return Plot(figure=figure, data=data, title=title)


def bytes_per_token(trace: Trace) -> Plot:
    """Bytes read for each decode step, by where they were."""
    tokens = trace.tokens
    steps = tokens[(tokens.phase == "decode") & (tokens.end_ns > 0)].token
    reads = trace.reads[trace.reads.nbytes > 0]
    sums = reads.groupby(["token", "source"], observed=True).nbytes.sum().unstack(fill_value=0)
    sums.columns = sums.columns.astype(str)
    data = sums.reindex(steps, fill_value=0).reindex(
        columns=["page_cache", "ssd", "unknown"], fill_value=0
    )
    mean = data.sum(axis=1).mean() / 1e6
    title = f"Bytes read for each token, {mean:.2f} MB on average"
    figure, axes = canvas(title, conditions(trace))
    ax = axes[0, 0]
    bottom = np.zeros(len(data))
    words = {"page_cache": "page cache", "ssd": "SSD", "unknown": "file, cache state unknown"}
    for name, colour in (("page_cache", SKY), ("ssd", RED), ("unknown", GREY)):
        if data[name].any():
            ax.bar(data.index, data[name] / 1e6, 1.0, bottom / 1e6, color=colour, label=words[name])
            bottom += data[name].to_numpy()
    # By the layers' own K and block: an intervention may change the one, packing the other.
    asked = requests(trace)
    by_layer = asked[asked.token.isin(steps)].groupby("layer").size() / max(len(steps), 1)
    nbytes = float((by_layer * block_nbytes(trace)[by_layer.index]).sum()) / 1e6
    ax.axhline(nbytes, color=GREY, linewidth=1, linestyle="--", label=f"no hits: {nbytes:.1f} MB")
    ax.set_xlabel("token")
    ax.set_ylabel("MB read")
    grid(ax)
    legend(ax)
    return Plot(figure=figure, data=data.reset_index(), title=title)
