"""How far the kernels are from float64: one layer of each kind at its real size.

Some random tokens are embedded, go through one layer from the empty state, and on through the final
norm and `lm_head`, by each variant of the kernels and by the stages' float64 references. Errors are
relative rms: of what the layer adds to the stream, and of the logits, which the default kernels
must keep within 1e-3; else the exit code is 1. No time is measured.

    python benchmarks/errors.py --geometry 397b         16 GB in a temporary folder, six minutes
    python benchmarks/errors.py --model PACKED
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import model_under_test
import numpy as np
from record import error_rms, record

import flashmoe_lab as fl
from flashmoe_lab import kernels
from flashmoe_lab.layer import Layer
from flashmoe_lab.state import LayerState

BOUND = 1e-3  # of the logits' relative rms error


def main() -> int:
    """Compute and print a table; 1 where the default kernels are out of bounds."""
    options = _options()
    with model_under_test.opened(options) as path, fl.load(path, bank_gb=options.bank_gb) as engine:
        return 0 if engine._thread.call(lambda: compare(engine, options, path)) else 1


def compare(engine: fl.Engine, options: argparse.Namespace, path: Path) -> bool:
    """Both kinds of layer by every variant; to be called in the engine's thread."""
    print(f"{model_under_test.name(options)}, {options.tokens} random tokens, relative rms errors")
    print(f"{'layer':26}{'variant':14}{'what it adds':>14}{'logits':>10}{'same experts':>14}")
    conditions = model_under_test.conditions(options, path)
    tokens = np.random.default_rng(0).integers(0, engine.config.vocab_size, options.tokens)
    model, default, right = engine.model, kernels.used(), True
    x = model.embed(mx.array(tokens))
    before = np.array(x, np.float64)
    for layer in {layer.kind: layer for layer in reversed(engine.layers)}.values():
        after, experts = layer.reference(before), named(layer, before)
        logits = model.lm_head.reference(model.norm.reference(after))
        for variant in kernels.KERNELS:
            kernels.use(variant)
            found, chosen = through(layer, x, model.empty_state()[layer.index])
            added = error_rms(np.array(found) - before, after - before)
            error = error_rms(np.array(model.lm_head(model.norm(found))), logits)
            same = np.mean([np.isin(*pair) for pair in zip(chosen, experts, strict=True)])
            is_default = variant == default
            right &= error <= BOUND or not is_default
            print(
                f"{f'{layer.index}, {layer.kind}':26}{variant:14}{added:>14.1e}{error:>10.1e}"
                f"{same:>14.1%}{'  the default' if is_default else ''}",
                flush=True,
            )
            record(
                options.json,
                benchmark="errors",
                case=f"{model_under_test.name(options)}, {layer.kind}",
                variant=variant,
                value=error,
                unit="of the logits' rms",
                repetitions=1,
                error_rms=error,
                error_rms_of_layer=added,
                same_experts=same,
                tokens=options.tokens,
                **conditions,
            )
    kernels.use(default)
    return right


def named(layer: Layer, x: np.ndarray) -> np.ndarray:
    """The experts [T, K] that float64 chooses for the stream x [T, hidden]."""
    h = x + layer.mixer.reference(layer.input_norm.reference(x))
    return layer.router.reference(layer.post_norm.reference(h))[0]


def through(layer: Layer, x: mx.array, state: LayerState) -> tuple[mx.array, np.ndarray]:
    """The stream [T, hidden] after a layer, and the experts [T, K] that it chose."""
    steps, answer, experts = layer.steps(x, state), None, np.empty(0)
    while True:
        try:
            name, answer = steps.send(answer)
        except StopIteration as stop:
            return stop.value, experts
        if name == "router":
            experts = np.array(answer.experts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model_under_test.add_options(parser)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--bank-gb", type=float, default=1.0, help="memory for experts")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
