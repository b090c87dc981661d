"""What somebody else has begun to read while a token goes through the layers: an expert is computed
with only once it has come, and no slot is given away while something is read into it."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import kernels
from flashmoe_lab.stages.expert_fetch import ExpertFetch
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.storage.ways import PreadReader

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu or not kernels.native.available, reason="native on a CPU only"
)


class Later:
    """Reads that the disk comes to only when somebody waits for them."""

    def __init__(self, begin):
        self.begin, self.begun = begin, None

    @property
    def done(self):
        return self.begun is not None

    def _now(self):
        self.begun = self.begun or self.begin()
        self.begun.wait()
        return self.begun

    def wait(self):
        return self._now().wait()

    def landed(self, least=1):
        return self._now().landed(least)


class Slow(PreadReader):
    """Reads at once, or later where `later` is set."""

    later = False

    def submit(self, reads):
        submit = super().submit
        return Later(lambda: submit(reads)) if self.later else submit(reads)


@pytest.fixture
def make(read_by):
    """`make(slots, prefetch)`: a model, and its reader."""
    return partial(read_by, Slow)


@pytest.fixture
def ids(sample):
    return sample("golden/hf")[0][:25]


def logits(model, ids, k=None, state=None):
    state = state or model.empty_state()
    return np.concatenate([np.array(model([token], state, k)) for token in ids])


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("slots, workspace", [(8, 1), (10, 1), (20, 1), (0, 8)])
def test_a_fetch_that_nobody_has_waited_for(make, ids, slots, workspace, prefetch):
    model, reader = make(slots, prefetch, workspace)
    expected = logits(make(slots, 0, workspace)[0], ids)
    reader.later = True
    fetched = model.layers[1].fetch(Routing.of_all(8))
    reader.later = False
    np.testing.assert_array_equal(logits(model, ids), expected)
    fetched.wait()
    np.testing.assert_array_equal(logits(model, ids), expected)


def test_a_token_stopped_midway(make, ids):
    """Its last fetch is under way, and the next token asks the same bank."""
    model, reader = make(0, 0, 8)
    expected = logits(make(0, 0, 8)[0], ids)
    for layer in range(4):
        reader.later = True
        for result in model.step([ids[0]]):
            if result.path == f"layers.{layer}.fetch":
                break
        reader.later = False
        np.testing.assert_array_equal(logits(model, ids), expected)


@pytest.mark.parametrize("wrong", [False, True])
def test_more_experts_a_token_than_before(make, ids, monkeypatch, wrong):
    """What was read ahead for fewer leaves too few slots, and has to be waited for."""
    model, reader = make(9, 8)
    begin = ExpertFetch.begin_ahead

    def later(self, experts, *arguments):
        reader.later = True
        try:
            return begin(self, self.missing(range(8))[-2:] if wrong else experts, *arguments)
        finally:
            reader.later = False

    monkeypatch.setattr(ExpertFetch, "begin_ahead", later)
    monkeypatch.setattr(
        type(model), "_settle", lambda self, view: None
    )  # as if the pass had failed
    state, others = model.empty_state(), make(9)[0]
    its_state = others.empty_state()
    for number, token in enumerate(ids):
        k = (1, 1, 8, 3, 1, 4)[number % 6]
        found, expected = logits(model, [token], k, state), logits(others, [token], k, its_state)
        np.testing.assert_array_equal(found, expected)


def test_another_thread_reads_the_same_expert_into_the_same_slot(make, ids, monkeypatch):
    """What was begun ahead is over, and its key and slot are those of other reads, which have
    not come."""
    model, reader = make(8, 1)
    expected, of, same = logits(make(8)[0], ids), ExpertFetch.of, []

    def between(self, experts, early=()):
        if early and not reader.later:
            bank, layer, (key,) = self.bank, self.file.layer, early[0].keys
            slot = early[0].placement.slots[key[1]]
            other = model.layers[(layer + 2) % 4].fetch
            of(other, np.arange(8)[None]).wait()  # all slots
            held = next(e for e in range(8) if bank.place(other.file.layer, [e]).slots[e] == slot)
            of(other, np.array([[e for e in range(8) if e != held]])).wait()
            reader.later = True
            again = of(self, np.array([[key[1]]]))
            reader.later = False
            same.append(again.placed.slots[key[1]] == slot)
        return of(self, experts, early)

    monkeypatch.setattr(ExpertFetch, "of", between)
    np.testing.assert_array_equal(logits(model, ids), expected)
    assert len(same) > 20 and all(same)
