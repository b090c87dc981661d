"""Overlapped reads: experts are given as they come, and never before, whoever else asks."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import PackedCheckpoint, Routing
from flashmoe_lab.stages.expert_fetch import ExpertFetch
from flashmoe_lab.storage import native_crew
from flashmoe_lab.storage.bank import ExpertBank
from flashmoe_lab.storage.blocks import ReadError, ReadRecords
from flashmoe_lab.storage.ways import PreadReader

E = 8


def routing_of(*rows):
    experts = mx.array(rows, mx.int32)
    return Routing(logits=mx.zeros((len(rows), E)), experts=experts, weights=mx.ones(experts.shape))


class HeldPending:
    """Reads that end only when the test says so, one expert after another."""

    def __init__(self, reader, reads):
        self.reader, self.reads = reader, list(reads)
        self.records = []
        self.error = None

    done = False

    def let(self, count):
        for _ in range(count):
            read = self.reads[len(self.records)]
            self.records += list(PreadReader.read(self.reader, [read]))

    def wait(self):
        if self.error:
            raise self.error
        self.let(len(self.reads) - len(self.records))
        return ReadRecords.of(self.records)

    def landed(self, least=1):
        for number in range(len(self.reads)):
            if self.error and number == 1:
                return
            if number >= len(self.records):
                self.let(1)
            yield [number]


class HeldReader(PreadReader):
    """Gives a HeldPending for every submission."""

    def __init__(self, paths, **settings):
        super().__init__(paths, **settings)
        self.given = []

    def submit(self, reads):
        if len(reads) == 1 and not hasattr(reads, "owner"):
            return super().submit(reads)
        self.given.append(HeldPending(self, reads))
        return self.given[-1]


@pytest.fixture
def layers(packed):
    return PackedCheckpoint(packed("golden/hf")).layers


@pytest.fixture
def reader(layers):
    with HeldReader({layer.layer: layer.path for layer in layers}, threads=1) as reader:
        yield reader


@pytest.fixture
def make(layers, reader):
    def make(slots):
        bank = ExpertBank(layers, slots * layers[0].layout.block_nbytes)
        return [ExpertFetch(layer, bank, reader, overlap=True) for layer in layers]

    return make


def check(fetch, placement):
    for expert, slot in placement.slots.items():
        block = fetch.bank.pool(fetch.file.layer).block(slot)
        np.testing.assert_array_equal(block, fetch.file.read_block(expert))


def test_hits_come_before_any_read_has_ended(make, reader):
    fetch = make(6)[0]
    fetch(routing_of([1, 4])).wait()
    waves = fetch(routing_of([4, 7, 1, 0])).waves()
    held = next(waves)
    assert (sorted(held.slots), held.misses) == ([1, 4], ())
    assert reader.given[-1].records == []
    check(fetch, held)


def test_misses_come_one_by_one(make, reader):
    fetch = make(6)[1]
    seen = []
    for placement in fetch(routing_of([3, 7, 0])).waves():
        check(fetch, placement)
        seen.append(placement.misses)
        assert len(reader.given[-1].records) == len(seen)
    assert seen == [(0,), (3,), (7,)]


def test_small_blocks_come_together(make, layers):
    """The golden model's blocks are far below what is worth a call of its own."""
    fetch = make(6)[1]
    assert fetch.landing_blocks * layers[0].layout.block_nbytes >= 4 << 20


@pytest.mark.parametrize("what", ["first", "slots", "reads", "read_nbytes", "_repr_html_"])
def test_looking_waits(make, reader, what):
    fetched = make(6)[0](routing_of([3, 7, 0]))
    assert reader.given[-1].records == []
    value = getattr(fetched, what)
    if callable(value):
        value()
    assert len(reader.given[-1].records) == 3
    check(fetched.fetch, fetched.placed)


def test_the_next_placement_waits(make, reader):
    """Another thread's fetch must not find what has not come, nor take a slot under a read."""
    first, second, *_ = make(3)
    fetched = first(routing_of([3, 7, 0]))
    second(routing_of([1]))
    assert len(reader.given[0].records) == 3
    check_error = pytest.raises(ValueError, match="fetch them again")
    with check_error:
        list(fetched.waves())


def test_a_hit_that_has_not_come(make, reader):
    fetch = make(4)[0]
    fetch(routing_of([3]))
    again = fetch(routing_of([3]))
    assert (again.hits, len(reader.given[0].records)) == (1, 1)
    check(fetch, next(again.waves()))


