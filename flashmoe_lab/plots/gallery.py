"""All figures of a trace at once: their names, and files of them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flashmoe_lab.plots.io import io_timeline
from flashmoe_lab.plots.latency import layer_latency
from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.routing import expert_histogram
from flashmoe_lab.trace import Trace

FIGURES: dict[str, Callable[[Trace], Plot]] = {
    "expert_histogram": expert_histogram,
    "io_timeline": io_timeline,
    "layer_latency": layer_latency,
}


def draw_all(
    trace: Trace, directory: str | Path, formats: Sequence[str] = ("png", "svg")
) -> Iterator[tuple[str, Plot | None, str]]:
    """Draw every figure into a directory: (name, plot, "") each, or (name, None, why not)."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        try:
            plot = draw(trace)
        except ValueError as error:  # the trace lacks what this figure draws
            yield name, None, str(error)
            continue
        for kind in formats:
            plot.save(path / f"{name}.{kind}")
        yield name, plot, ""
