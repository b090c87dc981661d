"""Tune: which reader and which kernels are fastest on this machine, measured and not assumed.

Readers are timed on the checkpoint's own blocks, out of an emptied page cache, and what they bring
is compared with the file; kernels are timed on its experts and held to the float64 reference. What
is wrong is never chosen, however fast. The table is kept in the user's cache directory, and
`recommended` finds it again; nothing is changed behind anybody's back.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.checkpoint.layer_file import LayerFile
from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.checkpoint.quantize import dequantize_reference
from flashmoe_lab.storage.blocks import BlockBatch
from flashmoe_lab.storage.page_cache import evict
from flashmoe_lab.storage.slot_pool import SlotPool
from flashmoe_lab.storage.ways import READERS, open_reader
from flashmoe_lab.user_cache import make_directory, user_cache_directory

THREADS = (1, 2, 4, 8, 16)
SPLITS = (1, 4)
LARGEST_ERROR = 1e-3  # relative rms of an expert's output that a default may have
_FILE = "tuning.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that was measured.

    Attributes:
        kind: "reader" or "kernels".
        name: "direct, 4 threads, split 1", or one of kernels.KERNELS.
        settings: what the engine would be given for it.
        speed: GB/s, the median.
        error: relative rms against the reference; of a reader 0 where every byte was right, else 1.
        cached_nbytes: of a reader, what the page cache still held after it was emptied, the most.
    """

    kind: str
    name: str
    settings: dict[str, Any]
    speed: float
    error: float
    cached_nbytes: int = 0

    @property
    def right(self) -> bool:
        """Whether it may be chosen."""
        return self.error <= (LARGEST_ERROR if self.kind == "kernels" else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """All rows of one machine and one kind of experts."""

    key: str
    rows: tuple[Row, ...]

    def best(self, kind: str) -> Row:
        """The fastest right one.

        Raises:
            ValueError: none is right.
        """
        right = [row for row in self.rows if row.kind == kind and row.right]
        if not right:
            raise ValueError(f"no {kind} of this machine gives right results")
        return max(right, key=lambda row: row.speed)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the engine: `fl.load(path, **tuning.settings)`."""
        return dict(self.best("reader").settings)

    @property
    def kernels(self) -> str:
        """For `kernels.use`."""
        return self.best("kernels").name

    def table(self) -> str:
        """What was measured, the chosen ones marked."""
        lines = [self.key]
        for kind in ("reader", "kernels"):
            rows = [row for row in self.rows if row.kind == kind]
            for row in sorted(rows, key=lambda row: -row.speed):
                mark = "*" if row is self.best(kind) else " "
                note = "" if row.right else "  WRONG, not to be chosen"
                if kind == "kernels":
                    note = f"  error {row.error:.1e}{note}"
                if row.cached_nbytes:
                    note += f"  not cold: {row.cached_nbytes:,} bytes stayed in the page cache"
                lines.append(f"{mark} {kind:8}{row.name:32}{row.speed:>8.2f} GB/s{note}")
        return "\n".join(lines)


def tune(
    checkpoint: PackedCheckpoint,
    *,
    threads: Sequence[int] = THREADS,
    splits: Sequence[int] = SPLITS,
    repetitions: int = 3,
    told: Callable[[str], None] = lambda what: None,
) -> Tuning:
    """Measure everything on a checkpoint's first layer and keep the table.

    Args:
        repetitions: of each measurement; the median counts.
        told: of each thing before it is measured.
    """
    layer = checkpoint.layers[0]
    rows = list(_readers(layer, checkpoint, threads, splits, repetitions, told))
    rows += _kernels(layer, checkpoint, repetitions, told)
    found = Tuning(key=key_of(checkpoint), rows=tuple(rows))
    _keep(found)
    return found


def recommended(checkpoint: PackedCheckpoint) -> Tuning | None:
    """What was measured here for such experts, or None."""
    entry = _kept().get(key_of(checkpoint))
    if entry is None:
        return None
    return Tuning(key=key_of(checkpoint), rows=tuple(Row(**row) for row in entry))


def key_of(checkpoint: PackedCheckpoint) -> str:
    """Machine, backend, and what is read: a table is of use only for the same."""
    where = os.stat(checkpoint.path).st_dev
    layout = checkpoint.layers[0].layout
    parts = (
        platform.node(),
        platform.machine(),
        f"{os.cpu_count()} processors",
        native.isa() or "no native kernels",
        str(mx.default_device()),
        f"disk {where}",
        f"{layout.label}, blocks of {layout.block_nbytes} bytes",
    )
    return "; ".join(parts)


# Readers


def _readers(
    layer: LayerFile,
    checkpoint: PackedCheckpoint,
    threads: Sequence[int],
    splits: Sequence[int],
    repetitions: int,
    told: Callable[[str], None],
) -> Iterator[Row]:
    count = min(layer.num_experts, checkpoint.config.num_experts_per_tok)
    form = "block" if mx.default_device() == mx.cpu else "stacked"
    pool = SlotPool(layer.layout, count, form)
    for name, number, split in product(READERS, threads, splits):
        if name == "mmap" and (number != threads[0] or split != splits[0]):
            continue  # is there to compare, not to be tuned
        settings = {"reader": name, "threads": number, "split": split}
        told(f"{name}, {number} threads, split {split}")
        speed, right, cached = _read(layer, pool, settings, repetitions)
        yield Row(
            kind="reader",
            name=f"{name}, {number} threads, split {split}",
            settings=settings,
            speed=speed,
            error=0.0 if right else 1.0,
            cached_nbytes=cached,
        )


def _read(
    layer: LayerFile, pool: SlotPool, settings: dict[str, Any], repetitions: int
) -> tuple[float, bool, int]:
    rng, speeds, right, cached = np.random.default_rng(0), list[float](), True, 0
    with open_reader(
        settings["reader"],
        {layer.layer: layer.path},
        threads=settings["threads"],
        split=settings["split"],
        staged=pool.form == "stacked",
    ) as reader:
        for _ in range(repetitions):
            cached = max(cached, evict(layer.path))
            rounds = max(1, min(8, layer.num_experts // pool.slots))
            order = rng.permutation(layer.num_experts)[: rounds * pool.slots]
            seconds = 0.0
            for experts in np.sort(order.reshape(rounds, -1), axis=1):
                batch = BlockBatch(
                    layer=layer.layer,
                    experts=experts,
                    offsets=layer.offset(0) + experts * layer.layout.block_nbytes,
                    addresses=pool.addresses(range(pool.slots)),
                    part_nbytes=pool.part_nbytes,
                    owner=pool,
                )
                start = time.perf_counter()
                reader.read(batch)
                seconds += time.perf_counter() - start
            speeds.append(order.size * layer.layout.block_nbytes / seconds / 1e9)
            right &= _equal(layer, pool, np.sort(order.reshape(rounds, -1), axis=1)[-1])
    return statistics.median(speeds), right, cached


def _equal(layer: LayerFile, pool: SlotPool, experts: np.ndarray) -> bool:
    payload = layer.layout.payload_nbytes
    return all(
        np.array_equal(pool.block(slot)[:payload], layer.read_block(int(expert))[:payload])
        for slot, expert in enumerate(experts)
    )


# Kernels


def _kernels(
    layer: LayerFile,
    checkpoint: PackedCheckpoint,
    repetitions: int,
    told: Callable[[str], None],
) -> Iterator[Row]:
    on_cpu = mx.default_device() == mx.cpu
    count = min(layer.num_experts, checkpoint.config.num_experts_per_tok)
    pool = SlotPool(layer.layout, count, "block" if on_cpu else "stacked")
    with open_reader("pread", {layer.layer: layer.path}) as reader:
        experts = np.arange(count)
        reader.read(
            BlockBatch(
                layer=layer.layer,
                experts=experts,
                offsets=layer.offset(0) + experts * layer.layout.block_nbytes,
                addresses=pool.addresses(range(count)),
                part_nbytes=pool.part_nbytes,
                owner=pool,
            )
        )
    hidden = checkpoint.config.hidden_size
    x = np.random.default_rng(0).normal(size=(1, hidden)).astype(np.float32)
    expected = np.concatenate(
        [
            kernels.expert_mlp_reference(x.astype(np.float64), _matrices(layer, e))
            for e in range(count)
        ]
    )
    names = [n for n in kernels.KERNELS if n == "mlx" or (on_cpu and native.available)]
    before = kernels.used()
    try:
        for name in names:
            told(f"kernels {name}")
            kernels.use(name)
            yield _run(name, pool, x, expected, repetitions)
    finally:
        kernels.use(before)


def _run(name: str, pool: SlotPool, x: np.ndarray, expected: np.ndarray, repetitions: int) -> Row:
    weights = kernels.ExpertWeights(
        components=pool.components, quantization=pool.layout.quantization
    )
    pairs, slots = np.zeros(pool.slots, np.int64), np.arange(pool.slots)
    row, seconds, out = mx.array(x), list[float](), np.zeros_like(expected)
    for _ in range(repetitions + 1):  # the first wakes threads and compiles
        start = time.perf_counter()
        out = np.array(kernels.expert_mlp(row, pairs, slots, weights).astype(mx.float32))
        seconds.append(time.perf_counter() - start)
    error = float(np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2)))
    return Row(
        kind="kernels",
        name=name,
        settings={},
        speed=pool.slots * pool.layout.payload_nbytes / statistics.median(seconds[1:]) / 1e9,
        error=error if np.isfinite(error) else 1.0,
    )


def _matrices(layer: LayerFile, expert: int) -> dict[str, np.ndarray]:
    parts = layer.layout.split(layer.read_block(expert))
    quantization = layer.layout.quantization
    if quantization is None:
        return {p: part["weight"].float32().astype(np.float64) for p, part in parts.items()}
    return {
        p: dequantize_reference(
            part["weight"].data, part["scales"].float32(), part["biases"].float32(), quantization
        )
        for p, part in parts.items()
    }


# Keeping


def _place() -> Path:
    return user_cache_directory() / _FILE


def _kept() -> dict[str, Any]:
    try:
        found = json.loads(_place().read_text())
    except (OSError, ValueError):
        return {}  # none yet, or a damaged one: it can be measured again
    return found if isinstance(found, dict) else {}


def _keep(tuning: Tuning) -> None:
    make_directory(_place().parent)
    entries = _kept() | {tuning.key: [asdict(row) for row in tuning.rows]}
    temporary = _place().with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(json.dumps(entries, indent=1))
    temporary.replace(_place())
