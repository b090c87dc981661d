"""All figures of one trace at once: their names, and files of them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from flashmoe_lab.plots import cache, io, latency, mass, memory, routing, state
from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.trace import Trace

FIGURES: dict[str, Callable[[Trace], Plot]] = {
    "expert_histogram": routing.expert_histogram,
    "expert_histogram_layer": partial(routing.expert_histogram, layer=0),
    "expert_heatmap": routing.expert_heatmap,
    "token_overlap": routing.token_overlap,
    "working_set": routing.working_set,
    "reuse_distance": cache.reuse_distance,
    "router_weights": routing.router_weights,
    "router_entropy": routing.router_entropy,
    "mass_by_k": mass.mass_by_k,
    "io_timeline": io.io_timeline,
    "io_rate": io.io_rate,
    "read_latency": io.read_latency,
    "layer_latency": latency.layer_latency,
    "token_waterfall": latency.token_waterfall,
    "time_shares": latency.time_shares,
    "token_strip_latency": partial(latency.token_strip, by="latency"),
    "token_strip_entropy": partial(latency.token_strip, by="entropy"),
    "token_strip_bytes": partial(latency.token_strip, by="bytes"),
    "hit_rate": cache.hit_rate,
    "bytes_per_token": cache.bytes_per_token,
    "memory_budget": memory.memory_budget,
    "context_memory": memory.context_memory,
    "state_norm": state.state_norm,
    "delta_gates": state.delta_gates,
    "memory_length": state.memory_length,
    "attention_map": state.attention_map,
}


def draw_all(
    trace: Trace,
    directory: str | Path,
    formats: Sequence[str] = ("png", "svg"),
    figures: Sequence[str] = tuple(FIGURES),
) -> Iterator[tuple[str, Plot | None, str]]:
    """Draw figures, all by default, into a directory: (name, plot, "") each, or (name, None, why
    not)."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    for name in figures:
        try:
            plot = FIGURES[name](trace)
        except ValueError as error:  # the trace lacks what this figure draws
            for kind in formats:  # an older trace's must not pass for this one's
                (path / f"{name}.{kind}").unlink(missing_ok=True)
            yield name, None, str(error)
            continue
        for kind in formats:
            plot.save(path / f"{name}.{kind}")
        yield name, plot, ""
