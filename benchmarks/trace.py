"""What recording costs: decode speed untraced, in `flow` and in `stages` mode, and whether the
record is true.

They run in turn on one opened engine, in reversed order every second time. A ratio is the median of
the repetitions' own ratios to the untraced run of the same repetition: of decode, as a run tells
it, and of the run's whole wall time, prompt and making of the tables included. Beside it stand the
share of the wall time that the spans explain, and whether the tokens are the untraced ones.
With --bytes, a cold run with direct reads is traced once, and the bytes of its reads are held
against what the kernel says it fetched for this process.

    python benchmarks/trace.py --model packed/ --bank-gb 0.008
    python benchmarks/trace.py --geometry 397b --layers 4 --bank-gb 4 --max-tokens 16 --bytes
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import model_under_test
from interleave import Samples, interleave
from record import record

import flashmoe_lab as fl
from flashmoe_lab import kernels
from flashmoe_lab.run import Run
from flashmoe_lab.storage.page_cache import process_read_nbytes

PROMPT = "Once upon a time there was a small town by the sea"
VARIANTS: dict[str, str | None] = {"untraced": None, "flow": "flow", "stages": "stages"}


class Bench:
    """One engine and what its runs gave."""

    def __init__(self, engine: fl.Engine, options: argparse.Namespace) -> None:
        self.engine, self.options = engine, options
        self.runs: dict[str, Run] = {}
        self.wall: dict[str, list[float]] = {}  # seconds
        self.equal = True

    def speed(self, variant: str) -> float:
        """Tokens per second of one run."""
        start = time.perf_counter()
        run = self.engine.stream_generate(
            self.prompt, self.options.max_tokens, trace=VARIANTS[variant]
        ).wait()
        self.wall.setdefault(variant, []).append(time.perf_counter() - start)
        first = self.runs.setdefault(variant, run)
        self.equal &= run.tokens == self.runs.setdefault("untraced", first).tokens
        self.runs[variant] = run
        return run.stats.decode.tokens_per_second

    @property
    def prompt(self) -> str | list[int]:
        """Words, or numbers where there is no tokenizer."""
        if self.engine.tokenizer is not None:
            return PROMPT
        return [n % self.engine.config.vocab_size for n in range(3, 15)]

    def wall_ratio(self, variant: str) -> float:
        """Median of the repetitions' own ratios of whole runs' speed to the untraced one's."""
        pairs = zip(self.wall["untraced"], self.wall[variant], strict=True)
        return statistics.median(plain / mine for plain, mine in pairs)

    def closure(self, variant: str) -> float | None:
        """Share of the last run's time that its spans explain."""
        trace = self.runs[variant].trace
        return None if trace is None else trace.closure


def main() -> int:
    """Measure and print a table; exit code 1 if a record is not true."""
    options = _options()
    with model_under_test.opened(options) as path:
        with fl.load(path, bank_gb=options.bank_gb, reader=options.reader) as engine:
            bench = Bench(engine, options)
            for variant in options.variants:  # libraries are imported before it counts
                bench.speed(variant)
            bench.wall.clear()
            cases: dict[str, Callable[[], float]] = {
                name: partial(bench.speed, name) for name in options.variants
            }
            samples = interleave(cases, options.repetitions)
            _print(bench, samples)
            _record(bench, samples, model_under_test.conditions(options, path))
        right = bench.equal
        if options.bytes:
            right &= _bytes_agree(path, options)
    return 0 if right else 1


def _best_ratio(samples: dict[str, Samples], variant: str) -> float:
    """Best against best: what is left when the machine was disturbed least."""
    return max(samples[variant].values) / max(samples["untraced"].values)


def _print(bench: Bench, samples: dict[str, Samples]) -> None:
    engine, options = bench.engine, bench.options
    print(
        f"decode of {options.max_tokens} tokens, K={engine.num_experts_per_tok}, experts "
        f"{engine.checkpoint.label}, bank {engine.bank.slots} slots, reader {options.reader}, "
        f"kernels {kernels.used()}, median of {options.repetitions} interleaved"
    )
    print(
        f"{'':10}{'tokens/s':>10}{'spread':>9}{'ratio':>8}{'spread':>9}{'of best':>9}"
        f"{'whole run':>11}{'explained':>11}  tokens"
    )
    same = "same" if bench.equal else "NOT THE SAME"
    for name, found in samples.items():
        ratio, closure = found.beside(samples["untraced"]), bench.closure(name)
        explained = "" if closure is None else f"{closure:.1%}"
        print(
            f"{name:10}{found.median:>10.2f}{found.spread:>9.2f}{ratio.median:>8.3f}"
            f"{ratio.spread:>9.3f}{_best_ratio(samples, name):>9.3f}"
            f"{bench.wall_ratio(name):>11.3f}{explained:>11}  {same}"
        )
    for name in options.variants[1:]:
        trace = bench.runs[name].trace
        assert trace is not None
        print(f"last run, {trace.summary()}")


def _record(bench: Bench, samples: dict[str, Samples], conditions: dict[str, Any]) -> None:
    options = bench.options
    for name, found in samples.items():
        ratio = found.beside(samples["untraced"])
        record(
            options.json,
            benchmark="trace",
            case=model_under_test.name(options),
            variant=name,
            value=found.median,
            unit="tokens/s",
            repetitions=len(found),
            spread=found.spread,
            ratio_to="untraced",
            ratio=ratio.median,
            ratio_spread=ratio.spread,
            ratio_of_best=_best_ratio(samples, name),
            ratio_of_whole_runs=bench.wall_ratio(name),
            explained=bench.closure(name),
            tokens_equal_untraced=bench.equal,
            bank_slots=bench.engine.bank.slots,
            reader=options.reader,
            kernels=kernels.used(),
            max_tokens=options.max_tokens,
            **conditions,
        )


def _bytes_agree(path: Path, options: argparse.Namespace) -> bool:
    """Bytes of the trace's reads against /proc/self/io, with direct reads from a cold cache."""
    model_under_test.chill(path)
    with fl.load(path, bank_gb=options.bank_gb, reader="direct") as engine:
        bench = Bench(engine, options)
        run = engine.stream_generate(bench.prompt, options.max_tokens, trace="flow")
        before = process_read_nbytes()
        run.wait()
        after = process_read_nbytes()
    if before is None or after is None or run.trace is None:
        print("this system does not say what it fetched for a process")
        return True
    mine, kernel = int(run.trace.reads.nbytes.sum()), after - before
    sources = set(run.trace.reads.source[run.trace.reads.nbytes > 0])
    print(
        f"direct reads, cold: the trace says {mine:,} bytes, the kernel {kernel:,} "
        f"(ratio {mine / kernel:.4f}); sources {', '.join(sorted(sources))}"
    )
    return abs(mine / kernel - 1) <= 0.01 and sources == {"ssd"}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model_under_test.add_options(parser)
    parser.set_defaults(repetitions=10)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--bank-gb", type=float, help="memory for experts, in 10**9 bytes")
    parser.add_argument("--reader", default="pread")
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="untraced first"
    )
    parser.add_argument(
        "--bytes", action="store_true", help="hold bytes against the kernel's count"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
