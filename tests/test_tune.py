"""Tuning chooses the fastest of what is right, never what is wrong, and finds its table again."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import PackedCheckpoint, kernels, tune
from flashmoe_lab.cli import main
from flashmoe_lab.storage.ways import PreadReader
from flashmoe_lab.tuning import Row, Tuning, kept_tuning, key_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(packed):
    return PackedCheckpoint(packed("golden/hf", 4))


@pytest.fixture
def cold(monkeypatch):
    """A machine whose page cache cannot hold the experts."""
    monkeypatch.setattr(tune, "page_cache_holds", lambda checkpoint, bank_nbytes: False)


def row(kind, name, speed, error=0.0):
    return Row(kind=kind, name=name, settings={"reader": name}, speed=speed, error=error)


def test_fastest_right_one_is_best():
    rows = (row("reader", "a", 1.0), row("reader", "b", 3.0, 1.0), row("reader", "c", 2.0))
    found = Tuning(key="here", date="2026-11-24", rows=(*rows, row("kernels", "mlx", 1.0, 1e-6)))
    assert found.best("reader").name == "c"
    assert found.settings == {"reader": "c"} and found.kernels == "mlx"
    assert "* reader  c" in found.table() and "WRONG" in found.table().splitlines()[1]


@pytest.mark.parametrize("error, right", [(1e-3, True), (1.1e-3, False), (1.0, False)])
def test_kernels_may_err_a_little(error, right):
    assert row("kernels", "x", 1.0, error).right is right


def test_none_is_right():
    with pytest.raises(ValueError, match="no reader of this machine gives right results"):
        Tuning(key="here", date="2026-11-24", rows=(row("reader", "a", 1.0, 1.0),)).best("reader")


def test_measured_and_found_again(checkpoint):
    assert kept_tuning(checkpoint, cached=True) is None
    before = kernels.used()
    found = tune.tune(checkpoint, threads=(2,), splits=(1, 3), repetitions=1)
    assert kept_tuning(checkpoint, cached=True) == found
    assert kept_tuning(checkpoint, cached=False) is None  # so tiny a model is in the page cache
    assert kernels.used() == before
    readers = [r for r in found.rows if r.kind == "reader"]
    assert [(r.settings["reader"], r.settings["split"]) for r in readers] == [
        ("pread", 1), ("pread", 3), ("direct", 1), ("direct", 3)
    ]  # fmt: skip
    assert all(r.right and r.speed > 0 for r in readers)
    assert found.settings["threads"] == 2


def test_every_kernel_is_held_to_the_reference(checkpoint):
    found = tune.tune(checkpoint, threads=(1,), splits=(1,), repetitions=1)
    measured = {r.name: r.error for r in found.rows if r.kind == "kernels"}
    assert set(measured) <= set(kernels.KERNELS) and "mlx" in measured
    assert all(error < 1e-4 for error in measured.values())


def test_wrong_kernel_is_not_chosen(checkpoint, monkeypatch):
    def wrong(x, tokens, slots, weights, variant=None):
        return mx.zeros((len(slots), x.shape[1]))

    monkeypatch.setattr(kernels, "expert_mlp", wrong)
    found = tune.tune(checkpoint, threads=(1,), splits=(1,), repetitions=1)
    with pytest.raises(ValueError, match="no kernels"):
        found.best("kernels")


def test_wrong_bytes_are_not_chosen(checkpoint, monkeypatch):
    real = PreadReader.read

    def damaged(self, reads):
        records = real(self, reads)
        np.frombuffer(reads[0].buffers[0], np.uint8)[5] ^= 1
        return records

    monkeypatch.setattr(PreadReader, "read", damaged)
    found = tune.tune(checkpoint, threads=(1,), splits=(1,), repetitions=1)
    wrong = [r.settings["reader"] for r in found.rows if r.kind == "reader" and not r.right]
    assert wrong == ["pread"] and found.settings["reader"] != "pread"


def test_table_of_other_experts_is_not_used(checkpoint, packed):
    tune.tune(checkpoint, threads=(1,), splits=(1,), repetitions=1)
    other = PackedCheckpoint(packed("golden/hf", 8))
    assert kept_tuning(other, cached=True) is None
    tune.tune(other, threads=(1,), splits=(1,), repetitions=1)
    assert kept_tuning(checkpoint, cached=True) is not None  # both are kept


@pytest.mark.parametrize("content", ["{nonsense", "[]", '{"KEY": []}', '{"KEY": {"rows": [{}]}}'])
def test_damaged_table_is_measured_again(checkpoint, cache, content):
    cache.mkdir()
    content = content.replace("KEY", key_of(checkpoint, cached=True))
    (cache / "tuning.json").write_text(content)
    assert kept_tuning(checkpoint, cached=True) is None


def test_command(checkpoint, capsys):
    arguments = ["tune", str(checkpoint.path), "--threads", "2", "--split", "1"]
    assert main([*arguments, "--repetitions", "1"]) == 0
    printed = capsys.readouterr()
    assert "* kernels" in printed.out and "are read with reader=" in printed.out
    assert "tune: pread, 2 threads, split 1" in printed.err


def test_a_cache_that_stays_is_told(checkpoint, cold, monkeypatch):
    """Readers that were not cold say so, in the table that is kept too."""
    left = iter([0, 4096, 0] + 10 * [0])
    monkeypatch.setattr(tune, "evict", lambda path: next(left))
    tune.tune(checkpoint, threads=(1,), splits=(1,), repetitions=3)
    found = kept_tuning(checkpoint, cached=False)
    assert found is not None
    assert [r.cached_nbytes for r in found.rows if r.kind == "reader"] == [4096, 0]
    told = [one for one in found.table().splitlines() if "4,096 bytes stayed" in one]
    assert len(told) == 1


@pytest.mark.parametrize("cached, called", [(True, "warm"), (False, "evict")])
def test_the_page_cache_is_as_runs_will_find_it(checkpoint, monkeypatch, cached, called):
    calls = []
    monkeypatch.setattr(tune, "page_cache_holds", lambda checkpoint, bank_nbytes: cached)
    monkeypatch.setattr(tune, "warm", lambda path: calls.append("warm"))
    monkeypatch.setattr(tune, "evict", lambda path: calls.append("evict") or 0)
    tune.tune(checkpoint, threads=(1,), splits=(1,), repetitions=2)
    assert calls == [called] * 4  # two readers, twice
    assert kept_tuning(checkpoint, cached) is not None
