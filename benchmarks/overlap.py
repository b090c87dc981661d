"""How much of a streamed token is reading or arithmetic, and what the rest is.

Random tokens go through an engine that starts cold. The run is traced (`flow` adds no waiting), and
the spans and reads of decode are added up to three shares of its wall time, the choosing of tokens
left out:

* busy: a reading thread is in a read, or a kernel runs;
* by stage: for every token, layer and stage, the longer of reading and arithmetic. Experts are
  computed while others are read; mixers, norms, routers and the head stand alone, because nobody
  knows what to read before a layer's router has run. Left out where reads run ahead of it;
* in all: the longer of all reading and all arithmetic, as if either could hide behind the other.

Arithmetic is the time in native calls, with the microseconds of Python around them, or that of
waiting for MLX's device. Engines of several settings take turns; all must choose the same experts
with the same weights.

    python benchmarks/overlap.py --model eight --bank-gb 4.8 --limit-gib 7 --tokens 64 \\
        --settings '{"split": 2}' '{"split": 2, "prefetch": 2}'
"""

import argparse
import hashlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import memory_limit
import model_under_test
import numpy as np
import pandas as pd
from record import record

import flashmoe_lab as fl

SHARES = ("busy", "by stage", "in all")
_OF_NO_PASS = ("sample", "record")


