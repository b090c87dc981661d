"""LiveFigure: three panels of a run under way as one PNG: experts chosen, the last token's reads,
time by layer.

It is drawn again and again while tokens are made, and every moment in which it holds Python's lock
or a processor is lost to the run. So Matplotlib draws axes and words once, before any run; when a
scale changes, the four numbers at its axes alone; and a frame sets pixels. The figures that stay
are made from the trace, by `plots`.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from flashmoe_lab.plots.style import BLUE, HEAT, INK, ORANGE, grid, layer_ticks, styled
from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.stages.expert_landing import Landing
from flashmoe_lab.units import format_nbytes
from flashmoe_lab.widgets.live import LivePass
from flashmoe_lab.widgets.palette_png import palette_png

WIDTH, HEIGHT = 880, 400  # pixels
_RECENT = 32  # passes that the time by layer is the median of
# Numbers of colours: half as many greys as there are, then heat, then the bars.
_HEAT_0, _HEATS, _ORANGE, _BLUE = 128, 126, 254, 255


class LiveFigure:
    """The panels of one run after another.

    Attributes:
        counts: how often each expert was chosen, [L, E].

    Args:
        layers, experts: of the model.
        threads: reading threads.
    """

    def __init__(self, layers: int, experts: int, threads: int) -> None:
        self._layers, self._experts, self._threads = layers, experts, threads
        self._palette = _palette()
        self._limits: dict[Axes, float] = {}
        self._marks: dict[Axes, tuple[Text, Text]] = {}
        with styled():
            self._build()
        self._canvas.draw()  # all but the marks
        self._empty = self._canvas.copy_from_bbox(self._canvas.figure.bbox)
        self._background = np.zeros((HEIGHT, WIDTH), np.uint8)
        self.clear()

    def clear(self) -> None:
        """Begin another run."""
        self.counts = np.zeros((self._layers, self._experts))
        self._tokens = 0
        self._layer_ms = np.zeros((0, self._layers))
        self._reads_of: tuple[int, int, np.ndarray] = (0, 0, _NO_READS)
        self._said = [""] * 3

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
        self._reads.set_xticks(_TICKS, _NAMES)
        self._time.set_xlim(-0.6, self._layers - 0.4)
        layer_ticks(self._time.xaxis, self._layers)
        self._time.set_xlabel("layer", labelpad=1)
        self._time.set_ylabel("ms", labelpad=16)
        self._time.set_yticks(_TICKS, _NAMES)
        for ax, words in (
            (self._heat, "experts (across) by layer; dark: chosen by no token, bright: by most"),
            (self._reads, "reads of the last token"),
            (self._time, "time by layer"),
        ):
            ax.set_title(words, loc="left", size=9, color=INK)
        grid(self._reads, "x")
        grid(self._time)
        self._marks[self._reads] = _mark(self._reads, 0.5, 0), _mark(self._reads, 1, 0)
        self._marks[self._time] = _mark(self._time, 0, 0.5), _mark(self._time, 0, 1)

    def add(
        self, passes: Sequence[LivePass], last: tuple[LivePass, list[Fetched]] | None = None
    ) -> None:
        """Take in passes that are over, and what the last token fetched."""
        asked = [
            (layers[:, None] * self._experts + experts.reshape(len(layers), -1)).ravel()
            for one in passes
            for layers, experts in one.chosen()
            if len(layers)
        ]
        if asked:
            flat = np.bincount(np.concatenate(asked), minlength=self.counts.size)
            self.counts += flat.reshape(self.counts.shape)
        self._tokens += sum(one.tokens for one in passes)
        singles = [one for one in passes if one.tokens == 1][-_RECENT:]
        taken = [one.layers_ns(self._layers) for one in singles]
        if times := [layers_ns / 1e6 for layers_ns in taken if layers_ns is not None]:
            self._layer_ms = np.concatenate([self._layer_ms, times])[-_RECENT:]
        if last is not None:
            self._reads_of = last[0].start_ns, *_reads(*last)

    @property
    def words(self) -> str:
        """What the frame shows, in figures."""
        return " ".join(self._said)

    def png(self) -> bytes:
        """The frame as it is now."""
        ms = np.median(self._layer_ms, 0) if len(self._layer_ms) else np.zeros(self._layers)
        self._fit({self._reads: float(ms.sum()), self._time: float(ms.max())})
        pixels = self._background.copy()
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
        pixels[top:bottom, left:right] = heat[:, columns][rows]

    def _draw_reads(self, pixels: np.ndarray) -> None:
        begin, held, rows = self._reads_of
        nbytes = format_nbytes(int(rows["nbytes"].sum()))
        self._said[1] = f"Last token: {held} found in the bank, {len(rows)} reads of {nbytes}."
        whole = self._limits[self._reads] * 1e6
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

    def _fit(self, usual: dict[Axes, float]) -> None:
        """Let axes reach well beyond what is usual, in steps, so that they seldom change."""
        changed = False
        for ax, value in usual.items():
            reach = self._limits.get(ax, 0.0)
            if not reach or value * 1.1 > reach or value < reach / 6:
                self._limits[ax] = reach = _round_up(value)
                for mark, share in zip(self._marks[ax], (0.5, 1), strict=True):
                    mark.set_text(f"{share * reach:g}")
                changed = True
        if changed:
            self._canvas.restore_region(self._empty)
            for mark in (mark for marks in self._marks.values() for mark in marks):
                mark.draw(self._canvas.get_renderer())
            # All of it is grey.
            self._background = np.asarray(self._canvas.buffer_rgba())[..., 0] >> 1


_TICKS, _NAMES = (0, 0.25, 0.5, 0.75, 1), ("0", "", "", "", "")  # the others are marks
_ENDS = ("start_ns", "end_ns")
_FIELDS = ["layer", "expert", "thread", *_ENDS, "nbytes"]
_NO_READS = np.zeros(0, [(name, np.int64) for name in _FIELDS])


def _reads(one: LivePass, fetched: Sequence[Fetched]) -> tuple[int, np.ndarray]:
    """How many experts the bank held for a token, and what was read."""
    rows = _rows(part for found in fetched for part in found.landings)
    needless = _rows(part for found in fetched for part in found.needless)
    asked = sum(experts.size for _, experts in one.chosen())
    held = asked - len(np.unique(rows[["layer", "expert"]]))
    return held, np.concatenate([rows, needless])


def _rows(landings: Iterable[Landing]) -> np.ndarray:
    found = [landing.records for landing in landings]
    tables = [records.table[_FIELDS] for records in found if records is not None]
    return np.concatenate(tables) if tables else _NO_READS


def _mark(ax: Axes, x: float, y: float) -> Text:
    """The number at a tick, drawn by itself."""
    below = y == 0
    return ax.annotate(
        "",
        (x, y),
        xycoords="axes fraction",
        xytext=(0, -7) if below else (-7, 0),  # as ticks have it
        textcoords="offset points",
        ha="center" if below else "right",
        va="top" if below else "center_baseline",
        color=INK,
        animated=True,
    )


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
