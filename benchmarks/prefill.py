"""Tokens per second of reading a prompt, by its length, resident and streamed.

A chunk of a prompt reads each expert that it needs once and layer by layer, so a long prompt is
bound by arithmetic even where decode is bound by the disk. Beside every speed stand the bytes read
per token and how many times over the needed experts were read (1.00 is once each). Interleaved, in
reversed order every second time.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --geometry 397b --layers 4 --bank-gb 4 --lengths 16 128 512 --cold
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import model_under_test
import numpy as np
from interleave import interleave
from one_run import measure
from record import record

import flashmoe_lab as fl


def main() -> int:
    """Measure and print a table; exit code 1 if streamed logits differ from resident ones."""
    options = _options()
    with model_under_test.opened(options) as path:
        gigabytes = fl.PackedCheckpoint(path).expert_nbytes / 1e9
        bank = options.bank_gb if options.bank_gb is not None else gigabytes / 4
        reading = {"reader": options.reader, "threads": options.threads, "split": options.split}
        ways: dict[str, dict[str, Any]] = {"streamed": {"bank_gb": bank, **reading}}
        if not options.streamed_only:
            ways = {"resident": {"resident": True}} | ways
        found: dict[str, dict[str, Any]] = {}
        work: dict[str, Callable[[], float]] = {
            f"{length} tokens, {way}": partial(run, path, length, settings, options, found)
            for length in options.lengths
            for way, settings in ways.items()
        }
        samples = interleave(work, options.repetitions)
        conditions = model_under_test.conditions(options, path)
    print(
        f"prefill, {model_under_test.name(options)}, {conditions['layers']} layers, "
        f"{conditions['bits']} bits, "
        f"chunks of {options.chunk}, bank {bank:.2f} of {gigabytes:.2f} GB, page cache "
        f"{conditions['page_cache']}, median of {options.repetitions} interleaved"
    )
    print(f"{'':26}{'tokens/s':>10}{'spread':>9}{'MB/token':>10}{'times read':>12}  same bits")
    right = True
    for name, speed in samples.items():
        length = int(name.split()[0])
        one = found[f"{length} {next(iter(ways.values()))}"]
        this = found[f"{length} {ways[name.rpartition(', ')[2]]}"]
        equal = np.array_equal(one["logits"], this["logits"])
        right &= equal
        nbytes = this["read_nbytes"] / length
        times = this["misses"] / max(1, this["distinct"])
        print(
            f"{name:26}{speed.median:>10.2f}{speed.spread:>9.2f}{nbytes / 1e6:>10.1f}"
            f"{times:>12.2f}  {'yes' if equal else 'NO'}"
        )
        record(
            options.json,
            benchmark="prefill",
            case=f"{model_under_test.name(options)}, {length} tokens",
            variant=name.rpartition(", ")[2],
            value=speed.median,
            unit="tokens/s",
            repetitions=len(speed),
            spread=speed.spread,
            read_nbytes_per_token=nbytes,
            times_read=times,
            logits_equal=bool(equal),
            threads=options.threads,
            bank_gb=bank,
            **conditions,
        )
    return 0 if right else 1


def run(
    path: Path,
    length: int,
    settings: dict[str, Any],
    options: argparse.Namespace,
    found: dict[str, dict[str, Any]],
) -> float:
    """Tokens per second of one prompt in a fresh engine."""
    if options.cold:
        model_under_test.chill(path)
    asked = argparse.Namespace(**vars(options))
    asked.prompt, asked.tokens, asked.prefill_chunk = length, 0, options.chunk
    logits: list[np.ndarray] = []
    needed: set[tuple[int, int]] = set()

    def note(result: Any, where: str) -> None:
        layer = int(where.split(".")[1])
        needed.update((layer, int(expert)) for expert in np.unique(np.array(result.experts)))

    with fl.load(path, **settings) as engine:
        phases = engine._thread.call(lambda: measure(engine, asked, logits.append))
    if f"{length} {settings}" not in found:
        with fl.load(path, **settings) as engine, engine.intercept("layers.*.router", note):
            engine._thread.call(lambda: measure(engine, asked))
    before = found.get(f"{length} {settings}", {"distinct": len(needed)})
    found[f"{length} {settings}"] = {
        **phases["prefill"],
        "logits": logits[-1],
        "distinct": before["distinct"],
    }
    return phases["prefill"]["tokens_per_second"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model_under_test.add_options(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--chunk", type=int, default=512, help="tokens that go through together")
    parser.add_argument("--bank-gb", type=float, help="default: a quarter of the experts")
    parser.add_argument("--reader", default="direct")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--split", type=int, default=1)
    parser.add_argument("--streamed-only", action="store_true", help="no resident run")
    parser.set_defaults(num_experts_per_tok=None, warmup=False)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
