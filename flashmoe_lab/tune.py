"""Tune: which reader and which kernels are fastest on this machine, measured and not assumed.

Readers are timed on the checkpoint's own blocks, and what they bring is compared with the file: out
of an emptied page cache, or from a filled one where a run would find it so, because the experts are
small beside this machine's memory (reading.py). Kernels are timed on its experts and held to the
float64 reference. What is wrong is never chosen, however fast. The table is kept (tuning.py):
engines that are opened without naming a reader then take the fastest one. Kernels, which may change
bits, are changed for nobody. `mmap` is there to compare, and is not tuned.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.checkpoint.layer_file import LayerFile
from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.reading import page_cache_holds
from flashmoe_lab.storage.bank import default_capacity_nbytes
from flashmoe_lab.storage.blocks import BlockBatch
from flashmoe_lab.storage.page_cache import evict, warm
from flashmoe_lab.storage.slot_pool import SlotPool
from flashmoe_lab.storage.ways import open_reader
from flashmoe_lab.tuning import Row, Tuning, key_of

READERS = ("pread", "direct")
THREADS = (1, 2, 4, 8, 16)
SPLITS = (1, 4)


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
    cached = page_cache_holds(checkpoint, default_capacity_nbytes(checkpoint.expert_nbytes))
    rows = list(_readers(layer, checkpoint, cached, threads, splits, repetitions, told))
    rows += _kernels(layer, checkpoint, repetitions, told)
    found = Tuning(key=key_of(checkpoint, cached), date=date.today().isoformat(), rows=tuple(rows))
    found.keep()
    return found


# Readers


def _readers(
    layer: LayerFile,
    checkpoint: PackedCheckpoint,
    cached: bool,
    threads: Sequence[int],
    splits: Sequence[int],
    repetitions: int,
    told: Callable[[str], None],
) -> Iterator[Row]:
    count = min(layer.num_experts, checkpoint.config.num_experts_per_tok)
    form = "block" if mx.default_device() == mx.cpu else "stacked"
    pool = SlotPool(layer.layout, count, form)
    for name, number, split in product(READERS, threads, splits):
        settings = {"reader": name, "threads": number, "split": split}
        told(f"{name}, {number} threads, split {split}")
        speed, right, left = _read(layer, pool, settings, cached, repetitions)
        yield Row(
            kind="reader",
            name=f"{name}, {number} threads, split {split}",
            settings=settings,
            speed=speed,
            error=0.0 if right else 1.0,
            cached_nbytes=left,
        )


def _read(
    layer: LayerFile, pool: SlotPool, settings: dict[str, Any], cached: bool, repetitions: int
) -> tuple[float, bool, int]:
    rng, speeds, right, left = np.random.default_rng(0), list[float](), True, 0
    with open_reader(
        settings["reader"],
        {layer.layer: layer.path},
        threads=settings["threads"],
        split=settings["split"],
        staged=pool.form == "stacked",
    ) as reader:
        for _ in range(repetitions):
            if cached:
                warm(layer.path)
            else:
                left = max(left, evict(layer.path))
            rounds = max(1, min(8, layer.num_experts // pool.slots))
            order = rng.permutation(layer.num_experts)[: rounds * pool.slots]
            seconds = 0.0
            groups = np.sort(order.reshape(rounds, -1), axis=1)
            for experts in groups:
                batch = _batch(layer, pool, experts)
                start = time.perf_counter()
                reader.read(batch)
                seconds += time.perf_counter() - start
            speeds.append(order.size * layer.layout.block_nbytes / seconds / 1e9)
            right &= _equal(layer, pool, groups[-1])
    return statistics.median(speeds), right, left


def _batch(layer: LayerFile, pool: SlotPool, experts: np.ndarray) -> BlockBatch:
    """These experts into the first slots of a pool."""
    return BlockBatch(
        layer=layer.layer,
        experts=experts,
        offsets=layer.offset(0) + experts * layer.layout.block_nbytes,
        addresses=pool.addresses(range(len(experts))),
        part_nbytes=pool.part_nbytes,
        owner=pool,
    )


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
        reader.read(_batch(layer, pool, np.arange(count)))
    hidden = checkpoint.config.hidden_size
    x = np.random.default_rng(0).normal(size=(1, hidden)).astype(np.float32)
    x64 = x.astype(np.float64)
    expected = np.concatenate(
        [kernels.expert_mlp_reference(x64, layer.matrices64(e)) for e in range(count)]
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