def test_failure_is_raised_to_its_owner_and_forgotten(make, reader):
    fetch = make(6)[0]
    fetched = fetch(routing_of([3, 7, 0]))
    reader.given[-1].error = ReadError("the disk is gone")
    waves = fetched.waves()
    assert next(waves).misses == (0,)
    with pytest.raises(ReadError, match="the disk is gone"):
        next(waves)
    assert fetch.bank.contents() == []
    with pytest.raises(ReadError, match="the disk is gone"):
        fetched.wait()


def test_failure_of_another_does_not_stop_the_next(make, reader):
    first, second, *_ = make(6)
    lost = first(routing_of([3, 7]))
    reader.given[-1].error = ReadError("the disk is gone")
    fetched = second(routing_of([1]))
    assert (0, 3) not in first.bank
    check(second, fetched.first)
    with pytest.raises(ReadError, match="the disk is gone"):
        list(lost.waves())


@pytest.mark.parametrize("found", [True, False])
def test_an_older_fetch_waits_for_a_later_one_into_the_same_slots(make, reader, found):
    """The bank holds its experts where they were, but what lies there is still to come."""
    first, second, *_ = make(3)
    older = first(routing_of([0, 1, 2]))
    list(older.waves())
    older = first(routing_of([0, 1, 2])) if found else older
    list(second(routing_of([0, 1, 2])).waves())
    later = first(routing_of([0, 1, 2]))
    assert later.placed.slots == older.placed.slots and reader.given[-1].records == []
    if found:
        assert older.is_there
        check(first, older.placed)
    for placement in older.waves():
        check(first, placement)


def test_an_interrupt_is_not_told_again_to_the_next(make, reader, monkeypatch):
    first, second, *_ = make(6)
    fetched = first(routing_of([3, 7]))
    held, presses = reader.given[-1], [KeyboardInterrupt()]
    wait = held.wait

    def interrupted():
        if presses:
            raise presses.pop()
        return wait()

    monkeypatch.setattr(held, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetched.wait()
    check(second, second(routing_of([1])).first)


def test_waves_of_more_than_fit(make):
    fetch = make(3)[0]
    fetched = fetch(routing_of(list(range(E))))
    seen = []
    for placement in fetched.waves():
        check(fetch, placement)
        seen += placement.slots
    assert sorted(seen) == list(range(E))
    assert (fetched.hits, fetched.misses, len(fetched.reads)) == (0, 8, 8)


def test_verified_blocks_come_when_all_are_checked(layers, reader):
    bank = ExpertBank(layers, None)
    fetch = ExpertFetch(layers[0], bank, reader, verify=True, overlap=True)
    waves = fetch(routing_of([3, 7])).waves()
    assert sorted(next(waves).slots) == [3, 7]
    assert not {3, 7} & fetch._unverified
    assert list(waves) == []


@pytest.mark.skipif(not native_crew.is_built(), reason="needs the native threads")
@pytest.mark.parametrize("split", [1, 3])
def test_native_reads_land_whole(layers, split):
    bank = ExpertBank(layers, None)
    settings = {"threads": 2, "split": split, "native": True}
    with PreadReader({0: layers[0].path}, **settings) as reader:
        fetch = ExpertFetch(layers[0], bank, reader, overlap=True)
        fetch.landing_blocks = 1
        seen = []
        for placement in fetch(routing_of(list(range(E)))).waves():
            check(fetch, placement)
            seen += placement.slots
    assert sorted(seen) == list(range(E))


class Interrupted(HeldPending):
    """Ctrl-C in the first two waits, before all has come."""

    presses = 2

    def wait(self):
        if self.presses:
            self.presses -= 1
            raise KeyboardInterrupt
        return super().wait()


@pytest.mark.parametrize("overlap", [True, False])
def test_ctrl_c_frees_no_slot_under_a_read(layers, monkeypatch, overlap):
    """Slots are given up when nothing writes into them any more, and not before."""
    given, came = [], []

    class InterruptedReader(PreadReader):
        def submit(self, reads):
            if not hasattr(reads, "owner"):
                return super().submit(reads)
            given.append(Interrupted(self, reads))
            return given[-1]

    bank = ExpertBank(layers, None)
    forget = bank.forget

    def noted(keys):
        came.append(len(given[0].records))
        forget(keys)

    monkeypatch.setattr(bank, "forget", noted)
    with InterruptedReader({0: layers[0].path}) as reader:
        fetch = ExpertFetch(layers[0], bank, reader, overlap=overlap)
        with pytest.raises(KeyboardInterrupt):
            fetch(routing_of([3, 7, 0])).wait()
    assert came[0] == 3
    assert bank.contents() == []
