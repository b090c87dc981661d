"""Tokens per second of decode, by K, reader and bank.

Settings run in turn, several times over and in reversed order every second time, so that a machine
that warms up or is disturbed does not favour one of them. Beside every speed stand its spread, its
ratio to the resident run of the same K, and whether its logits equal that run's, bit for bit. Reads
through the page cache are warm unless --cold empties it before each run; direct reads are always
cold. A cold run has no warm-up token, which would bring experts back. Tokens are random, so that
experts vary; nothing is sampled.

    python benchmarks/decode.py                                     a small model, a few seconds
    python benchmarks/decode.py --geometry 397b --layers 4 --bank-gb 2 --cold --k 4 10
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import model_under_test
import numpy as np
from interleave import interleave
from one_run import measure
from record import record

import flashmoe_lab as fl


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way of running the model."""

    name: str
    k: int
    settings: dict[str, Any]


@dataclass(slots=True)
class Results:
    """What the runs gave besides their speed."""

    logits: dict[str, np.ndarray] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)


def main() -> int:
    """Measure and print a table; exit code 1 if any logits differ."""
    options = _options()
    with model_under_test.opened(options) as path:
        checkpoint = fl.PackedCheckpoint(path)
        gigabytes = checkpoint.expert_nbytes / 1e9
        bank = options.bank_gb if options.bank_gb is not None else gigabytes / 4
        ks = options.k or [checkpoint.config.num_experts_per_tok]
        cases = [case for k in ks for case in cases_of(k, bank, options)]
        results = Results()
        work: dict[str, Callable[[], float]] = {
            case.name: partial(run, path, case, options, results) for case in cases
        }
        samples = interleave(work, options.repetitions)
        conditions = model_under_test.conditions(options, path)
    print(
        f"decode, {model_under_test.name(options)}, {conditions['layers']} layers, "
        f"{conditions['bits']} bits, "
        f"{gigabytes:.2f} GB of experts, {options.tokens} random tokens, page cache "
        f"{conditions['page_cache']}, median of {options.repetitions} interleaved"
    )
    print(f"{'':26}{'tokens/s':>10}{'spread':>9}{'ratio':>8}{'MB/token':>10}{'hits':>7}  same bits")
    right = True
    for case in cases:
        first = next(c for c in cases if c.k == case.k)
        equal = np.array_equal(results.logits[case.name], results.logits[first.name])
        right &= equal
        speed, found = samples[case.name], results.found[case.name]
        nbytes = found["read_nbytes"] / found["tokens"]
        asked = found["hits"] + found["misses"]
        hits = found["hits"] / asked if asked else 1.0
        ratio = speed.median / samples[first.name].median
        print(
            f"{case.name:26}{speed.median:>10.2f}{speed.spread:>9.2f}{ratio:>8.2f}"
            f"{nbytes / 1e6:>10.1f}{hits:>7.1%}  {'yes' if equal else 'NO'}"
        )
        record(
            options.json,
            benchmark="decode",
            case=f"{model_under_test.name(options)}, K={case.k}",
            variant=case.name,
            value=speed.median,
            unit="tokens/s",
            repetitions=len(speed),
            spread=speed.spread,
            ratio_to=first.name,
            ratio=ratio,
            read_nbytes_per_token=nbytes,
            hit_rate=hits,
            logits_equal=bool(equal),
            threads=options.threads,
            **(conditions | {"K": case.k}),
        )
    return 0 if right else 1


def cases_of(k: int, bank_gb: float, options: argparse.Namespace) -> list[Case]:
    """Resident, then every reader with a bank, then the page cache alone."""
    reading = {"threads": options.threads, "split": options.split}
    settings: dict[str, dict[str, Any]] = (
        {} if options.streamed_only else {"resident": {"resident": True}}
    )
    for reader in options.readers:
        settings[f"bank, {reader}"] = {"bank_gb": bank_gb, "reader": reader, **reading}
    settings["no bank, pread"] = {"bank_gb": 0.0, "reader": "pread", **reading}
    return [Case(name=f"K={k}, {name}", k=k, settings=chosen) for name, chosen in settings.items()]


def run(path: Path, case: Case, options: argparse.Namespace, results: Results) -> float:
    """Tokens per second of one run of a fresh engine."""
    if options.cold:
        model_under_test.chill(path)
    with fl.load(path, num_experts_per_tok=case.k, **case.settings) as engine:
        logits: list[np.ndarray] = []
        found = engine._thread.call(lambda: measure(engine, options, logits.append))
    results.logits[case.name], results.found[case.name] = logits[-1], found["decode"]
    return found["decode"]["tokens_per_second"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model_under_test.add_options(parser)
    parser.add_argument(
        "--k", type=int, nargs="+", help="experts a token; default: the model's own"
    )
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--bank-gb", type=float, help="default: a quarter of the experts")
    parser.add_argument("--readers", nargs="+", default=["pread", "direct", "mmap"])
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--split", type=int, default=1)
    parser.add_argument("--streamed-only", action="store_true", help="no resident run")
    parser.set_defaults(prompt=1, prefill_chunk=512, num_experts_per_tok=None)
    options = parser.parse_args()
    options.warmup = not options.cold
    return options


if __name__ == "__main__":
    sys.exit(main())
