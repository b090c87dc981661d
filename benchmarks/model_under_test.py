"""The packed model that a benchmark measures: one that is given, or a synthetic one."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emptied import empty

import flashmoe_lab as fl
from flashmoe_lab.checkpoint.synthetic import SyntheticSource
from flashmoe_lab.config import geometries, read_json
from flashmoe_lab.storage.page_cache import resident_bytes, warm

TINY = Path(__file__).parents[1] / "data" / "tiny.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What says which model, and how often."""
    parser.add_argument("--model", type=Path, help="a packed checkpoint instead of a synthetic one")
    parser.add_argument(
        "--geometry",
        choices=["tiny", *geometries()],
        help="default tiny; of --model: what it is called",
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each run")
    parser.add_argument("--json", type=Path, help="append one line a case to this file")


def name(options: argparse.Namespace) -> str:
    """What the model is called in tables and lines."""
    return options.geometry or (options.model.name if options.model else "tiny")


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[Path]:
    """The packed directory, in the page cache unless `cold`; a synthetic one is deleted
    afterwards."""
    if options.model is not None:
        _warm(options, options.model)
        yield options.model
        return
    with tempfile.TemporaryDirectory() as folder:
        config = geometries().get(name(options)) or read_json(TINY)
        quantization = fl.Quantization(bits=options.bits)
        source = SyntheticSource(config, options.layers, quantization, options.seed)
        path = Path(folder) / "packed"
        fl.pack(fl.PackPlan.make(source, path, fl.PackSettings.of(None)))
        _warm(options, path)
        yield path


def chill(path: Path) -> None:
    """Drop the experts from the page cache; stops everything where some stay."""
    empty((path / "experts").iterdir())


def _warm(options: argparse.Namespace, path: Path) -> None:
    if not options.cold:
        for file in (path / "experts").iterdir():
            warm(file)


def conditions(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What a line says about the model; K is its own."""
    checkpoint = fl.PackedCheckpoint(path)
    quantization = checkpoint.layers[0].layout.quantization
    return {
        "K": checkpoint.config.num_experts_per_tok,
        "bits": quantization.bits if quantization else None,
        "layers": checkpoint.config.num_hidden_layers,
        "page_cache": "emptied before each run" if options.cold else _warmth(path),
    }


def _warmth(path: Path) -> str:
    files = list((path / "experts").iterdir())
    share = sum(map(resident_bytes, files)) / sum(file.stat().st_size for file in files)
    return "warm" if share > 0.999 else f"{share:.0%} warm"
