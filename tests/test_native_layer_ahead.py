"""What the next layer is likely to ask for is read before its router has spoken: the same bits, and
nothing that was asked for waits for what was not."""

from functools import partial
from threading import Event

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import kernels
from flashmoe_lab.stages.expert_fetch import ExpertFetch
from flashmoe_lab.storage.blocks import ReadError, ReadRecords
from flashmoe_lab.storage.ways import PreadReader

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu or not kernels.native.available, reason="native on a CPU only"
)
K = 3


class Failed:
    """Reads that failed, once somebody waits for them."""

    done = False

    def wait(self) -> ReadRecords:
        raise ReadError(5, "the disk is gone")

    def landed(self, least=1):
        return iter(())


class Listed(PreadReader):
    """Notes what it is asked for, and by whom."""

    def __init__(self, paths, **settings):
        super().__init__(paths, **settings)
        self.asked: list[tuple[str, int, list[int]]] = []
        self.who, self.ahead_fails = "demand", ""

    def submit(self, reads):
        experts = [read.expert for read in reads]
        self.asked.append((self.who, reads[0].layer, experts))
        if self.who == "ahead" and self.ahead_fails == "at once":
            raise ReadError(5, "the disk is gone")
        if self.who == "ahead" and self.ahead_fails == "later":
            return Failed()
        return super().submit(reads)


@pytest.fixture
def make(read_by, monkeypatch):
    """`make(slots, prefetch)`: a model, and its reader."""
    begin_ahead = ExpertFetch.begin_ahead

    def noted(self, *arguments):
        self.reader.who = "ahead"
        try:
            return begin_ahead(self, *arguments)
        finally:
            self.reader.who = "demand"

    monkeypatch.setattr(ExpertFetch, "begin_ahead", noted)
    return partial(read_by, Listed)


@pytest.fixture
def ids(sample):
    return sample("golden/hf")[0][:25]


def logits(model, ids):
    state = model.empty_state()
    return np.concatenate([np.array(model([token], state)) for token in ids])


def ahead(reader):
    return [(layer, *experts) for who, layer, experts in reader.asked if who == "ahead"]


def chosen(model, ids):
    """(number of the token, layer) -> experts."""
    found, state = {}, model.empty_state()
    for number, given in enumerate(ids):
        for result in model.step([given], state):
            if result.path.endswith("router"):
                layer = int(result.path.split(".")[1])
                found[number, layer] = np.array(result.result.experts)[0].tolist()
    return found


@pytest.mark.parametrize("slots", [7, 8, 9, 12, 20, 32])
@pytest.mark.parametrize("prefetch", [1, 2, 8])
def test_the_same_bits_whatever_is_read_ahead(make, ids, slots, prefetch):
    model, reader = make(slots, prefetch)
    other, its_reader = make(slots, 0)
    np.testing.assert_array_equal(logits(model, ids), logits(other, ids))
    read = ahead(reader)
    assert {layer for layer, _ in read} == {1, 2, 3} and not ahead(its_reader)
    bank, its_bank = model.layers[0].fetch.bank, other.layers[0].fetch.bank
    asked = bank.counts.hits + bank.counts.misses
    assert asked == its_bank.counts.hits + its_bank.counts.misses == 4 * K * len(ids)
    bank.settle()
    block = model.layers[0].fetch.file.layout.block_nbytes
    assert bank.counts.read_nbytes == block * sum(len(experts) for *_, experts in reader.asked)
    assert len(bank.contents()) <= slots


def test_what_is_asked_for_goes_before(make, ids):
    """What is read ahead is of the next layer, and handed over after what this one needs."""
    model, reader = make(7, 1)  # of four layers none finds all that it needs
    logits(model, ids)
    token = [("demand", 0)]
    for layer in (1, 2, 3):
        token += [("ahead", layer), ("demand", layer)]
    assert [(who, layer) for who, layer, _ in reader.asked] == token * len(ids)
    assert all(len(experts) == 1 for who, _, experts in reader.asked if who == "ahead")


def test_it_is_what_the_router_is_likely_to_name(make, ids):
    """Far more often than one in eight times three."""
    model, reader = make(7, 1)
    logits(model, ids)
    asked = chosen(make(32, 0)[0], ids)
    found, token, last = [], 0, 0
    for layer, expert in ahead(reader):
        token, last = token + (layer <= last), layer
        found.append(expert in asked[token, layer])
    assert len(found) > 40 and np.mean(found) > 0.5


def test_the_router_is_given_the_stream_with_the_shared_expert(make, ids, monkeypatch):
    model, _ = make(20, 2)
    asked, missing = [], ExpertFetch.missing

    def noted(self, experts):
        asked.append((self.file.layer, list(experts)))
        return missing(self, experts)

    monkeypatch.setattr(ExpertFetch, "missing", noted)
    logits(model, ids)
    expected, other, streams = [], make(32, 0)[0], [mx.array(0.0)]
    state = other.empty_state()
    for token in ids:
        for result in other.step([token], state):
            *layer, stage = result.path.split(".")
            if stage == "embed":
                streams = [result.result]
            elif stage in ("mixer", "shared_expert", "experts"):
                streams.append(result.result)
                if stage == "shared_expert" and layer != ["layers", "3"]:
                    after = other.layers[int(layer[1]) + 1]
                    h = streams[0] + streams[1]
                    for part in streams[2:]:
                        h = h + part
                    routing = after.router(after.post_norm(h), K)
                    expected.append((after.index, np.array(routing.experts)[0].tolist()))
    assert len(asked) == 3 * len(ids) and asked == expected


