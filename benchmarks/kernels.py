"""The native kernels one by one: gigabytes per second beside a plain read of the same bytes.

What is held against a plain read has a working set larger than the last-level cache, or says that
it has not. A matrix and one token are one product of all of it, as the read is one, and then a
product for every 1024 rows, which is what an expert's matrix has: what a call costs by itself is
the difference. Products of many tokens are bound by arithmetic and say multiplications per second
instead; they go through 4096 rows, which the cache may hold. Every case runs in turn with the plain
read, `--repetitions` times, in reversed order every second time; the ratio is the median of those
within a repetition, for memory may change its speed between two. Errors are relative rms against
float64, of every operation; one over its bound ends in exit code 1.

    python benchmarks/kernels.py                        half a gigabyte, a minute or two
    python benchmarks/kernels.py --gigabytes 2 --json results.jsonl
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from interleave import interleave
from kernel_truths import attention_truth, delta_truth
from record import error_rms, record

from flashmoe_lab import Quantization, kernels, native
from flashmoe_lab.checkpoint.quantize import dequantize_reference

COLUMNS, ROWS = 4096, 1024  # of an expert's matrix
VARIANTS = ("native", "native_int")
BOUNDS = {"native": 1e-5, "native_int": 1e-3}  # of the relative rms error


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation: what a repetition does, and how much that is.

    Attributes:
        work: bytes that it must read, or multiplications, in units of 1e9.
        beside: whether a plain read of the same bytes is its measure.
    """

    name: str
    variant: str
    run: Callable[[], Any]
    work: float
    unit: str
    error_rms: float
    beside: bool = True
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether the error is in bounds; NaN is not."""
        return self.error_rms <= BOUNDS[self.variant]


def main() -> int:
    """Measure and print; 1 without native kernels, or where one is wrong."""
    options = _options()
    if not native.available:
        print("flashmoe_lab._native was not built here", file=sys.stderr)
        return 1
    print(f"last-level cache: {last_level_cache() >> 20} MiB")
    right = True
    head = f"{'case':<46}{'variant':<12}{'threads':>8}{'median':>9} {'':<8}{'of a read':>13}"
    print(f"{head}  rms error")
    for threads in options.threads:
        native.set_threads(threads)
        for bits in options.bits:
            matrices = _Matrices(Quantization(bits=bits), options.gigabytes)
            for operation in (matrices.matvec, matrices.matvecs, matrices.matmul):
                cases = [operation(name) for name in VARIANTS]
                right &= _measure(cases, matrices.memory, options)
        experts = _Experts(options.gigabytes)
        right &= _measure([experts.token(name, 10) for name in VARIANTS], experts.memory, options)
        attention = _Attention(32768)
        right &= _measure([attention.decode()], attention.memory, options)
        delta = _Delta(64)
        right &= _measure([delta.decode()], delta.memory, options)
    return 0 if right else 1


def last_level_cache() -> int:
    """Bytes; 0 where the system does not say."""
    found = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        found.append(int(text.rstrip("KM")) * unit)
    return max(found)


def _measure(cases: list[Case], memory: list[np.ndarray], options: argparse.Namespace) -> bool:
    """Run cases in turn with a plain read of `memory`; print, record, and say whether all are
    right."""
    by_name = {case.variant: case for case in cases}

    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def speed_of(case: Case) -> Callable[[], float]:
        return lambda: case.work / timed(case.run)

    runs = {name: speed_of(case) for name, case in by_name.items()}
    nbytes = sum(part.nbytes for part in memory) / 1e9
    cached = cases[0].beside and nbytes * 1e9 <= last_level_cache()

    def plain() -> None:
        for part in memory:
            native.read(part)

    if cases[0].beside:
        runs["read"] = lambda: nbytes / timed(plain)
    for run in runs.values():
        run()
    found = interleave(runs, options.repetitions)
    for name, case in by_name.items():
        speed = found[name]
        ratio = speed.beside(found["read"]).median if case.beside else None
        shown = "" if ratio is None else f"{ratio:.2f} of {found['read'].median:.1f}"
        error = f"{case.error_rms:.1e}" + ("" if case.right else "  WRONG")
        error += "  (its memory fits in the cache)" if cached else ""
        print(
            f"{case.name:<46}{name:<12}{native.threads():>8}{speed.median:>9.1f} "
            f"{case.unit:<8}{shown:>13}  {error}",
            flush=True,
        )
        record(
            options.json,
            benchmark="kernels",
            case=case.name,
            variant=name,
            value=speed.median,
            unit=case.unit,
            repetitions=options.repetitions,
            spread=speed.spread,
            ratio_to="plain read" if case.beside else None,
            ratio=ratio,
            error_rms=case.error_rms,
            threads=native.threads(),
            isa=native.isa(),
            page_cache="not used",
            last_level_cache_nbytes=last_level_cache(),
            **(dict(read_gbps=found["read"].median) if case.beside else {}),
            **case.conditions,
        )
    return all(case.right for case in cases)


class _Matrices:
    """A large matrix of random codes that repeat every ROWS, and tokens that go through it."""

    def __init__(self, quantization: Quantization, gigabytes: float) -> None:
        self.quantization = quantization
        rng, groups = np.random.default_rng(0), COLUMNS // quantization.group_size
        one = quantization.nbytes((ROWS, COLUMNS))
        self._count = max(4, int(gigabytes * 1e9 / one))
        words = COLUMNS * quantization.bits // 32
        codes = np.empty((self._count, ROWS, words), np.uint32)
        first = rng.integers(0, 2**32, (ROWS, words), dtype=np.uint32)
        codes[:] = first
        small = _bfloat16(rng.normal(size=(ROWS, groups)) / 2**quantization.bits / COLUMNS**0.5)
        middle = _bfloat16(-_float(small) * 2 ** (quantization.bits - 1))
        scales, biases = (np.tile(part, (self._count, 1, 1)) for part in (small, middle))
        self.memory = [codes, scales, biases]
        self._truth = dequantize_reference(first, _float(small), _float(middle), quantization)
        self._x = rng.normal(size=(512, COLUMNS)).astype(np.float32)

    def matvec(self, variant: str) -> Case:
        return self._case("dequant_matvec", variant, [self._rows(0, self._count)])

    def matvecs(self, variant: str) -> Case:
        pieces = [self._rows(first, first + 1) for first in range(self._count)]
        return self._case(f"dequant_matvec by {ROWS} rows", variant, pieces)

    def matmul(self, variant: str) -> Case:
        return self._case("dequant_matmul", variant, [self._rows(0, 4)], tokens=512)

    def _rows(self, first: int, last: int) -> Any:
        """A matrix of the pieces `first` to `last`, ROWS each."""
        codes, scales, biases = (
            part[first:last].reshape(-1, part.shape[-1]) for part in self.memory
        )
        return _matrix(codes, scales, biases, self.quantization)

    def _case(self, name: str, variant: str, matrices: list[Any], tokens: int = 1) -> Case:
        q, x = self.quantization, self._x[:tokens]
        rows = matrices[0].rows
        outs = [np.full((tokens, rows), np.nan, np.float32) for _ in matrices]

        def run() -> None:
            kernels.use(variant)
            for matrix, out in zip(matrices, outs, strict=True):
                matrix.product(x, tokens, out)

        run()
        found = np.concatenate(outs, axis=1).reshape(tokens, -1, ROWS)
        truth = (x.astype(np.float64) @ self._truth.T)[:, None]
        nbytes = sum(part.nbytes for part in self.memory)
        one = tokens == 1
        return Case(
            name=f"{name}, {q.bits} bits, group {q.group_size}",
            variant=variant,
            run=run,
            work=nbytes / 1e9 if one else tokens * rows * COLUMNS / 1e9,
            unit="GB/s" if one else "GMAC/s",
            beside=one,
            error_rms=error_rms(found, truth),
            conditions=dict(bits=q.bits, group_size=q.group_size, tokens=tokens),
        )


class _Experts:
    """Experts of the 397B's size in a bank, K at a time."""

    HIDDEN, FFN = 4096, 1024

    def __init__(self, gigabytes: float) -> None:
        rng, quantization = np.random.default_rng(0), Quantization(bits=4)
        self.slots = max(10, int(gigabytes * 1e9 / 7_077_888))
        self.memory: list[np.ndarray] = []
        stacks = []
        for rows, columns in ((self.FFN, self.HIDDEN),) * 2 + ((self.HIDDEN, self.FFN),):
            shape = (self.slots, rows, columns // 64)
            codes = np.empty((self.slots, rows, columns // 8), np.uint32)
            codes[:] = rng.integers(0, 2**32, codes.shape[1:], dtype=np.uint32)
            scales = _bfloat16(np.full(shape, 0.01, np.float32))
            biases = _bfloat16(np.full(shape, -0.08, np.float32))
            self.memory += [codes, scales, biases]
            stacks.append(_matrix(codes, scales, biases, quantization, True))
        self._stacks = tuple(stacks)
        self._x = rng.normal(size=(1, self.HIDDEN)).astype(np.float32)
        self._truth = kernels.expert_mlp_reference(
            self._x.astype(np.float64),
            {
                name: dequantize_reference(
                    codes[0], _float(scales[0]), _float(biases[0]), quantization
                )
                for name, codes, scales, biases in zip(
                    ("gate_proj", "up_proj", "down_proj"),
                    *(self.memory[part::3] for part in range(3)),
                    strict=True,
                )
            },
        )

    def token(self, variant: str, k: int) -> Case:
        zeros = np.zeros(k, np.int64)

        def run() -> None:
            kernels.use(variant)
            for first in range(0, self.slots - k + 1, k):
                native.expert_mlp(self._stacks, self._x, zeros, np.arange(first, first + k))

        kernels.use(variant)
        found = native.expert_mlp(self._stacks, self._x, zeros, np.arange(k))
        return Case(
            name="expert_mlp, 4 bits, 397B",
            variant=variant,
            error_rms=error_rms(found, np.tile(self._truth, (k, 1))),
            run=run,
            work=self.slots // k * k * 7_077_888 / 1e9,
            unit="GB/s",
            conditions=dict(bits=4, K=k),
        )


class _Attention:
    """One token of the 397B's attention over a long cache; its projections are tiny."""

    HEADS, KV_HEADS, DIM = 32, 2, 256

    def __init__(self, length: int) -> None:
        rng, width = np.random.default_rng(0), 64
        sizes = (2 * self.HEADS * self.DIM, self.KV_HEADS * self.DIM, self.KV_HEADS * self.DIM)
        weights = [rng.normal(size=(rows, width)).astype(np.float32) for rows in sizes]
        weights.append(rng.normal(size=(width, self.HEADS * self.DIM)).astype(np.float32))
        ones = np.ones(self.DIM, np.float32)
        self._stage = native.attention(
            *(_plain(weight) for weight in weights), ones, ones, 1e-6, 1e7,
            *(self.HEADS, self.KV_HEADS, self.DIM, 64),
        )  # fmt: skip
        x = rng.normal(size=(64, width)).astype(np.float32)
        caches = [np.zeros((self.KV_HEADS, 256, self.DIM), np.float32) for _ in range(2)]
        out = np.empty_like(x)
        self._stage(x, len(x), 0, *caches, out)
        truth = attention_truth(x, weights, self.HEADS, self.KV_HEADS, self.DIM)
        self.error = error_rms(out, truth)
        self.length = length
        shape = (self.KV_HEADS, length, self.DIM)
        self.memory = [rng.normal(size=shape).astype(np.float32) for _ in range(2)]
        self._x = rng.normal(size=(1, width)).astype(np.float32)

    def decode(self) -> Case:
        out = np.empty_like(self._x)
        return Case(
            name=f"attention, {self.length} keys",
            variant="native",
            error_rms=self.error,
            run=lambda: self._stage(self._x, 1, self.length - 1, *self.memory, out),
            work=sum(part.nbytes for part in self.memory) / 1e9,
            unit="GB/s",
            conditions=dict(context=self.length),
        )


class _Delta:
    """One token through the delta rules of many of the 397B's layers; projections are tiny. The
    states are read and written, so half of a plain read is the best that there is."""

    def __init__(self, layers: int) -> None:
        rng, width, heads, keys, dim = np.random.default_rng(0), 64, 64, 16, 128
        channels, values = 2 * keys * dim + heads * dim, heads * dim
        sizes = (channels, values, heads, heads)
        weights = [rng.normal(size=(rows, width)).astype(np.float32) for rows in sizes]
        weights.append(rng.normal(size=(width, values)).astype(np.float32))
        taps = rng.normal(size=(4, channels)).astype(np.float32)
        small = [np.zeros(heads, np.float32)] * 2 + [np.ones(dim, np.float32)]
        self._stage = native.delta_net(
            *(_plain(weight) for weight in weights), taps, *small, 1e-6, 4, keys, dim, heads, dim
        )
        x = rng.normal(size=(8, width)).astype(np.float32)
        out, inputs = np.empty_like(x), np.zeros((3, channels), np.float32)
        self._stage(x, len(x), inputs, np.zeros((heads, dim, dim), np.float32), out)
        self.error = error_rms(out, delta_truth(x, weights, taps, keys, heads, dim))
        self.memory = [np.zeros((heads, dim, dim), np.float32) for _ in range(layers)]
        self._conv = np.zeros((3, channels), np.float32)
        self._x = rng.normal(size=(1, width)).astype(np.float32)

    def decode(self) -> Case:
        out = np.empty_like(self._x)

        def run() -> None:
            for state in self.memory:
                self._stage(self._x, 1, self._conv, state, out)

        return Case(
            name=f"delta rule, {len(self.memory)} states",
            variant="native",
            error_rms=self.error,
            run=run,
            work=sum(part.nbytes for part in self.memory) / 1e9,
            unit="GB/s",
        )


def _matrix(
    codes: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    quantization: Quantization,
    stacked: bool = False,
) -> Any:
    q = quantization
    return native.raw_matrix(codes, scales, biases, q.bits, q.group_size, "bfloat16", stacked)


def _plain(weight: np.ndarray) -> Any:
    return native.raw_matrix(weight, None, None, 0, 0, "float32")


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _float(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.5, help="working set; default 0.5")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, native.threads()}))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append one object a line to this file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
