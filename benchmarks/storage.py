"""How fast expert blocks come from storage: readers x threads x split, cold and warm.

Each reader reads batches of K random blocks, as a layer of a decode step does, and waits for each
batch. Beside them stand raw direct reads of the same blocks: threads that each loop over
preadv(2) with O_DIRECT, with no batches to wait for, which is what the device gives. Before a
reader is timed it reads blocks that are compared with the file, each one; of what is timed the last
batch is. "cold" empties the page cache of the file before each
repetition; direct reads never use it. The order is interleaved and reversed every second time.

    python benchmarks/storage.py               a file of 1 GB, blocks as the 397B's at 4 bits
    python benchmarks/storage.py --file packed/experts/layer_00.safetensors --threads 2 4 8 16
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from emptied import empty
from interleave import interleave
from record import record

from flashmoe_lab.storage import native_crew
from flashmoe_lab.storage.blocks import BlockBatch
from flashmoe_lab.storage.page_cache import resident_bytes, warm
from flashmoe_lab.storage.reader import Reader
from flashmoe_lab.storage.ways import open_reader

BLOCK_NBYTES = 7_077_888  # an expert of the 397B at 4 bits
HUGE_PAGE = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way of reading: "native direct", "python pread", or "raw" for the device itself."""

    way: str
    threads: int
    split: int
    cold: bool

    @property
    def name(self) -> str:
        """What tables call it."""
        cache = "cold" if self.cold else "warm"
        return f"{self.way}, {self.threads} threads, split {self.split}, {cache}"