def main() -> int:
    """Measure and print; every repetition is a process of its own, under the limit if there is
    one."""
    options = _options()
    if options.limit_gib is not None and (missing := memory_limit.available()):
        print(f"overlap: no run under a memory limit: {missing}")
        return 0
    with model_under_test.opened(options) as path:
        if options.once:
            print(json.dumps(measure(path, options)))
            return 0
        found = [[] for _ in options.settings]
        turn = list(zip(options.settings, found, strict=True))
        for _ in range(options.repetitions):
            for settings, its in turn:
                model_under_test.chill(path)
                its.append(_in_a_process(path, options, settings))
            turn.reverse()
        for settings, its in zip(options.settings, found, strict=True):
            report(its, found[0], settings, options, path)
    same = len({one["chosen"] for its in found for one in its}) == 1
    print("the same experts with the same weights in all runs" if same else "EXPERTS DIFFER")
    return 0 if same else 1


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run of a fresh engine."""
    with fl.load(path, **options.settings[0]) as engine:
        rng = np.random.default_rng(options.seed)
        first, *rest = rng.integers(0, engine.config.vocab_size, options.tokens + 1).tolist()
        run = engine.stream_generate([first], len(rest) + 1, follow=rest, trace="flow").wait()
        assert run.trace is not None
        conditions = {"K": engine.num_experts_per_tok, "reading": str(engine.reading)}
        return explain(run.trace) | conditions


def explain(trace: fl.Trace) -> dict[str, Any]:
    """The shares, and what a token took of each kind in milliseconds."""
    tokens = trace.tokens[(trace.tokens.phase == "decode") & (trace.tokens.start_ns > 0)]
    spans = trace.spans[trace.spans.token.isin(tokens.token)]
    spans = spans[~spans.stage.isin(_OF_NO_PASS)]
    reads = trace.reads[trace.reads.token.isin(tokens.token) & (trace.reads.nbytes > 0)]
    spans = spans.assign(ns=spans.end_ns - spans.start_ns)
    kernels = spans[spans.lane.isin(["compute", "wait"])]
    wall_ns = int((tokens.end_ns - tokens.start_ns).sum())
    reading_ns = union_ns(reads)
    explained = {
        "busy": union_ns(pd.concat([part[["start_ns", "end_ns"]] for part in (kernels, reads)])),
        "in all": max(reading_ns, int(kernels.ns.sum())),
    }
    if not (reads.wanted == "prefetch").any():
        explained["by stage"] = _longer_by_stage_ns(kernels, reads)
    by_stage = kernels.groupby("stage", observed=True).ns.sum().to_dict()
    waited = spans[spans.lane == "io"].ns.sum()
    kinds = {"wall": wall_ns, "reading": reading_ns, "waiting for reads": waited} | by_stage
    return {
        "tokens_per_second": len(tokens) / wall_ns * 1e9,
        "shares": {name: explained[name] / wall_ns for name in SHARES if name in explained},
        "ms": {str(kind): float(ns) / len(tokens) / 1e6 for kind, ns in kinds.items()},
        "read_nbytes": float(reads.nbytes.sum()) / len(tokens),
        "needless_nbytes": float(reads.nbytes[~reads.used].sum()) / len(tokens),
        "chosen": _digest(trace.routing),
    }


def _digest(routing: pd.DataFrame) -> str:
    rows = routing[["token", "layer", "rank", "expert", "weight"]].to_numpy(np.float64)
    return hashlib.sha256(np.ascontiguousarray(rows)).hexdigest()


def union_ns(spans: pd.DataFrame) -> int:
    """Time in which at least one of the spans runs."""
    ordered = spans.sort_values("start_ns")
    start, end = ordered.start_ns.to_numpy(), ordered.end_ns.to_numpy()
    reached = np.maximum.accumulate(np.concatenate([start[:1], end[:-1]]))
    return int(np.maximum(end - np.maximum(start, reached), 0).sum())


def _longer_by_stage_ns(kernels: pd.DataFrame, reads: pd.DataFrame) -> int:
    groups = reads.groupby(["token", "layer"])
    reading_ns = pd.Series({key: union_ns(group) for key, group in groups}, dtype=np.int64)
    experts = kernels[kernels.stage == "experts"]
    experts_ns = experts.groupby(["token", "layer"]).ns.sum()
    longer = pd.concat([experts_ns, reading_ns], axis=1).fillna(0).max(axis=1)
    return int(longer.sum()) + int(kernels.ns.sum() - experts.ns.sum())


def report(
    found: list[dict[str, Any]],
    first: list[dict[str, Any]],
    settings: dict[str, Any],
    options: argparse.Namespace,
    path: Path,
) -> None:
    """Print medians and append lines; `first` is what the ratio is to."""
    conditions = model_under_test.conditions(options, path)
    limit = "no limit" if options.limit_gib is None else f"{options.limit_gib:g} GiB"
    case = f"{conditions['layers']} layers, {conditions['bits']} bits, {limit}"
    speed, its = (
        statistics.median(one["tokens_per_second"] for one in runs) for runs in (found, first)
    )
    ratio, ahead = speed / its, settings.get("prefetch", 0)
    print(
        f"overlap, {case}, K={found[0]['K']}, bank {options.bank_gb} GB, "
        f"reader {found[0]['reading']}, {ahead} ahead of the router, {options.tokens} random "
        f"tokens, cold: {speed:.2f} tokens/s, {ratio:.2f} of the first"
    )
    kinds = {
        kind: statistics.median(one["ms"].get(kind, 0) for one in found) for kind in _kinds(found)
    }
    rate = found[0]["read_nbytes"] / kinds["reading"] / 1e6
    print("ms a token: " + ", ".join(f"{kind} {ms:.1f}" for kind, ms in kinds.items()))
    needless = statistics.median(one["needless_nbytes"] for one in found)
    print(
        f"{found[0]['read_nbytes'] / 1e6:.0f} MB a token, {needless / 1e6:.0f} of them for "
        f"nothing, {rate:.2f} GB/s while reading"
    )
    for share in found[0]["shares"]:
        values = sorted(one["shares"][share] for one in found)
        middle = statistics.median(values)
        print(f"explained, {share:10}{middle:.3f}  ({values[0]:.3f} to {values[-1]:.3f})")
        record(
            options.json,
            benchmark="overlap",
            case=case,
            variant=share,
            value=middle,
            unit="of the wall time",
            repetitions=len(values),
            spread=(values[-1] - values[0]) / 2,
            bank_gb=options.bank_gb,
            reading=found[0]["reading"],
            tokens=options.tokens,
            tokens_per_second=speed,
            ms_a_token=kinds,
            gb_per_second_while_reading=rate,
            needless_mb_a_token=needless / 1e6,
            prefetch=ahead,
            speed_ratio_to_first=ratio,
            **(conditions | {"K": found[0]["K"]}),
        )


def _kinds(found: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(kind for one in found for kind in one["ms"]))


def _in_a_process(
    path: Path, options: argparse.Namespace, settings: dict[str, Any]
) -> dict[str, Any]:
    settings = settings | {"bank_gb": options.bank_gb}
    command = [sys.executable, __file__, "--once", "--model", str(path)]
    command += ["--tokens", str(options.tokens), "--seed", str(options.seed)]
    command += ["--settings", json.dumps(settings)]
    limit = None if options.limit_gib is None else round(options.limit_gib * (1 << 30))
    done = memory_limit.run(command, limit)
    if done.returncode:
        raise SystemExit(f"overlap: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model_under_test.add_options(parser)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--bank-gb", type=float, help="memory for experts, in 10**9 bytes")
    parser.add_argument("--limit-gib", type=float, help="memory that a run may have; needs root")
    parser.add_argument(
        "--settings", type=json.loads, nargs="+", default=[{}], help="of engines, as JSON"
    )
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(cold=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
