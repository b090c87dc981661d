"""LiveFigure: three panels of a run under way as one PNG: experts chosen, the last token's reads,
time by layer.

It is drawn again and again while tokens are made, so axes and words are drawn once and kept as
pixels; each frame adds only what changed. The figures that stay are made from the trace, by
`plots`.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image

from flashmoe_lab.plots.style import BLUE, HEAT, INK, ORANGE, grid, layer_ticks, styled
from flashmoe_lab.units import format_nbytes
from flashmoe_lab.widgets.live import LivePass

WIDTH, HEIGHT = 880, 400  # pixels
_RECENT = 32  # passes that the time by layer is the mean of


class LiveFigure:
    """The panels of one run.

    Attributes:
        counts: how often each expert was chosen, [L, E].

    Args:
        layers, experts: of the model.
        threads: reading threads.
    """

    def __init__(self, layers: int, experts: int, threads: int) -> None:
        self._layers, self._experts, self._threads = layers, experts, threads
        self.counts = np.zeros((layers, experts))
        self._tokens = 0
        self._layer_ms = np.zeros((0, layers))
        self._last: LivePass | None = None
        self._background: object = None
        self._said = [""] * 3
        with styled():
            self._build()

    def _build(self) -> None:
        figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
        self._canvas = FigureCanvasAgg(figure)
        self._heat = figure.add_axes((0.062, 0.60, 0.925, 0.315))
        self._reads = figure.add_axes((0.062, 0.11, 0.51, 0.335))
        self._time = figure.add_axes((0.645, 0.11, 0.342, 0.335))
        zero = np.zeros_like(self.counts)
        self._image = self._heat.imshow(
            zero, aspect="auto", cmap=HEAT, interpolation="nearest", vmin=0, animated=True
        )
        self._heat.set_ylabel("layer")
        layer_ticks(self._heat.yaxis, self._layers)
        self._heat.set_title(
            "experts chosen by layer; dark: by no token, bright: by most",
            loc="left",
            size=9,
            color=INK,
        )
        colours = ((self._reads, ORANGE), (self._time, BLUE))
        self._bars = {
            ax: PolyCollection([], facecolors=colour, animated=True) for ax, colour in colours
        }
        for ax, bars in self._bars.items():
            ax.add_collection(bars)
        self._reads.set_title("reads of the last token", loc="left", size=9, color=INK)
        names = [*map(str, range(self._threads)), "run"]  # the run's own thread reads too
        self._reads.set_yticks(range(len(names)), names)
        self._reads.set_ylim(len(names) - 0.4, -0.6)
        self._reads.set_ylabel("thread")
        self._reads.set_xlabel("ms", labelpad=1)
        self._time.set_title("time by layer", loc="left", size=9, color=INK)
        self._time.set_xlim(-0.6, self._layers - 0.4)
        layer_ticks(self._time.xaxis, self._layers)
        self._time.set_xlabel("layer", labelpad=1)
        self._time.set_ylabel("ms")
        grid(self._reads, "x")
        grid(self._time)
        self._limits = {self._reads: 0.0, self._time: 0.0}

    def add(self, passes: Sequence[LivePass]) -> None:
        """Take in passes that are over."""
        asked = [
            (layer * self._experts + experts).ravel()
            for one in passes
            for layer, experts in one.experts.items()
        ]
        if asked:
            flat = np.bincount(np.concatenate(asked), minlength=self.counts.size)
            self.counts += flat.reshape(self.counts.shape)
        self._tokens += sum(one.tokens for one in passes)
        singles = [one for one in passes if one.tokens == 1]
        times = [
            np.diff([one.start_ns, *sorted(one.layer_end_ns.values())]) / 1e6
            for one in singles[-_RECENT:]
            if len(one.layer_end_ns) == self._layers
        ]
        if times:
            self._layer_ms = np.concatenate([self._layer_ms, times])[-_RECENT:]
        self._last = (singles or [self._last])[-1]

    def png(self) -> bytes:
        """The frame as it is now."""
        self._draw_heat()
        self._draw_reads()
        self._draw_time()
        if self._background is None:
            self._canvas.draw()
            self._background = self._canvas.copy_from_bbox(self._canvas.figure.bbox)
        self._canvas.restore_region(self._background)
        self._heat.draw_artist(self._image)
        for ax, bars in self._bars.items():
            ax.draw_artist(bars)
        return _encode(self._canvas)

    @property
    def words(self) -> str:
        """What the frame shows, in figures."""
        return " ".join(self._said)

    def _draw_heat(self) -> None:
        share = self.counts / max(self._tokens, 1)
        self._image.set_data(share)
        self._image.set_clim(0, max(float(share.max()), 1e-9))
        self._said[0] = f"Brightest expert: chosen by {share.max():.0%} of {self._tokens} tokens."

    def _draw_reads(self) -> None:
        begin = self._last.start_ns if self._last else 0
        tables = [
            part.records.table
            for found in (self._last.fetched if self._last else ())
            for part in found.landings
            if part.records is not None
        ]
        reads = [table[_FIELDS] for table in tables]
        rows = np.concatenate(reads) if reads else np.zeros(0, [(n, int) for n in _FIELDS])
        start, end = ((rows[name] - begin) / 1e6 for name in ("start_ns", "end_ns"))
        ends = self._last.layer_end_ns.values() if self._last else ()
        whole = (max(ends, default=begin) - begin) / 1e6
        self._fit(self._reads, "x", whole)
        least = np.maximum(end, start + self._limits[self._reads] / 400)
        self._bars[self._reads].set_verts(_boxes(start, least, rows["thread"] - 0.4, 0.8))
        asked = sum(experts.size for experts in self._last.experts.values()) if self._last else 0
        held = asked - len(np.unique(rows[["layer", "expert"]]))
        nbytes = format_nbytes(rows["nbytes"].sum())
        self._said[1] = f"Last token: {held} found in the bank, {len(rows)} reads of {nbytes}."

    def _draw_time(self) -> None:
        if not len(self._layer_ms):
            return
        ms, layer = self._layer_ms.mean(0), np.arange(self._layers)
        self._fit(self._time, "y", float(ms.max()))
        self._bars[self._time].set_verts(_boxes(layer - 0.4, layer + 0.4, np.zeros(len(ms)), ms))
        many = len(self._layer_ms)
        self._said[2] = f"All layers: {ms.sum():.2f} ms a token, mean of the last {many}."

    def _fit(self, ax: Axes, axis: str, most: float) -> None:
        """Let an axis reach to `most`, in steps, so that the words along it seldom change."""
        reach = self._limits[ax]
        if most > reach or most < reach / 4:
            reach = _round_up(most)
        if reach != self._limits[ax]:
            self._limits[ax] = reach
            (ax.set_xlim if axis == "x" else ax.set_ylim)(0, reach)
            self._background = None


_FIELDS: list[str] = ["layer", "expert", "thread", "start_ns", "end_ns", "nbytes"]


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... above a value and a tenth of it."""
    value = max(value * 1.1, 1e-3)
    scale = 10.0 ** np.floor(np.log10(value))
    return float(next(step * scale for step in (1, 2, 5, 10) if step * scale >= value))


def _boxes(left: np.ndarray, right: np.ndarray, low: np.ndarray, height: object) -> list[Any]:
    """Corners [4, 2] of each rectangle."""
    high = low + height
    corners = [(left, low), (left, high), (right, high), (right, low)]
    return list(np.stack([np.stack(pair, -1) for pair in corners], 1))


def _encode(canvas: FigureCanvasAgg) -> bytes:
    picture, buffer = Image.fromarray(np.asarray(canvas.buffer_rgba())), BytesIO()
    picture.convert("RGB").save(buffer, "png", compress_level=1)
    return buffer.getvalue()
