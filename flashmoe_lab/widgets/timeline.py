"""Timeline: every span and read of a trace on a canvas, to zoom, pan and point at.

The canvas is JavaScript that comes with the package (static/timeline.js); it gets all rows once and
fetches nothing. `show_timeline` draws one token's without widgets.
"""

from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import pandas as pd
import traitlets

from flashmoe_lab.plots import Plot, io_timeline
from flashmoe_lab.plots.style import LANE, LANE_WORDS, SOURCE, SOURCE_WORDS
from flashmoe_lab.trace import Trace
from flashmoe_lab.trace.export import reading_threads
from flashmoe_lab.trace.schema import STAGES

_STATIC = Path(__file__).parent / "static"
_MOST_ITEMS = 2_000_000  # 100 MB to the browser


class Timeline(anywidget.AnyWidget):
    """A trace to look through.

    Attributes:
        window: what is shown, from and to, in ms since the run began.
        token: the token whose pass is shown when this is set.
    """

    _esm = _STATIC / "timeline.js"
    _css = _STATIC / "timeline.css"
    times = traitlets.Bytes().tag(sync=True)
    numbers = traitlets.Bytes().tag(sync=True)
    names = traitlets.Dict().tag(sync=True)
    window = traitlets.List(traitlets.Float()).tag(sync=True)
    token = traitlets.Int(None, allow_none=True).tag(sync=True)

    def __init__(self, trace: Trace, token: int | None = None) -> None:
        """Show a trace, or at first one token of it.

        Raises:
            ValueError: more than 2 million spans and reads.
        """
        items = _items(trace)
        if len(items) > _MOST_ITEMS:
            raise ValueError(
                f"the trace has {len(items):,} spans and reads; this shows {_MOST_ITEMS:,} at the "
                "most. Export it for Perfetto: write_chrome(trace, 'trace.json.gz')"
            )
        begin, whole = trace.facts["start_ns"], trace.dur_ns / 1e6
        times = (items[["start_ns", "end_ns"]].to_numpy(np.int64) - begin) / 1e6
        super().__init__(
            times=times.T.tobytes(),
            numbers=items[list(_NUMBERS)].to_numpy(np.int32).T.tobytes(),
            names={
                "rows": ["the run", *reading_threads(trace).values()],
                "colours": [{"colour": colour, "words": words} for _, colour, words in _KEYS],
                "stages": [stage.replace("_", " ") for stage in STAGES],
                "texts": dict(zip(trace.tokens.token.map(str), trace.tokens.text, strict=True)),
                "passes": _passes(trace.tokens, begin),
                "last_token": int(trace.tokens.token.max()),
                "dur_ms": whole,
            },
            window=[0.0, whole],
            token=token,
        )


def show_timeline(trace: Trace, token: int | None = None) -> Plot:
    """One token's spans and reads as a figure; of the token that read most without `token`."""
    return io_timeline(trace, token)


# In the order of timeline.js.
_NUMBERS = ("row", "colour", "stage", "layer", "expert", "token", "nbytes")
_KEYS = [(name, LANE[name], LANE_WORDS[name]) for name in LANE] + [
    (name, SOURCE[name], f"read from {SOURCE_WORDS[name]}") for name in SOURCE if name != "bank"
]
_PLACE = {name: place for place, (name, _, _) in enumerate(_KEYS)}


def _items(trace: Trace) -> pd.DataFrame:
    """Spans and reads, a row of the timeline after another, each by time."""
    spans, reads = trace.spans, trace.reads[trace.reads.nbytes > 0]
    rows: dict[int, int] = {thread: n + 1 for n, thread in enumerate(reading_threads(trace))}
    parts: list[dict[str, Any]] = [
        {
            "row": 0,
            "colour": spans.lane.astype(str).map(_PLACE),
            "stage": spans.stage.astype(str).map(STAGES.index),
            "expert": -1,
            "nbytes": 0,
        },
        {
            "row": reads.thread.map(rows),
            "colour": reads.source.astype(str).map(_PLACE),
            "stage": -1,
            "expert": reads.expert,
            "nbytes": reads.nbytes,
        },
    ]
    frames = [
        pd.DataFrame(part | {name: table[name] for name in _SHARED}, index=table.index)
        for part, table in zip(parts, (spans, reads), strict=True)
    ]
    whole = pd.concat(frames, ignore_index=True)
    return whole.sort_values(["row", "start_ns"], kind="stable", ignore_index=True)


_SHARED = ("layer", "token", "start_ns", "end_ns")


def _passes(tokens: pd.DataFrame, begin: int) -> list[list[float]]:
    """First and last token, start and end in ms of every pass."""
    ran = tokens[tokens.end_ns > 0].groupby("start_ns")
    firsts, lasts, ends = ran.token.min(), ran.token.max(), ran.end_ns.max()
    starts = (firsts.index.to_numpy(np.int64) - begin) / 1e6
    columns = (firsts, lasts, starts, (ends - begin) / 1e6)
    return [list(row) for row in zip(*(np.asarray(c).tolist() for c in columns), strict=True)]
