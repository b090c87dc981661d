"""Which reader is taken: what the caller names, what was tuned here, or the rule; the closing line
says which, and no choice changes a bit."""

import errno
import os
import sys

import numpy as np
import pytest

from flashmoe_lab import PackedCheckpoint, reading, tuning
from flashmoe_lab.reading import Reading, choose_reading, page_cache_holds
from flashmoe_lab.tuning import Row, Tuning

IDS = list(range(3, 15))
DIRECT = {"reader": "direct", "threads": 3, "split": 2}
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the rule is of Linux")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(packed):
    return PackedCheckpoint(packed("golden/hf", 4))


@pytest.fixture
def free(monkeypatch):
    """Sets what is free in memory."""
    return lambda nbytes: monkeypatch.setattr(reading, "available_memory_nbytes", lambda: nbytes)


def keep(checkpoint, *, cached=True, error=0.0, **settings):
    row = Row(kind="reader", name="x", settings=settings or DIRECT, speed=1.0, error=error)
    key = tuning.key_of(checkpoint, cached)
    Tuning(key=key, date="2026-11-24", rows=(row,)).keep()


def test_page_cache_must_hold_the_experts_beside_bank_and_residents(checkpoint, free):
    experts, bank = checkpoint.expert_nbytes, 1000
    free(2 * experts + checkpoint.resident_nbytes)
    assert page_cache_holds(checkpoint, None) and page_cache_holds(checkpoint, bank)
    free(experts + checkpoint.resident_nbytes + bank)
    assert page_cache_holds(checkpoint, bank) and not page_cache_holds(checkpoint, bank + 1)
    assert not page_cache_holds(checkpoint, None)
    free(None)
    assert not page_cache_holds(checkpoint, 0)


@ON_LINUX
def test_rule(checkpoint, free, monkeypatch):
    free(1 << 40)
    assert str(choose_reading(checkpoint, 1000)).startswith("pread (8 ")
    free(0)
    found = choose_reading(checkpoint, 1000)
    assert (found.reader, found.threads, found.split) == ("direct", 8, 1)
    assert "cannot hold" in str(found)
    assert choose_reading(checkpoint, 0).reader == "pread"  # direct reads would leave it no cache

    def refuse(path, flags):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(reading.os, "open", refuse)
    assert choose_reading(checkpoint, 1000).reader == "pread"


def test_rule_leaves_unmeasured_systems_alone(checkpoint, free, monkeypatch):
    free(0)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert choose_reading(checkpoint, 1000).reader == "pread"


def test_tuned_where_nothing_is_named(checkpoint, free):
    free(1 << 40)
    keep(checkpoint)
    tuned = Reading(reader="direct", threads=3, split=2, why="tuned 2026-11-24")
    assert choose_reading(checkpoint, 1000) == tuned
    assert choose_reading(checkpoint, 1000, threads=5).why.startswith("untuned")
    named = choose_reading(checkpoint, 1000, "mmap", 4, 1)
    assert named == Reading(reader="mmap", threads=4, split=1)
    assert str(named) == "mmap (4 threads, split 1)"
    assert choose_reading(checkpoint, 0).reader == "pread"
    free(0)  # the page cache is another than it was measured with
    assert not choose_reading(checkpoint, 1000).why.startswith("tuned")


@pytest.mark.parametrize(
    "changed",
    [
        ("platform.node", lambda: "another"),
        ("os.cpu_count", lambda: 99),
        ("native.isa", lambda: "another"),
        ("os.statvfs", lambda path: os.statvfs_result(range(11))),
    ],
    ids=lambda pair: pair[0],
)
def test_tuned_elsewhere(checkpoint, free, monkeypatch, changed):
    free(1 << 40)
    keep(checkpoint)
    assert choose_reading(checkpoint, 1000).why.startswith("tuned")
    monkeypatch.setattr(f"flashmoe_lab.tuning.{changed[0]}", changed[1])
    assert not choose_reading(checkpoint, 1000).why.startswith("tuned")


def test_tuned_for_other_experts_or_wrong(checkpoint, packed, free):
    free(1 << 40)
    keep(PackedCheckpoint(packed("golden/hf", 8)))
    assert not choose_reading(checkpoint, 1000).why.startswith("tuned")
    keep(checkpoint, error=1.0)  # no reader brought the right bytes
    assert not choose_reading(checkpoint, 1000).why.startswith("tuned")


def test_engine_uses_it_and_says_so(packed, open_engine, free):
    path = packed("golden/hf", 4)
    plain = open_engine(path, bank_gb=0.001)
    assert "reader pread (8 threads, split 1; untuned" in plain.generate(IDS, 3).summary.replace(
        "8 Python", "8"
    )
    keep(PackedCheckpoint(path), reader="pread", threads=3, split=2)
    tuned = open_engine(path, bank_gb=0.001)
    run = tuned.stream_generate(IDS, 3, trace="flow").wait()
    assert "split 2; tuned 2026-11-24)" in tuned.summary(run)
    assert (tuned.reader.threads, tuned.reader.split) == (3, 2)
    assert run.trace is not None
    assert (run.trace.facts["threads"], run.trace.facts["split"]) == (3, 2)
    np.testing.assert_array_equal(plain.logits(IDS), tuned.logits(IDS))


def test_threads_of_python_are_named(monkeypatch):
    found = Reading(reader="pread", threads=8, split=1)
    monkeypatch.setattr(reading.native_crew, "is_built", lambda: False)
    assert str(found) == "pread (8 Python threads, split 1)"
    assert "Python" not in str(Reading(reader="mmap", threads=8, split=1))
