"""Pictures small enough for a card: PNG bytes, no axes, a background that suits any theme."""

from io import BytesIO

import numpy as np
from matplotlib.figure import Figure

from flashmoe_lab.plots.style import BLUE, GREY, RED

_MOST_BARS = 320  # a value a pixel


def sorted_probabilities(probabilities: np.ndarray, chosen: np.ndarray) -> bytes:
    """Probabilities [E] as bars, largest first; those of the chosen numbers in colour."""
    order = np.argsort(-probabilities, kind="stable")
    colours = [RED if number in set(chosen.tolist()) else GREY for number in order.tolist()]
    return _bars(probabilities[order], colours)


def values_strip(values: np.ndarray) -> bytes:
    """Values [n] as bars up and down; of many, the largest by magnitude of each stretch."""
    if len(values) > _MOST_BARS:
        parts = np.array_split(values, _MOST_BARS)
        values = np.array([part[np.abs(part).argmax()] for part in parts])
    return _bars(values, [BLUE] * len(values))


def _bars(values: np.ndarray, colours: list[str]) -> bytes:
    figure = Figure(figsize=(3.2, 0.7), dpi=100)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.bar(range(len(values)), values, width=1.0, color=colours)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.axis("off")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=192)
    return buffer.getvalue()
