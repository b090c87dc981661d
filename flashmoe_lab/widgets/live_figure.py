"""LiveFigure: three panels of a run under way as one PNG: experts chosen, the last token's reads,
time by layer.

It is drawn again and again while tokens are made, and every moment in which it holds Python's lock
is lost to the run. So axes and words are drawn by Matplotlib once, and again only when a scale
changes; a frame sets pixels. The figures that stay are made from the trace, by `plots`.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from flashmoe_lab.plots.style import BLUE, HEAT, INK, ORANGE, grid, layer_ticks, styled
from flashmoe_lab.units import format_nbytes
from flashmoe_lab.widgets.live import LivePass
from flashmoe_lab.widgets.palette_png import palette_png

WIDTH, HEIGHT = 880, 400  # pixels
_RECENT = 32  # passes that the time by layer is the median of
# Numbers of colours: half as many greys as there are, then heat, then the bars.
_HEAT_0, _HEATS, _ORANGE, _BLUE = 128, 126, 254, 255


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
        self._background: np.ndarray | None = None
        self._palette = _palette()
        self._said = [""] * 3
        with styled():
            self._build()

    def _build(self) -> None:
        figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
        self._canvas = FigureCanvasAgg(figure)
        self._heat = figure.add_axes((0.062, 0.60, 0.925, 0.315))
        self._reads = figure.add_axes((0.062, 0.11, 0.51, 0.335))
        self._time = figure.add_axes((0.645, 0.11, 0.342, 0.335))
        self._heat.set_xlim(-0.5, self._experts - 0.5)
        self._heat.set_ylim(self._layers - 0.5, -0.5)
        self._heat.set_ylabel("layer")
        layer_ticks(self._heat.yaxis, self._layers)
        names = [*map(str, range(self._threads)), "run"]  # the run's own thread reads too
        self._reads.set_yticks(range(len(names)), names)
        self._reads.set_ylim(len(names) - 0.4, -0.6)
        self._reads.set_ylabel("thread")
        self._reads.set_xlabel("ms", labelpad=1)
        self._time.set_xlim(-0.6, self._layers - 0.4)
        layer_ticks(self._time.xaxis, self._layers)
        self._time.set_xlabel("layer", labelpad=1)
        self._time.set_ylabel("ms")
        for ax, words in (
            (self._heat, "experts chosen by layer; dark: by no token, bright: by most"),
            (self._reads, "reads of the last token"),
            (self._time, "time by layer"),
        ):
            ax.set_title(words, loc="left", size=9, color=INK)
        grid(self._reads, "x")
        grid(self._time)
        self._limits = {self._reads: 0.0, self._time: 0.0}

    def add(self, passes: Sequence[LivePass]) -> None:
        """Take in passes that are over."""
        asked = [
            (layers[:, None] * self._experts + experts.reshape(len(layers), -1)).ravel()
            for one in passes
            for layers, experts in one.experts
            if len(layers)
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

    @property
    def words(self) -> str:
        """What the frame shows, in figures."""
        return " ".join(self._said)

    def png(self) -> bytes:
        """The frame as it is now."""
        ms = np.median(self._layer_ms, 0) if len(self._layer_ms) else np.zeros(self._layers)
        self._fit(self._reads, "x", float(ms.sum()))
        self._fit(self._time, "y", float(ms.max()))
        if (background := self._background) is None:
            self._canvas.draw()
            picture = np.asarray(self._canvas.buffer_rgba())[..., :3]
            background = (picture.mean(-1) / 2).astype(np.uint8)  # it is all grey
            self._background = background
        pixels = background.copy()
        self._draw_heat(pixels)
        self._draw_reads(pixels)
        self._draw_time(pixels, ms)
        return palette_png(pixels, self._palette)

    def _draw_heat(self, pixels: np.ndarray) -> None:
        share = self.counts / max(self._tokens, 1)
        most = float(share.max())
        self._said[0] = f"Brightest expert: chosen by {most:.0%} of {self._tokens} tokens."
        left, right, top, bottom = _box(self._heat)
        rows = np.arange(bottom - top) * self._layers // (bottom - top)
        columns = np.arange(right - left) * self._experts // (right - left)
        heat = (_HEAT_0 + share / max(most, 1e-9) * (_HEATS - 1)).astype(np.uint8)
        pixels[top:bottom, left:right] = heat[rows[:, None], columns]

    def _draw_reads(self, pixels: np.ndarray) -> None:
        one = self._last
        tables = [
            part.records.table
            for found in (one.fetched if one else ())
            for part in found.landings
            if part.records is not None
        ]
        rows = np.concatenate([table[_FIELDS] for table in tables]) if tables else _NO_READS
        asked = sum(experts.size for _, experts in one.experts) if one else 0
        held = asked - len(np.unique(rows[["layer", "expert"]]))
        nbytes = format_nbytes(int(rows["nbytes"].sum()))
        self._said[1] = f"Last token: {held} found in the bank, {len(rows)} reads of {nbytes}."
        begin, whole = (one.start_ns if one else 0), self._limits[self._reads] * 1e6
        left, right, top, bottom = _box(self._reads)
        x = [(rows[name] - begin) / whole * (right - left) + left for name in _ENDS]
        height = (bottom - top) / (self._threads + 1.2)
        y = top + (rows["thread"] + 0.2) * height
        for start, end, low in zip(*x, y, strict=True):
            if start < right:
                stop = min(max(int(end), int(start) + 1), right)
                pixels[int(low) : int(low + 0.8 * height), int(start) : stop] = _ORANGE

    def _draw_time(self, pixels: np.ndarray, ms: np.ndarray) -> None:
        many = len(self._layer_ms)
        if many:
            self._said[2] = f"All layers: {ms.sum():.2f} ms a token, median of the last {many}."
        left, right, top, bottom = _box(self._time)
        width = (right - left) / (self._layers + 0.2)
        tall = (bottom - top) * np.minimum(ms / self._limits[self._time], 1)
        for layer, height in enumerate(tall):
            start = left + (layer + 0.2) * width
            stop = max(int(start + 0.8 * width), int(start) + 1)
            pixels[int(bottom - height) : bottom, int(start) : stop] = _BLUE

    def _fit(self, ax: Axes, axis: str, usual: float) -> None:
        """Let an axis reach well beyond what is usual, in steps, so that it seldom changes."""
        reach = self._limits[ax]
        if not reach or usual * 1.1 > reach or usual < reach / 6:
            self._limits[ax] = reach = _round_up(usual)
            (ax.set_xlim if axis == "x" else ax.set_ylim)(0, reach)
            self._background = None


_ENDS = ("start_ns", "end_ns")
_FIELDS = ["layer", "expert", "thread", *_ENDS, "nbytes"]
_NO_READS = np.zeros(0, [(name, np.int64) for name in _FIELDS])


def _palette() -> np.ndarray:
    """uint8 [256, 3]: see the numbers of colours above."""
    greys = np.repeat(np.arange(_HEAT_0)[:, None] * 255 / (_HEAT_0 - 1), 3, axis=1)
    heat = 255 * colormaps[HEAT](np.linspace(0, 1, _HEATS))[:, :3]
    bars = 255 * np.array([to_rgb(ORANGE), to_rgb(BLUE)])
    return np.concatenate([greys, heat, bars]).round().astype(np.uint8)


def _box(ax: Axes) -> tuple[int, int, int, int]:
    """Left, right, top and bottom of axes in pixels, right and bottom not within."""
    box = ax.get_position()
    left, right = round(box.x0 * WIDTH) + 1, round(box.x1 * WIDTH)
    return left, right, round((1 - box.y1) * HEIGHT), round((1 - box.y0) * HEIGHT) - 1


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... above a value and a third of it."""
    value = max(value * 1.3, 1e-3)
    scale = 10.0 ** np.floor(np.log10(value))
    return float(next(step * scale for step in (1, 2, 5, 10) if step * scale >= value))
