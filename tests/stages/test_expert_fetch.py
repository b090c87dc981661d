"""The fetch stage: what the router names is in the bank afterwards, or one clear error."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import PackedCheckpoint, Routing
from flashmoe_lab.stages.expert_fetch import ExpertFetch
from flashmoe_lab.storage.bank import ExpertBank
from flashmoe_lab.storage.reader import ReadError
from flashmoe_lab.storage.ways import PreadReader

LAYERS = 4
E = 8


def routing_of(*rows):
    experts = mx.array(rows, mx.int32)
    return Routing(logits=mx.zeros((len(rows), E)), experts=experts, weights=mx.ones(experts.shape))


class FailingReader(PreadReader):
    """Fails for the experts in `bad`, and tells what it was asked for."""

    def __init__(self, paths, **settings):
        super().__init__(paths, **settings)
        self.bad = set()
        self.asked = []

    def submit(self, reads):
        self.asked += [(read.layer, read.expert) for read in reads]
        pending = super().submit([read for read in reads if read.expert not in self.bad])
        if self.bad.intersection(read.expert for read in reads):
            pending.wait()
            raise ReadError("the disk is gone")
        return pending


@pytest.fixture
def reader(packed):
    layers = PackedCheckpoint(packed("golden/hf")).layers
    reader = FailingReader({layer.layer: layer.path for layer in layers}, threads=2, split=3)
    yield reader
    reader.close()


@pytest.fixture
def make(packed, reader):
    """`make(slots)`: the fetch stages of all layers over one bank."""
    layers = PackedCheckpoint(packed("golden/hf")).layers

    def make(slots, form="block"):
        bank = ExpertBank(layers, slots * layers[0].layout.block_nbytes, form=form)
        return [ExpertFetch(layer, bank, reader) for layer in layers]

    return make


@pytest.mark.parametrize("form", ["block", "stacked"])
def test_brings_the_blocks(make, form):
    fetch = make(6, form)[1]
    fetched = fetch(routing_of([4, 1, 7], [1, 0, 4]))
    assert (fetched.hits, fetched.misses, fetched.later) == (0, 4, [])
    pool = fetch.bank.pool(1)
    for expert, slot in fetched.first.slots.items():
        np.testing.assert_array_equal(pool.block(slot), fetch.file.read_block(expert))
    where = fetched.first.slots
    assert fetched.slots.tolist() == [
        [where[4], where[1], where[7]],
        [where[1], where[0], where[4]],
    ]


def test_reads_are_noted(make):
    fetch = make(6)[1]
    fetched = fetch(routing_of([4, 1, 7]))
    nbytes = fetch.file.layout.block_nbytes
    assert {(read.layer, read.expert) for read in fetched.reads} == {(1, 1), (1, 4), (1, 7)}
    assert len(fetched.reads) == 9  # 3 pieces each
    assert fetched.read_nbytes == fetch.bank.counts.read_nbytes == 3 * nbytes
    again = fetch(routing_of([4, 1, 2]))
    assert (again.hits, again.misses, again.read_nbytes) == (2, 1, nbytes)
    assert (fetch.bank.counts.hits, fetch.bank.counts.misses) == (2, 4)


def test_misses_are_read_in_file_order(make, reader):
    make(8)[2](routing_of([7, 0, 3]))
    assert reader.asked == [(2, 0), (2, 3), (2, 7)]


def test_waves(make, reader):
    fetch = make(3)[0]
    fetch(routing_of([6, 2]))
    fetched = fetch(routing_of(list(range(E))))
    assert (fetched.slots >= 0).sum() == 3
    seen = []
    for placement in fetched.waves():
        for expert, slot in placement.slots.items():
            block = fetch.bank.pool(0).block(slot)
            np.testing.assert_array_equal(block, fetch.file.read_block(expert))
        seen.append(sorted(placement.slots))
    assert {2, 6} < set(seen[0])
    assert sorted(sum(seen, [])) == list(range(E))
    assert [len(wave) for wave in seen] == [3, 3, 2]
    assert (fetched.hits, fetched.misses) == (2, 6)
    assert len(reader.asked) == len(set(reader.asked)) == 8  # each expert once
    assert fetched.read_nbytes == 6 * fetch.file.layout.block_nbytes


def test_no_slots_read_every_time(make):
    fetch = make(0)[0]
    for _ in range(2):
        fetched = fetch(routing_of([5]))
        assert (fetched.hits, fetched.misses) == (0, 1)


@pytest.mark.parametrize("slots", [0, 3])
def test_stale_fetch_is_refused(make, slots):
    first, second, *_ = make(slots)
    fetched = first(routing_of([1]))
    list(fetched.waves())
    list(second(routing_of([0, 1, 2])).waves())
    with pytest.raises(ValueError, match="layer 0: .*fetch them again"):
        next(fetched.waves())


def test_fetch_of_two_waves_is_good_once(make):
    fetched = make(3)[0](routing_of([0, 1, 2, 3]))
    assert len(list(fetched.waves())) == 2
    with pytest.raises(ValueError, match="fetch them again"):
        list(fetched.waves())


def test_failed_read_leaves_nothing(make, reader):
    fetch = make(6)[0]
    fetch(routing_of([1, 2]))
    reader.bad = {4}
    with pytest.raises(ReadError, match="the disk is gone"):
        fetch(routing_of([2, 4, 5]))
    assert sorted(fetch.bank.contents()) == [(0, 1), (0, 2)]  # 5 may be half there as well
    reader.bad = set()
    fetched = fetch(routing_of([2, 4, 5]))
    assert (fetched.hits, fetched.misses) == (1, 2)
    for expert, slot in fetched.first.slots.items():
        np.testing.assert_array_equal(fetch.bank.pool(0).block(slot), fetch.file.read_block(expert))


def test_failed_reads_lose_no_slots(make, reader):
    fetch = make(3)[0]
    reader.bad = {0}
    for _ in range(5):
        with pytest.raises(ReadError):
            fetch(routing_of([0, 1, 2]))
    assert len(fetch(routing_of([3, 4, 5])).first.slots) == 3


def test_failed_later_wave(make, reader):
    fetch = make(3)[0]
    fetched = fetch(routing_of([0, 1, 2, 3]))
    reader.bad = {3}
    with pytest.raises(ReadError):
        list(fetched.waves())
    assert (0, 3) not in fetch.bank


def test_preload(make, reader):
    stages = make(LAYERS * E)
    for fetch in stages:
        fetch.preload()
    assert len(stages[0].bank.contents()) == len(set(reader.asked)) == LAYERS * E
    assert stages[3](routing_of([0, 7])).misses == 0


@pytest.fixture
def damaged(packed, tmp_path):
    """The layer files of a copy in which one byte of layer 2, expert 5 is flipped."""
    path = shutil.copytree(packed("golden/hf"), tmp_path / "damaged")
    layers = PackedCheckpoint(path).layers
    with layers[2].path.open("r+b") as stream:
        stream.seek(layers[2].offset(5) + 1000)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))
    return layers


@pytest.mark.parametrize("form", ["block", "stacked"])
def test_verify_names_file_layer_and_expert(damaged, form):
    bank = ExpertBank(damaged, None, form=form)
    with PreadReader({2: damaged[2].path}, threads=1) as reader:
        fetch = ExpertFetch(damaged[2], bank, reader, verify=True)
        fetch(routing_of([0, 1]))
        with pytest.raises(ValueError, match=r"layer_02.safetensors: layer 2, expert 5: checksum"):
            fetch(routing_of([4, 5]))
        assert (2, 5) not in bank
        assert ExpertFetch(damaged[2], bank, reader)(routing_of([5])).misses == 1  # as it is


def test_each_block_is_verified_once(packed, make, monkeypatch):
    fetch = make(0)[0]
    checked = []
    cls = type(fetch.file)
    monkeypatch.setattr(cls, "check_block", lambda self, expert, *rest: checked.append(expert))
    verifying = ExpertFetch(fetch.file, fetch.bank, fetch.reader, verify=True)
    for experts in ([3], [3], [4], [3]):
        verifying(routing_of(experts))
    assert checked == [3, 4]


@pytest.mark.parametrize("name", ["golden/hf", "golden/mlx4", "next"])
def test_reference_is_what_the_bank_holds(packed, make_model, name):
    fetch = make_model(packed(name)).layers[1].fetch
    slot = fetch(routing_of([2])).first.slots[2]
    pool, matrices = fetch.bank.pool(1), fetch.reference(2)
    quantization = pool.layout.quantization
    for projection, matrix in matrices.items():
        parts = {
            name.split(".")[1]: array[slot]
            for name, array in pool.components.items()
            if name.startswith(projection)
        }
        found = (
            parts["weight"].astype(mx.float32)
            if quantization is None
            else mx.dequantize(
                parts["weight"],
                parts["scales"].astype(mx.float32),
                parts["biases"].astype(mx.float32),
                quantization.group_size,
                quantization.bits,
            )
        )
        np.testing.assert_allclose(np.array(found), matrix, rtol=0, atol=1e-6)


def test_card(make):
    html = make(6)[1](routing_of([4, 1, 7]))._repr_html_()
    assert "Fetched for layer 1" in html and "3 (" in html
