"""Tokens per second of decode, by reader and bank, on a synthetic checkpoint.

Settings run in turn, several times over and in reversed order every second time, so that a machine
that warms up or is disturbed does not favour one of them. Beside every speed stand its spread, its
ratio to the first setting of the same run, and whether the generated tokens equal those of the
fully resident run. Reads through the page cache are warm unless --cold empties it before each run;
direct reads are always cold.

    python benchmarks/decode.py                                     a small model, a few seconds
    python benchmarks/decode.py --geometry 397b --layers 4 --bank-gb 2 --cold
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

import flashmoe_lab as fl
from flashmoe_lab.checkpoint.synthetic import SyntheticSource
from flashmoe_lab.config import geometries, read_json
from flashmoe_lab.storage.page_cache import evict

TINY = Path(__file__).parents[1] / "data" / "tiny.json"
PROMPT = "Once upon a time there was a small town by the sea"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way of running the model."""

    name: str
    settings: dict[str, object]


def main() -> int:
    """Measure and print a table; exit code 1 if any tokens differ."""
    options = _options()
    place = tempfile.TemporaryDirectory() if options.model is None else nullcontext(options.model)
    with place as folder:
        path = Path(folder)
        if options.model is None:
            _synthesise(options, path)
        return _measure(options, path)


def _measure(options: argparse.Namespace, path: Path) -> int:
    with fl.load(path, resident=True) as engine:
        right = engine.generate(PROMPT, options.max_tokens).tokens
        gigabytes = engine.checkpoint.expert_nbytes / 1e9
    bank = options.bank_gb if options.bank_gb is not None else gigabytes / 4
    cases = _cases(bank)
    speeds: dict[str, list[float]] = {case.name: [] for case in cases}
    nbytes: dict[str, float] = {}
    equal = dict.fromkeys(speeds, True)
    for repetition in range(options.repetitions):
        for case in cases if repetition % 2 == 0 else cases[::-1]:
            if options.cold:
                for file in (path / "experts").iterdir():
                    evict(file)
            with fl.load(path, **case.settings) as engine:
                run = engine.stream_generate(PROMPT, options.max_tokens).wait()
            speeds[case.name].append(run.stats.decode.tokens_per_second)
            nbytes[case.name] = run.stats.decode.read_nbytes_per_token
            equal[case.name] &= run.tokens == right
    rows = _rows(options, cases, speeds, nbytes, equal)
    _print(options, gigabytes, rows)
    if options.json:
        with options.json.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    return 0 if all(equal.values()) else 1


def _cases(bank_gb: float) -> list[Case]:
    return [
        Case(name="resident", settings={"resident": True}),
        Case(name="bank, pread", settings={"bank_gb": bank_gb}),
        Case(name="bank, direct", settings={"bank_gb": bank_gb, "reader": "direct"}),
        Case(name="bank, mmap", settings={"bank_gb": bank_gb, "reader": "mmap"}),
        Case(name="no bank, pread", settings={"bank_gb": 0.0}),
    ]


def _rows(
    options: argparse.Namespace,
    cases: list[Case],
    speeds: dict[str, list[float]],
    nbytes: dict[str, float],
    equal: dict[str, bool],
) -> list[dict[str, object]]:
    first = statistics.median(speeds[cases[0].name])
    return [
        {
            "benchmark": "decode",
            "case": options.geometry,
            "variant": case.name,
            "value": statistics.median(speeds[case.name]),
            "unit": "tokens/s",
            "repetitions": len(speeds[case.name]),
            "spread": max(speeds[case.name]) - min(speeds[case.name]),
            "ratio_to": cases[0].name,
            "ratio": statistics.median(speeds[case.name]) / first,
            "read_nbytes_per_token": nbytes[case.name],
            "tokens_equal_resident": equal[case.name],
            "page_cache": "emptied before each run" if options.cold else "warm",
            "layers": options.layers,
            "bits": options.bits,
            "machine": f"{platform.machine()} {platform.system()}, MLX on {mx.default_device()}",
            "version": fl.__version__,
        }
        for case in cases
    ]


def _print(options: argparse.Namespace, gigabytes: float, rows: list[dict[str, object]]) -> None:
    print(
        f"decode, {options.geometry}, {options.layers} layers, {options.bits} bits, "
        f"{gigabytes:.2f} GB of experts, K = the model's own, {options.max_tokens} tokens, "
        f"page cache {rows[0]['page_cache']}, {rows[0]['machine']}, "
        f"median of {options.repetitions} interleaved"
    )
    print(f"{'':16}{'tokens/s':>10}{'spread':>9}{'ratio':>8}{'MB/token':>10}  same tokens")
    for row in rows:
        same = "yes" if row["tokens_equal_resident"] else "NO"
        print(
            f"{row['variant']:16}{row['value']:>10.2f}{row['spread']:>9.2f}{row['ratio']:>8.2f}"
            f"{row['read_nbytes_per_token'] / 1e6:>10.1f}  {same}"  # pyright: ignore
        )


def _synthesise(options: argparse.Namespace, path: Path) -> None:
    config = geometries().get(options.geometry) or read_json(TINY)
    quantization = fl.Quantization(bits=options.bits)
    source = SyntheticSource(config, options.layers, quantization, options.seed)
    path.rmdir()
    fl.pack(fl.PackPlan.make(source, path, fl.PackSettings.of(None)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a packed checkpoint instead of a synthetic one")
    parser.add_argument("--geometry", default="tiny", choices=["tiny", *geometries()])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--bank-gb", type=float, help="default: a quarter of the experts")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--json", type=Path, help="append one line a case to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
