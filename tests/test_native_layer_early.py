"""A long chunk's experts are begun to be read while its later tokens are still on their way to the
router: the same bits, the same reads, the same bank afterwards, and nothing read for a router that
may be overruled."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import PackedCheckpoint, kernels, native_layer
from flashmoe_lab.stages.expert_fetch import ExpertFetch
from flashmoe_lab.storage.blocks import ReadError
from flashmoe_lab.storage.ways import PreadReader

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu or not kernels.native.available, reason="native on a CPU only"
)


class Listed(PreadReader):
    """Calls itself direct, wherever it reads, and notes what it is asked for."""

    name = "direct"

    def __init__(self, paths, **settings):
        super().__init__(paths, **settings)
        self.asked: list[tuple[int, list[int]]] = []
        self.fails = False

    def submit(self, reads):
        if self.fails:
            raise ReadError("the disk is gone")
        self.asked.append((reads[0].layer, [read.expert for read in reads]))
        return super().submit(reads)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(native_layer, "_FIRST_PART", 1)


@pytest.fixture
def path(packed):
    return packed("golden/hf")


@pytest.fixture
def make(path, make_model):
    """`make(slots)`: a model whose reader is listed."""
    layers = PackedCheckpoint(path).layers
    readers = []

    def make(slots):
        model = make_model(path, capacity=slots * layers[0].layout.block_nbytes)
        readers.append(Listed({layer.layer: layer.path for layer in layers}))
        for layer in model.layers:
            layer.fetch.reader = readers[-1]
        return model, readers[-1]

    yield make
    for reader in readers:
        reader.close()


def logits(model, ids, chunk, k=1):
    state = model.empty_state()
    return np.concatenate(
        [np.array(model(ids[i : i + chunk], state, k)) for i in range(0, len(ids), chunk)]
    )


def whole(monkeypatch):
    monkeypatch.setattr(native_layer, "_FIRST_PART", 1000)


@pytest.mark.parametrize("slots", [8, 11, 19, 32])
def test_nothing_but_the_time_is_another(make, sample, monkeypatch, slots):
    ids = sample("golden/hf")[0][:40]
    early, reader = make(slots)
    found = logits(early, ids, 20)
    whole(monkeypatch)
    other, its_reader = make(slots)
    np.testing.assert_array_equal(found, logits(other, ids, 20))
    bank, its_bank = early.layers[0].fetch.bank, other.layers[0].fetch.bank
    assert bank.counts == its_bank.counts and bank.counts.misses
    order, its_order = (list(one._shelves[0].policy) for one in (bank, its_bank))
    assert order == its_order and sorted(order) == sorted(bank.contents())
    assert len(reader.asked) > len(its_reader.asked)
    one, two = (sorted((n, e) for n, es in r.asked for e in es) for r in (reader, its_reader))
    assert one == two


def test_reading_begins_before_the_last_token_is_routed(make, sample, monkeypatch):
    model, reader = make(32)
    begun = []
    refresh = native_layer.NativeLayer._refresh

    def noted(layer):
        refresh(layer)
        block = layer._block

        class Block:
            def before(self, *arguments):
                begun.append((layer._layer.index, len(reader.asked)))
                block.before(*arguments)

        layer._block = Block()

    monkeypatch.setattr(native_layer.NativeLayer, "_refresh", noted)
    logits(model, sample("golden/hf")[0][:20], 20)
    first = [reads for index, reads in begun if index == 0]
    assert first[:2] == [0, 1] and len(first) == 4  # of 1, 2, 4 and 13 tokens


def test_a_bank_without_room_for_a_layer_waits_for_all(make, sample, monkeypatch):
    ids = sample("golden/hf")[0][:20]
    model, reader = make(7)
    logits(model, ids, 20)
    whole(monkeypatch)
    other, its_reader = make(7)
    logits(other, ids, 20)
    assert reader.asked == its_reader.asked


@pytest.mark.parametrize("stage", ["router", "fetch"])
def test_an_intercepted_layer_waits_for_all(make, sample, stage):
    model, reader = make(32)
    with model.intercept(f"layers.1.{stage}", lambda result, path: None):
        logits(model, sample("golden/hf")[0][:20], 20)
    layers = [layer for layer, _ in reader.asked]
    assert layers.count(1) == 1 < layers.count(0)


def test_a_failed_read_is_told_and_forgotten(make, sample):
    model, reader = make(32)
    reader.fails = True
    with pytest.raises(ReadError, match="the disk is gone"):
        logits(model, sample("golden/hf")[0][:20], 20)
    assert model.layers[0].fetch.bank.contents() == []
    reader.fails = False
    expected, _ = make(32)
    ids = sample("golden/hf")[0][:20]
    np.testing.assert_array_equal(logits(model, ids, 20), logits(expected, ids, 20))


def test_what_the_bank_held_is_known_beside_early_reads(make, sample, monkeypatch):
    """Computing with it comes before the first wait, and the record must tell it so."""
    found = []

    def of(self, *arguments):
        found.append(whole_of(self, *arguments))
        return found[-1]

    ids = sample("golden/hf")[0][:20]
    model, _ = make(32)
    logits(model, ids[:2], 2)
    whole_of = ExpertFetch.of
    monkeypatch.setattr(ExpertFetch, "of", of)
    logits(model, ids, 20)
    early = [one for one in found if len(one.landings) > 1]
    assert early and all(one.hits and one.holds_some for one in early)