class Bench:
    """A file of blocks and the memory that they are read into."""

    def __init__(self, file: Path, options: argparse.Namespace) -> None:
        self.file, self.options = file, options
        self.block_nbytes = options.block_nbytes
        self.blocks = (file.stat().st_size - options.first) // self.block_nbytes
        if self.blocks < 2:
            raise SystemExit(f"{file}: it has {self.blocks} blocks; 2 are the least")
        self.batch = min(options.batch, self.blocks - 1)
        self.checked: set[str] = set()
        self.memory = aligned_memory(self.batch * self.block_nbytes)
        self.rng = np.random.default_rng(0)

    def choose(self) -> tuple[np.ndarray, np.ndarray]:
        """One block to open the file with, and those of a repetition, [batches, batch]; no block
        twice, so none is warm by itself."""
        count = min((self.blocks - 1) // self.batch, max(1, self.options.batches))
        order = self.rng.permutation(self.blocks)[: 1 + count * self.batch]
        return order[:1], order[1:].reshape(count, -1)

    def batch_of(self, blocks: np.ndarray) -> BlockBatch:
        """Blocks to read into the memory, one after another."""
        addresses = self.memory.ctypes.data + np.arange(len(blocks)) * self.block_nbytes
        return BlockBatch(
            layer=0,
            experts=np.sort(blocks),
            offsets=self.options.first + np.sort(blocks) * self.block_nbytes,
            addresses=addresses.astype(np.uint64)[:, None],
            part_nbytes=np.array([self.block_nbytes], np.uint64),
            owner=self.memory,
        )

    def measure(self, case: Case) -> float:
        """Gigabytes per second of one repetition."""
        first, chosen = self.choose()
        if case.way != "raw" and case.name not in self.checked:
            with self._reader(case) as reader:
                self._read_checked(reader, chosen)
            self.checked.add(case.name)
        if case.cold:
            empty([self.file])
        else:
            warm(self.file)
        if case.way == "raw":
            took = raw_direct(self.file, self.options.first, self.block_nbytes, chosen, case)
        else:
            with self._reader(case) as reader:
                took = self._read(reader, first, chosen)
        return chosen.size * self.block_nbytes / took / 1e9

    def _reader(self, case: Case) -> Reader:
        crew, _, way = case.way.partition(" ")
        settings = {"threads": case.threads, "split": case.split, "native": crew == "native"}
        return open_reader(way, {0: self.file}, **settings)

    def _read_checked(self, reader: Reader, chosen: np.ndarray) -> None:
        for blocks in chosen:
            self.memory[:] = 0
            reader.read(self.batch_of(blocks))
            self._check(np.sort(blocks))

    def _read(self, reader: Reader, first: np.ndarray, chosen: np.ndarray) -> float:
        reader.read(self.batch_of(first))  # opens the file and wakes the threads
        start = time.perf_counter()
        for blocks in chosen:
            reader.read(self.batch_of(blocks))
        took = time.perf_counter() - start
        self._check(np.sort(chosen[-1]))
        return took

    def _check(self, blocks: np.ndarray) -> None:
        found = self.memory.reshape(self.batch, -1)
        with self.file.open("rb") as stream:
            for place, block in enumerate(blocks):
                stream.seek(self.options.first + int(block) * self.block_nbytes)
                if stream.read(self.block_nbytes) != found[place].tobytes():
                    raise AssertionError(f"block {block} was not read right")


def aligned_memory(nbytes: int) -> np.ndarray:
    """Memory on a huge page's boundary that was touched, so that no read pays for its pages."""
    raw = np.ones(nbytes + HUGE_PAGE, np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    return raw[start : start + nbytes]


def raw_direct(file: Path, first: int, nbytes: int, chosen: np.ndarray, case: Case) -> float:
    """Seconds for the same blocks by plain threads over O_DIRECT, each taking the next block."""
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    blocks = iter(np.sort(chosen, axis=1).ravel().tolist())
    memories = [memoryview(aligned_memory(nbytes)) for _ in range(case.threads)]
    lock = threading.Lock()

    def loop(memory: memoryview) -> None:
        while True:
            with lock:
                block = next(blocks, None)
            if block is None:
                return
            got = os.preadv(fd, [memory], first + block * nbytes)
            if got != nbytes:
                raise AssertionError(f"raw read of block {block} got {got} of {nbytes} bytes")

    threads = [threading.Thread(target=loop, args=(memory,)) for memory in memories]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    os.close(fd)
    return took


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Raw reads at every thread count, then every way, threads and split."""
    cases = [Case(way="raw", threads=t, split=1, cold=True) for t in options.threads]
    ways = [f"python {way}" for way in options.readers]
    if native_crew.is_built():
        ways = [f"native {way}" for way in options.readers] + ways
    for way in ways:
        for threads in options.threads:
            for split in options.split:
                if not options.warm_only:
                    cases.append(Case(way=way, threads=threads, split=split, cold=True))
                if way.endswith("pread"):
                    cases.append(Case(way=way, threads=threads, split=split, cold=False))
    return cases


def main() -> int:
    """Measure, print a table, append lines."""
    options = _options()
    with tempfile.TemporaryDirectory() if options.file is None else nullcontext() as folder:
        file = options.file or make_file(Path(folder or ".") / "blocks", options)
        bench = Bench(file, options)
        cases = cases_of(options)
        work: dict[str, Callable[[], float]] = {
            case.name: partial(bench.measure, case) for case in cases
        }
        samples = interleave(work, options.repetitions)
        left = resident_bytes(file)
    raw = max(samples[case.name].median for case in cases if case.way == "raw")
    print(
        f"storage: {bench.batch} blocks of {bench.block_nbytes:,} bytes at once, "
        f"{file.stat().st_size / 1e9 if file.exists() else options.gb:.1f} GB file, "
        f"best raw direct reads {raw:.2f} GB/s; median of {options.repetitions} interleaved"
    )
    print(f"{'':44}{'GB/s':>8}{'spread':>8}{'of raw':>8}")
    for case in sorted(cases, key=lambda case: -samples[case.name].median):
        found = samples[case.name]
        print(f"{case.name:44}{found.median:>8.2f}{found.spread:>8.2f}{found.median / raw:>8.2f}")
        record(
            options.json,
            benchmark="storage",
            case=f"{bench.batch} x {bench.block_nbytes} bytes",
            variant=case.name,
            value=found.median,
            unit="GB/s",
            repetitions=len(found),
            spread=found.spread,
            ratio_to="best raw direct reads",
            ratio=found.median / raw,
            K=bench.batch,
            page_cache="emptied before each" if case.cold else "warm",
            threads=case.threads,
            split=case.split,
        )
    print(f"page cache holds {left / 1e9:.2f} GB of the file at the end")
    return 0


def make_file(path: Path, options: argparse.Namespace) -> Path:
    """A file of random bytes, on the disk that temporary files are on."""
    rng = np.random.default_rng(0)
    with path.open("wb") as stream:
        for _ in range(round(options.gb * 1e9) // options.block_nbytes):
            stream.write(rng.bytes(options.block_nbytes))
        os.fsync(stream.fileno())
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, help="read this one instead of a temporary file")
    parser.add_argument("--first", type=int, default=16384, help="where its first block begins")
    parser.add_argument("--gb", type=float, default=1.0, help="size of a temporary file")
    parser.add_argument("--block-nbytes", type=int, default=BLOCK_NBYTES)
    parser.add_argument("--batch", type=int, default=10, help="blocks at once (K)")
    parser.add_argument("--batches", type=int, default=14, help="batches a repetition, at the most")
    parser.add_argument("--readers", nargs="+", default=["direct", "pread"])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--split", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--warm-only", action="store_true")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append one line a case to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
