"""Figures of where time goes: by layer, within a token, over the run, along the text."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Patch

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.select import decode_tokens, pass_of, shown, typical_token
from flashmoe_lab.plots.style import (
    FAINT,
    HEAT,
    INK,
    LANE,
    LANE_WORDS,
    PALE,
    STAGE,
    canvas,
    colourbar,
    conditions,
    grid,
    layer_ticks,
    legend,
)
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
    layer_ticks(ax.xaxis, len(bottom))
    grid(ax)
    legend(ax, 4)
    return Plot(figure=figure, data=data, title=title)


def _by_stage(trace: Trace, positions: pd.Series) -> pd.DataFrame:
    """layer, stage, lane, mean_ms over the tokens at these positions."""
    spans = trace.spans
    spans = spans[spans.token.isin(positions) & (spans.layer >= 0)]
    dur = (spans.end_ns - spans.start_ns).groupby(
        [spans.layer, spans.stage, spans.lane], observed=True
    )
    found = (dur.sum() / len(positions) / 1e6).rename("mean_ms").reset_index()
    return found.astype({"stage": str, "lane": str})


def token_waterfall(trace: Trace, token: int | None = None) -> Plot:
    """One token's way through the model: a row a layer, each stage where it lies in time.

    Args:
        token: position; None takes the decode step of median time.
    """
    token = typical_token(trace) if token is None else token
    first, row = pass_of(trace, token), trace.tokens.set_index("token").loc[token]
    spans = trace.spans[(trace.spans.token == first) & (trace.spans.start_ns >= row.start_ns)]
    spans = spans[(spans.end_ns <= row.end_ns) & (spans.stage != "record")]
    data = pd.DataFrame(
        {
            "layer": spans.layer,
            "stage": spans.stage.astype(str),
            "lane": spans.lane.astype(str),
            "start_ms": (spans.start_ns - row.start_ns) / 1e6,
            "dur_ms": (spans.end_ns - spans.start_ns) / 1e6,
        }
    ).reset_index(drop=True)
    layers = trace.facts["num_hidden_layers"]
    whole = (row.end_ns - row.start_ns) / 1e6
    title = f"Token {token} {shown(str(row.text))} through the model in {whole:.2f} ms"
    figure, axes = canvas(title, conditions(trace), height=2.2 + min(0.3 * layers, 4.5))
    ax = axes[0, 0]
    # What comes before the layers and after them has no layer of its own.
    late = data.start_ms >= data.start_ms[data.layer >= 0].min()
    rows = np.where(data.layer >= 0, data.layer, np.where(late, layers, -1))
    keys = list(zip(data.stage, data.lane, strict=True))
    colours = [STAGE.get(key, ("", PALE))[1] for key in keys]
    ax.barh(rows, data.dur_ms, left=data.start_ms, height=0.85, color=colours)
    ax.set_ylim(layers + 0.6, -0.6 if -1 not in rows else -1.6)
    ax.set_ylabel("layer")
    step = 1 if layers <= 16 else layers // 8
    ticks = {-1: "before", **{n: str(n) for n in range(0, layers, step)}, layers: "after"}
    ax.set_yticks(
        [n for n in ticks if n >= 0 or -1 in rows],
        [word for n, word in ticks.items() if n >= 0 or -1 in rows],
    )
    ax.set_xlabel("ms since the pass began")
    ax.set_xlim(0, whole)
    grid(ax, "x")
    used = [value for key, value in STAGE.items() if key in set(keys)]
    legend(ax, 4, [Patch(color=colour, label=label) for label, colour in used])
    return Plot(figure=figure, data=data, title=title)


def time_shares(trace: Trace) -> Plot:
    """Where the wall time of the run goes, with the part that no span explains."""
    spans = trace.spans
    dur = (spans.end_ns - spans.start_ns).groupby([spans.stage, spans.lane], observed=True)
    data = dur.sum().rename("ns").reset_index().astype({"stage": str, "lane": str})
    rest = {"stage": "unexplained", "lane": "", "ns": trace.dur_ns - int(data.ns.sum())}
    data = pd.concat([data, pd.DataFrame([rest])], ignore_index=True)
    data["share"] = data.ns / trace.dur_ns
    data = data.sort_values("ns", ascending=False, ignore_index=True)
    title = f"Where {trace.dur_ns / 1e9:.2f} s of the run went; spans explain {trace.closure:.1%}"
    figure, axes = canvas(title, conditions(trace), height=1.7 + 0.28 * len(data))
    ax = axes[0, 0]
    names = [_stage_words(row.stage, row.lane) for row in data.itertuples()]
    colours = [LANE.get(lane, PALE) for lane in data.lane]
    ax.barh(range(len(data)), 100 * data.share, color=colours, height=0.75)
    for place, (share, ns) in enumerate(zip(data.share, data.ns, strict=True)):
        words = f" {share:.1%}, {ns / 1e6:,.1f} ms"
        ax.text(100 * share, place, words, va="center", size=8).set_in_layout(False)
    ax.set_yticks(range(len(data)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 100 * data.share.max() * 1.22)
    ax.set_xlabel("% of wall time")
    present = [lane for lane in LANE if lane in set(data.lane)]
    legend(ax, 4, [Patch(color=LANE[lane], label=LANE_WORDS[lane]) for lane in present])
    return Plot(figure=figure, data=data, title=title)


def _stage_words(stage: object, lane: object) -> str:
    return STAGE.get((str(stage), str(lane)), (str(stage), ""))[0]


_BY = {
    "latency": ("ms", "ms that its pass took"),
    "entropy": ("nats", "the model's entropy in nats, before temperature"),
    "bytes": ("MB", "MB read in its pass"),
}


def token_strip(trace: Trace, by: str = "latency", most: int = 160) -> Plot:
    """The text, each token coloured by its pass's latency or bytes, or by its entropy.

    Args:
        by: "latency", "entropy" or "bytes".
        most: tokens shown at the most, from the first generated one on.
    """
    if by not in _BY:
        raise ValueError(f"by is {by!r}; it must be one of {', '.join(map(repr, _BY))}")
    data = _token_values(trace, by).head(most).reset_index(drop=True)
    unit, words = _BY[by]
    title = f"Each token coloured by {words}"
    places = _flow_text([shown(text, 99)[1:-1] for text in data.text])
    lines = places[-1][1] + 1
    figure, axes = canvas(title, conditions(trace), height=1.3 + 0.24 * lines)
    ax = axes[0, 0]
    norm = Normalize(0 if by != "latency" else data.value.min(), max(data.value.max(), 1e-9))
    image = _draw_tokens(ax, data, places, norm)
    ax.set_xlim(0, _LINE)
    ax.set_ylim(lines - 0.4, -0.6)
    ax.axis("off")
    colourbar(figure, image, ax, unit)
    return Plot(figure=figure, data=data, title=title)


def _token_values(trace: Trace, by: str) -> pd.DataFrame:
    """token, text, value: of generated tokens that have one."""
    tokens = trace.tokens[trace.tokens.phase == "decode"]
    if by == "entropy":
        value = tokens.entropy
    else:
        tokens = tokens[tokens.end_ns > 0]
        if by == "latency":
            value = (tokens.end_ns - tokens.start_ns) / 1e6
        else:
            sums = trace.reads.groupby("token").nbytes.sum()
            value = tokens.token.map(sums).fillna(0) / 1e6
    if tokens.empty:
        raise ValueError("the trace has no decode step; generate at least two tokens")
    return pd.DataFrame({"token": tokens.token, "text": tokens.text, "value": value})


_LINE = 92  # characters of a line of text


def _flow_text(words: list[str]) -> list[tuple[int, int]]:
    """Column and line of each word, as in running text."""
    places, column, line = list[tuple[int, int]](), 0, 0
    for word in words:
        if column + len(word) > _LINE:
            column, line = 0, line + 1
        places.append((column, line))
        column += max(len(word), 1)
    return places


def _draw_tokens(
    ax: Axes, data: pd.DataFrame, places: list[tuple[int, int]], norm: Normalize
) -> object:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable

    colours = colormaps[HEAT]
    for (column, line), text, value in zip(places, data.text, data.value, strict=True):
        word, share = shown(text, 99)[1:-1], float(norm(value))
        ax.barh(line, max(len(word), 1), left=column, height=0.92, color=colours(share))
        ink = "white" if share < 0.6 else INK
        ax.text(column, line, word, family="monospace", size=9.5, va="center", color=ink)
    ax.tick_params(colors=FAINT)
    return ScalarMappable(norm, colours)
