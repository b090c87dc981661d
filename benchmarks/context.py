"""Time per token against the length of the context: attention and DeltaNet layers apart.

The state is filled with random numbers up to each length, since only its size matters to time, and
then single tokens go through one mixer of each kind. An attention layer must read all keys and
values; a DeltaNet layer carries a state of one size. What a token takes beyond the shortest context
is held against the keys and values that it reads beyond them: that slope is in GB/s, beside a plain
read of the longest state.

    python benchmarks/context.py --geometry 397b --plot context.png
"""

import argparse
import sys
import time
from pathlib import Path

import mlx.core as mx
import model_under_test
import numpy as np
import pandas as pd
from interleave import Samples, interleave
from record import record

import flashmoe_lab as fl
from flashmoe_lab import native
from flashmoe_lab.config import FULL
from flashmoe_lab.layer import Layer
from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.style import BLUE, ORANGE, canvas, grid, legend
from flashmoe_lab.state import KV_STEP, AttentionState, LayerState


def main() -> int:
    """Measure and print a table."""
    options = _options()
    with model_under_test.opened(options) as path, fl.load(path, bank_gb=0.0) as engine:
        engine._thread.call(lambda: measure(engine, options, path))
    return 0


def measure(engine: fl.Engine, options: argparse.Namespace, path: Path) -> None:
    """All lengths of both kinds, in turn; to be called in the engine's thread."""
    kinds = {layer.kind: layer for layer in engine.layers}
    conditions = model_under_test.conditions(options, path)
    runs = {
        f"{kind}, {length}": Run(engine, layer, length, options.tokens)
        for kind, layer in kinds.items()
        for length in options.lengths
    }
    work = {name: run.measure for name, run in runs.items()}
    longest = runs[f"{FULL}, {max(options.lengths)}"]
    work["plain read"] = longest.read
    samples = interleave(work, options.repetitions)
    print(f"context, {model_under_test.name(options)}: milliseconds a token of one mixer, medians")
    print(f"{'':28}{'ms':>10}{'spread':>9}{'over first':>12}{'GB/s of state':>15}")
    for name, run in runs.items():
        show(options, name, run, samples, conditions)
    more = longest.nbytes - runs[f"{FULL}, {min(options.lengths)}"].nbytes
    times = {length: samples[f"{FULL}, {length}"] for length in options.lengths}
    first, last = times[min(options.lengths)], times[max(options.lengths)]
    for name, taken in (
        ("medians", last.median - first.median),
        ("bests", min(last.values) - min(first.values)),
    ):
        print(f"attention's slope, by {name}: {more / taken / 1e6:.1f} GB/s")
    read = samples["plain read"]
    print(f"plain read of the longest state: {longest.nbytes / read.median / 1e6:.1f} GB/s")
    if options.plot:
        plot(options, list(kinds), samples).save(options.plot)


class Run:
    """One mixer at one length of context."""

    def __init__(self, engine: fl.Engine, layer: Layer, length: int, tokens: int) -> None:
        self.layer, self.length, self.tokens = layer, length, tokens
        hidden = engine.config.hidden_size
        rng = np.random.default_rng(0)
        self.x = [mx.array(rng.normal(size=(1, hidden)), mx.float32) for _ in range(tokens)]
        self.state: LayerState = engine.model.empty_state()[layer.index]
        self.nbytes = 0
        if isinstance(self.state, AttentionState):
            heads, _, dim = self.state.keys.shape
            size = -(-(length + tokens) // KV_STEP) * KV_STEP
            self.state.keys = mx.array(rng.random((heads, size, dim), np.float32))
            self.state.values = mx.array(rng.random((heads, size, dim), np.float32))
            self.nbytes = 2 * 4 * heads * length * dim
        self.mix(self.x[0])

    def mix(self, x: mx.array) -> None:
        """One call of the mixer, waited for."""
        mx.eval(self.layer.mixer(x, self.state))  # pyright: ignore[reportArgumentType]

    def measure(self) -> float:
        """Milliseconds a token of some that follow upon the context."""
        if isinstance(self.state, AttentionState):
            self.state.length = self.length
        start = time.perf_counter()
        for x in self.x:
            self.mix(x)
        return (time.perf_counter() - start) / self.tokens * 1e3

    def read(self) -> float:
        """Milliseconds of a plain read of as many bytes, of an attention layer."""
        assert isinstance(self.state, AttentionState)
        start = time.perf_counter()
        for part in (self.state.keys, self.state.values):
            native.read(np.asarray(part))
        return (time.perf_counter() - start) * 1e3


def show(
    options: argparse.Namespace,
    name: str,
    run: Run,
    samples: dict[str, Samples],
    conditions: dict[str, object],
) -> None:
    """One line of the table and of the file."""
    kind = run.layer.kind
    first = samples[f"{kind}, {options.lengths[0]}"].median
    found = samples[name]
    speed = None
    if kind == FULL:
        speed = run.nbytes / found.median / 1e6
    print(
        f"{name:28}{found.median:>10.3f}{found.spread:>9.3f}{found.median / first:>12.2f}"
        f"{'' if speed is None else f'{speed:.1f}':>15}"
    )
    record(
        options.json,
        benchmark="context",
        case=f"{model_under_test.name(options)}, {kind}",
        variant=f"context {run.length}",
        value=found.median,
        unit="ms/token",
        repetitions=len(found),
        spread=found.spread,
        ratio_to=f"context {options.lengths[0]}",
        ratio=found.median / first,
        context=run.length,
        state_gb_per_second=speed,
        bits=conditions["bits"],
    )


def plot(options: argparse.Namespace, kinds: list[str], samples: dict[str, Samples]) -> Plot:
    """The figure of docs/measuring.md."""
    rows = [
        (
            kind,
            length,
            samples[f"{kind}, {length}"].median,
            min(samples[f"{kind}, {length}"].values),
        )
        for kind in kinds
        for length in options.lengths
    ]
    data = pd.DataFrame(rows, columns=["kind", "context_tokens", "median_ms", "best_ms"])
    title = "Attention's time grows with the context, DeltaNet's does not"
    caption = (
        f"{model_under_test.name(options)}, one mixer of each kind, one token, random state; "
        f"{native.threads()} threads, {native.isa()}; "
        f"medians of {options.repetitions} (dotted: the best)"
    )
    figure, axes = canvas(title, caption, height=3.6)
    ax = axes[0, 0]
    for kind, colour, mark in zip(kinds, (BLUE, ORANGE), ("o", "s"), strict=True):
        of = data[data.kind == kind]
        name = "attention" if kind == FULL else "DeltaNet"
        ax.plot(of.context_tokens, of.median_ms, color=colour, marker=mark, label=name)
        ax.plot(of.context_tokens, of.best_ms, color=colour, lw=1, ls=":", alpha=0.7)
    ax.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    ax.set_xlabel("tokens of context")
    ax.set_ylabel("ms a token")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    grid(ax)
    legend(ax)
    return Plot(figure=figure, data=data, title=title)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model_under_test.add_options(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1000, 8000, 32000])
    parser.add_argument("--tokens", type=int, default=8, help="tokens of one measurement")
    parser.add_argument("--plot", type=Path, help="draw the figure into this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
