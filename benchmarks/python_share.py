"""How much of a decode step is spent in Python: what is left of its time outside calls of our C++.

Each call of the native kernels is timed by a wrapper put around it; all else counts as Python: the
interpreter, NumPy, MLX's bookkeeping, the wrappers themselves, and whatever other programs take
from this thread meanwhile. `step` is a token through the model to its logits on the host, `token`
the same with sampling, text and handing it over, wall time from one response to the next.

    python benchmarks/python_share.py --model PACKED
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Any

import model_under_test
from interleave import Samples, interleave
from record import record

import flashmoe_lab as fl
from flashmoe_lab import kernels, native

PROMPT = list(range(3, 15))
CALLS = {
    "Block": ("before",),
    "Matrix": ("product", "dequantize"),
    "ReadPool": ("submit",),
    "ReadTicket": ("records", "landed"),
    "": ("after", "rms_norm", "expert_mlp", "weighted_sum"),
}


class Clock:
    """Time inside the native calls so far."""

    def __init__(self) -> None:
        self.inside_ns = 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, with its time added here."""

        def wrapper(*arguments: Any) -> Any:
            start = perf_counter_ns()
            try:
                return call(*arguments)
            finally:
                self.inside_ns += perf_counter_ns() - start

        return wrapper

    @contextmanager
    def around_native(self) -> Iterator[None]:
        """Within the `with`, native calls are timed."""
        kept: list[tuple[Any, str, Any]] = []
        for owner_name, names in CALLS.items():
            owner: Any = getattr(native._native, owner_name) if owner_name else native._native
            for name in names:
                kept.append((owner, name, getattr(owner, name)))
                setattr(owner, name, self.timed(kept[-1][2]))
        try:
            yield
        finally:
            for owner, name, call in kept:
                setattr(owner, name, call)


def shares(engine: fl.Engine, tokens: int, what: str) -> float:
    """Share of Python in one run's steps or tokens."""
    clock = Clock()
    with clock.around_native():
        run = engine.stream_generate(PROMPT, tokens)
        responses = iter(run)
        next(responses)  # the prompt is no step
        inside_ns, begin_ns = clock.inside_ns, perf_counter_ns()
        for _ in responses:
            pass
        inside_ns, wall_ns = clock.inside_ns - inside_ns, perf_counter_ns() - begin_ns
    return 1 - inside_ns / (run.stats.decode.dur_ns if what == "step" else wall_ns)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model_under_test.add_options(parser)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--bank-gb", type=float, help="memory for experts; all of them without")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    options = parser.parse_args()
    if not native.available:
        print(f"flashmoe_lab._native {native.missing}")
        return 1
    with model_under_test.opened(options) as path:
        settings = {"resident": True} if options.bank_gb is None else {"bank_gb": options.bank_gb}
        with fl.load(path, **settings) as engine:
            conditions = model_under_test.conditions(options, path)
            for threads in options.threads:
                native.set_threads(threads)
                _measure(engine, options, threads, conditions)
    return 0


def _measure(
    engine: fl.Engine, options: argparse.Namespace, threads: int, conditions: dict[str, Any]
) -> None:
    shares(engine, options.max_tokens, "step")  # caches are filled before it counts
    cases: dict[str, Callable[[], float]] = {
        "step": lambda: shares(engine, options.max_tokens, "step"),
        "token": lambda: shares(engine, options.max_tokens, "token"),
    }
    for what, found in interleave(cases, options.repetitions).items():
        _tell(what, found, threads)
        record(
            options.json,
            benchmark="python_share",
            case=model_under_test.name(options),
            variant=what,
            value=found.median,
            unit="share",
            repetitions=len(found),
            spread=found.spread,
            threads=threads,
            bank_slots=engine.bank.slots,
            kernels=kernels.used(),
            max_tokens=options.max_tokens,
            **conditions,
        )


def _tell(what: str, found: Samples, threads: int) -> None:
    print(
        f"{what:6}{threads} threads: {found.median:.1%} ± {found.spread:.1%} in Python, "
        f"at best {min(found.values):.1%} of {len(found)}"
    )


if __name__ == "__main__":
    sys.exit(main())
