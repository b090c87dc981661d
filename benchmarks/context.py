"""Time per token against the length of the context: attention and DeltaNet layers apart.

The state is filled with random numbers up to each length, since only its size matters to time, and
then single tokens go through one mixer of each kind. An attention layer must read all keys and
values; a DeltaNet layer carries a state of one size. Beside attention's time stand the bytes of
keys and values over it.

    python benchmarks/context.py --geometry 397b --lengths 100 1000 8000 32000
"""

import argparse
import sys
import time
from pathlib import Path

import mlx.core as mx
import model_under_test
import numpy as np
from interleave import Samples, interleave
from record import record

import flashmoe_lab as fl
from flashmoe_lab.config import FULL
from flashmoe_lab.layer import Layer
from flashmoe_lab.state import LayerState


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
    samples = interleave({name: run.measure for name, run in runs.items()}, options.repetitions)
    print(f"context, {options.geometry}: milliseconds a token of one mixer, medians")
    print(f"{'':28}{'ms':>10}{'spread':>9}{'over first':>12}{'GB/s of state':>15}")
    for name, run in runs.items():
        show(options, name, run, samples, conditions)


class Run:
    """One mixer at one length of context."""

    def __init__(self, engine: fl.Engine, layer: Layer, length: int, tokens: int) -> None:
        self.layer, self.length, self.tokens = layer, length, tokens
        hidden = engine.config.hidden_size
        rng = np.random.default_rng(0)
        self.x = [mx.array(rng.normal(size=(1, hidden)), mx.float32) for _ in range(tokens)]
        self.state: LayerState = engine.model.empty_state()[layer.index]
        chunk = 256
        for start in range(0, length, chunk):
            rows = min(chunk, length - start)
            self.mix(mx.array(rng.normal(size=(rows, hidden)), mx.float32))

    def mix(self, x: mx.array) -> None:
        """One call of the mixer, waited for."""
        mx.eval(self.layer.mixer(x, self.state))  # pyright: ignore[reportArgumentType]

    def measure(self) -> float:
        """Milliseconds a token; the context grows by these few tokens each time."""
        start = time.perf_counter()
        for x in self.x:
            self.mix(x)
        return (time.perf_counter() - start) / self.tokens * 1e3


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
        attention = run.layer.mixer
        nbytes = 2 * 4 * run.length * attention.kv_heads * attention.head_dim  # pyright: ignore
        speed = nbytes / found.median / 1e6
    print(
        f"{name:28}{found.median:>10.3f}{found.spread:>9.3f}{found.median / first:>12.2f}"
        f"{'' if speed is None else f'{speed:.1f}':>15}"
    )
    record(
        options.json,
        benchmark="context",
        case=f"{options.geometry}, {kind}",
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model_under_test.add_options(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1000, 8000])
    parser.add_argument("--tokens", type=int, default=8, help="tokens of one measurement")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
