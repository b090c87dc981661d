"""What benchmarks say of the page cache, threads and the bytes they read is so."""

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from flashmoe_lab import native
from flashmoe_lab.storage.ways import PreadReader

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
NAMES = ("decode", "emptied", "model_under_test", "peers", "storage")
sys.path.insert(0, BENCHMARKS)
decode, emptied, model_under_test, peers, storage = map(importlib.import_module, NAMES)
sys.path.remove(BENCHMARKS)
NBYTES = 4096


@pytest.fixture
def bench(tmp_path):
    file = tmp_path / "blocks"
    file.write_bytes(np.random.default_rng(0).bytes(9 * NBYTES))
    return storage.Bench(file, argparse.Namespace(block_nbytes=NBYTES, first=0, batch=4, batches=2))


def case(cold=False):
    return storage.Case(way="python pread", threads=1, split=1, cold=cold)


def test_a_file_that_stays_is_not_called_cold(bench, monkeypatch):
    monkeypatch.setattr(emptied, "evict", lambda file: 4096)
    with pytest.raises(SystemExit, match="blocks: 4,096 bytes stay in the page cache"):
        bench.measure(case(cold=True))
    folder = bench.file.parent / "experts"
    folder.mkdir()
    (folder / "layer").touch()
    with pytest.raises(SystemExit, match="layer: 4,096 bytes stay"):
        model_under_test.chill(folder.parent)


def test_the_opening_read_is_of_no_timed_block(bench):
    for _ in range(20):
        first, chosen = bench.choose()
        assert chosen.shape == (2, 4)
        assert len({*first.tolist(), *chosen.ravel().tolist()}) == 9


@pytest.mark.parametrize("batch", [1, 2])
def test_every_block_is_compared(bench, monkeypatch, batch):
    """One wrong byte in the first or the second batch."""
    real, reads = PreadReader.read, []

    def damaged(self, blocks):
        records = real(self, blocks)
        reads.append(len(blocks))
        if len(reads) == batch:
            bench.memory[NBYTES + 5] ^= 1
        return records

    monkeypatch.setattr(PreadReader, "read", damaged)
    with pytest.raises(AssertionError, match="was not read right"):
        bench.measure(case())


def test_warm_means_in_the_page_cache(packed, monkeypatch):
    options = argparse.Namespace(model=packed("golden/hf"), cold=False)
    with model_under_test.opened(options) as path:
        assert model_under_test.conditions(options, path)["page_cache"] == "warm"
    monkeypatch.setattr(model_under_test, "resident_bytes", lambda file: 0)
    assert model_under_test.conditions(options, path)["page_cache"] == "0% warm"


@pytest.mark.parametrize("cold", [True, False])
def test_no_warm_up_token_after_the_cache_was_emptied(monkeypatch, cold):
    monkeypatch.setattr(sys, "argv", ["decode.py", *(["--cold"] if cold else [])])
    assert decode._options().warmup is not cold


def test_threads_are_each_programs_own():
    options = argparse.Namespace(threads=77)
    names = ("llama.cpp", "llama.cpp, repacked", "flashmoe_lab", "mlx-lm")
    found = [peers._threads(options, name) for name in names]
    assert found == [77, 77, native.threads(), None]