def test_nothing_is_under_way_after_a_pass_however_it_ended(make, ids):
    model, reader = make(12, 2)
    logits(model, ids)
    bank, state = model.layers[0].fetch.bank, model.empty_state()

    def fail(result, path):
        raise RuntimeError("enough")

    for path in ("layers.3.experts", "lm_head"):
        with model.intercept(path, fail), pytest.raises(RuntimeError, match="enough"):
            model([ids[0]], state)
        assert not bank._landing


@pytest.mark.parametrize("slots", [0, 3, 6])
def test_a_bank_that_is_too_small_reads_nothing_ahead(make, ids, slots):
    model, reader = make(slots, 4)
    other, _ = make(slots, 0)
    np.testing.assert_array_equal(logits(model, ids), logits(other, ids))
    assert not ahead(reader)


def test_what_somebody_looks_at_is_not_read_ahead(make, ids):
    """Its router may be overruled."""
    model, reader = make(12, 2)
    with model.intercept("layers.2.router", lambda result, path: None):
        logits(model, ids)
    assert {layer for layer, _ in ahead(reader)} == {1}  # 3 follows one that is looked at
    reader.asked.clear()
    model.layers[1].fetch.prefetch = 0
    logits(model, ids)
    assert {layer for layer, _ in ahead(reader)} == {2, 3}
    reader.asked.clear()
    model.layers[2].fetch.overlap = False
    logits(model, ids)
    assert {layer for layer, _ in ahead(reader)} == {3}


def test_reads_that_fail_at_once_are_nobody_s(make, ids):
    model, reader = make(12, 2)
    reader.ahead_fails = "at once"
    other, _ = make(12, 0)
    np.testing.assert_array_equal(logits(model, ids), logits(other, ids))
    assert ahead(reader)


def test_a_failed_read_is_raised_where_it_was_asked_for(make, ids):
    model, reader = make(12, 2)
    reader.ahead_fails = "later"
    with pytest.raises(ReadError, match="the disk is gone"):
        logits(model, ids)
    bank = model.layers[0].fetch.bank
    bank.settle()
    assert not {(layer, expert) for layer, expert in ahead(reader)} & set(bank.contents())
    reader.ahead_fails = ""
    other, _ = make(12, 0)
    np.testing.assert_array_equal(logits(model, ids), logits(other, ids))


def test_a_failed_read_that_nobody_asked_for_is_forgotten(make, ids, monkeypatch):
    model, reader = make(12, 2)
    reader.ahead_fails = "later"

    # The router's choice is known beforehand from a model that reads nothing ahead.
    other, _ = make(12, 0)
    choices, expected = chosen(other, ids), logits(other, ids)
    begin, number = ExpertFetch.begin_ahead, 0

    def wrong(self, experts, *arguments):
        named = choices[number, self.file.layer]
        missing = self.missing(expert for expert in range(8) if expert not in named)
        return begin(self, missing[:2], *arguments)

    monkeypatch.setattr(ExpertFetch, "begin_ahead", wrong)
    state, found = model.empty_state(), []
    for number, token in enumerate(ids):  # noqa: B007
        found.append(np.array(model([token], state)))
    np.testing.assert_array_equal(np.concatenate(found), expected)
    assert len(ahead(reader)) > 20


def test_another_thread_may_take_the_slots_meanwhile(make, ids, monkeypatch):
    """It waits for the reads, and what it has taken is read again."""
    model, reader = make(12, 2)
    other, _ = make(12, 0)
    expected, of, lost = logits(other, ids), ExpertFetch.of, []

    def after_others(self, experts, early=()):
        if early:
            bank, layer = self.bank, (self.file.layer + 2) % 4
            bank.place(layer, list(range(8)))
            bank.place((layer + 1) % 4, list(range(4)))
            lost.extend(landing for landing in early if not bank.holds(landing.placement))
            bank.forget([key for key in bank.contents() if key not in coming(early)])
        return of(self, experts, early)

    def coming(early):
        return {key for landing in early for key in landing.keys}

    monkeypatch.setattr(ExpertFetch, "of", after_others)
    np.testing.assert_array_equal(logits(model, ids), expected)
    assert len(lost) > 20


def test_what_nobody_asked_for_is_not_waited_for(make, ids, monkeypatch):
    """Until all layers are through: a read that would take forever holds up none of them."""
    ids = ids[:4]
    model, reader = make(32, 2)
    other, _ = make(32, 0)
    choices, expected = chosen(other, ids), logits(other, ids)
    free, submit = Event(), Listed.submit

    class Slow:
        def __init__(self, pending):
            self.pending = pending

        @property
        def done(self):
            return free.is_set()

        def wait(self):
            assert free.is_set(), "it would wait forever"
            return self.pending.wait()

        def landed(self, least=1):
            assert free.is_set(), "it would wait forever"
            return self.pending.landed(least)

    def slow(self, reads):
        pending = submit(self, reads)
        return Slow(pending) if self.who == "ahead" else pending

    named = {(layer, expert) for (_, layer), experts in choices.items() for expert in experts}
    never = {n: [e for e in range(8) if (n, e) not in named] for n in range(4)}
    begin = ExpertFetch.begin_ahead

    def wrong(self, experts, *arguments):
        return begin(self, self.missing(never[self.file.layer]), *arguments)

    monkeypatch.setattr(Listed, "submit", slow)
    monkeypatch.setattr(ExpertFetch, "begin_ahead", wrong)
    with model.intercept("embed", lambda *_: free.clear()):
        with model.intercept("norm", lambda *_: free.set()):
            np.testing.assert_array_equal(logits(model, ids), expected)
    assert len(ahead(reader)) > 3 and not model.layers[0].fetch.bank._landing
