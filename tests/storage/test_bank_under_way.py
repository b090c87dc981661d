"""The bank while something is read into it: who waits for that, and whose slots nobody takes."""

from functools import partial

import numpy as np
import pytest

from flashmoe_lab.storage.policy import LRU
from tests.storage.made_banks import MRU, E, bank_of_two


@pytest.fixture
def make(config):
    """`make(slots)`: a bank for two layers of one layout."""
    return partial(bank_of_two, config)


class Reads:
    """Reads under way, which fail when somebody waits for them."""

    def __init__(self, bank, *keys, is_ahead=False):
        self.bank, self.keys, self.is_ahead = bank, frozenset(keys), is_ahead
        self.has_ended, self.settled = False, 0
        bank.landing(self)

    def settle(self):
        self.settled += 1
        self.bank.forget(self.keys)


def test_find_waits_for_reads_under_way(make):
    """One that fails is forgotten then, and not found."""
    bank = make(4)
    bank.place(0, [1])
    reads = Reads(bank, (0, 1))
    assert bank.find(0, [1]) is None and reads.settled == 1


def test_reads_ahead_of_others_are_not_waited_for(make):
    """Unless they wait for nothing."""
    bank = make(8)
    bank.place(0, [1, 2, 3, 4])
    reads = [Reads(bank, (0, expert), is_ahead=True) for expert in (2, 3, 4)]
    assert bank.find(0, [1]) is not None
    assert bank.place(0, [1, 5]).misses == (5,)
    assert [one.settled for one in reads] == [0, 0, 0]
    reads[1].has_ended = True
    assert bank.place(0, [1, 2], [reads[0]]).misses == (2,)  # whose reads those are
    assert [one.settled for one in reads] == [0, 1, 0]
    assert bank.is_announced(reads[0]) and not bank.is_announced(reads[1])
    assert bank.place(0, [2, 4]).misses == (2, 4)  # both had failed
    assert [one.settled for one in reads] == [1, 1, 1]


@pytest.mark.parametrize("how", ["find", "place", "none"])
def test_what_somebody_has_asked_for_is_always_waited_for(make, how):
    """Whoever asks next, and for what: nobody reads into slots that are given away."""
    bank = make(0, workspace=8) if how == "none" else make(8)
    bank.place(0, [1, 2])
    reads = Reads(bank, (0, 1), (0, 2))
    bank.find(1, [5]) if how == "find" else bank.place(1, [5])
    assert reads.settled == 1


def test_reads_ahead_give_way_where_the_pool_is_too_small(make):
    bank = make(8)
    bank.place(0, [0])
    assert bank.place_ahead(1, 1, {(0, 0)}) and bank.place_ahead(1, 2, {(0, 0)})
    reads = [Reads(bank, (1, expert), is_ahead=True) for expert in (1, 2)]
    assert bank.place(0, [0, 1, 2, 3, 4, 5]).misses == (1, 2, 3, 4, 5)
    assert [one.settled for one in reads] == [0, 0]
    assert len(set(bank.place(0, [0, 1, 2, 3, 4, 5, 6]).slots.values())) == 7
    assert [one.settled for one in reads] == [1, 1]


def test_what_is_forgotten_is_read_into_no_more(make):
    bank = make(8)
    bank.place(0, [1, 2, 3])
    one, other = Reads(bank, (0, 1)), Reads(bank, (0, 2), is_ahead=True)
    bank.forget([(0, 2), (0, 3)])
    assert (one.settled, other.settled) == (0, 1) and bank.contents() == [(0, 1)]


@pytest.mark.parametrize("policy", [LRU, MRU])
def test_placing_ahead_takes_no_slot_that_is_in_use(make, policy):
    """Of what is computed with, of reads under way, and of what may be asked for next."""
    bank = make(7, policy=policy)
    bank.place(0, [0, 1, 2])
    bank.place(1, [4, 5, 6, 7])
    busy = {(0, 0), (0, 1), (0, 2)}
    ahead = bank.place_ahead(1, 3, busy)
    assert ahead is not None and (ahead.misses, list(ahead.slots)) == ((3,), [3])
    assert busy < set(bank.contents()) and len(bank.contents()) == 7
    coming = Reads(bank, (1, 3), is_ahead=True)
    assert bank.place_ahead(1, 7, busy) is None  # three slots for each, and one is being read into
    assert bank.place(1, [0, 1, 2]).misses == (0, 1, 2)
    assert (1, 3) in bank and not coming.settled
    assert (bank.counts.hits, bank.counts.misses) == (0, 10)  # nobody has asked for it


def test_where_placing_ahead_may_be_of_use(make):
    bank = make(2 * E)
    assert bank.may_place_ahead(0, 7) and not bank.may_place_ahead(0, 8)
    for layer in range(2):
        bank.place(layer, range(E))
    assert not bank.may_place_ahead(0, 3)  # it holds everything
    assert make(7).may_place_ahead(0, 3) and not make(6).may_place_ahead(0, 3)
    assert not make(0, workspace=8).may_place_ahead(0, 3)


def test_what_was_placed_ahead_is_a_miss_when_it_is_asked_for(make):
    one, other = make(8), make(8)
    for bank in (one, other):
        bank.place(0, [1, 2])
    slots, early = {}, []
    for expert in (5, 3):
        placement = one.place_ahead(1, expert, {(0, 1), (0, 2)})
        assert placement is not None
        slots |= placement.slots
        early.append(Reads(one, (1, expert), is_ahead=True))
    found, expected = one.place(1, [3, 4, 5], early), other.place(1, [3, 4, 5])
    assert found.misses == expected.misses and found.slots.items() >= slots.items()
    assert one.counts == other.counts
    assert list(one._shelves[0].policy) == list(other._shelves[0].policy)


def test_a_bank_that_keeps_nothing_places_nothing_ahead(make):
    assert make(0, workspace=8).place_ahead(0, 1, set()) is None


@pytest.mark.parametrize("slots", [8, 9, 13])
def test_placing_some_early_changes_nothing_but_slots(make, slots):
    one, other = make(slots), make(slots)
    rng, given = np.random.default_rng(slots), 0
    for _ in range(300):
        layer, experts = int(rng.integers(2)), sorted(rng.permutation(E)[: rng.integers(1, 9)])
        experts = [int(expert) for expert in experts]
        early: dict[int, int] = {}
        reads = []
        for some in (experts[::3], experts[::2]):
            placement = one.place_early(layer, some)
            assert set(placement.misses) == set(placement.slots) <= set(some) - set(early)
            early |= placement.slots
            reads.append(Reads(one, *((layer, expert) for expert in placement.slots)))
        found, expected = one.place(layer, experts, reads), other.place(layer, experts)
        one._landing.clear()
        assert found.misses == expected.misses and found.slots.items() >= early.items()
        assert list(one._shelves[0].policy) == list(other._shelves[0].policy)
        given += len(early)
    assert one.counts == other.counts and given > 20


def test_an_early_slot_is_nobody_else_s(make):
    """Whatever the policy would give up next."""
    bank = make(8, policy=MRU)
    bank.place(1, list(range(E)))
    early = {**bank.place_early(0, [4, 5]).slots, **bank.place_early(0, [1, 6]).slots}
    assert len(set(early.values())) == 4
    assert sorted(bank.contents())[:4] == [(0, 1), (0, 4), (0, 5), (0, 6)]


def test_placing_early_leaves_what_is_read_into_alone(make):
    bank = make(4)
    bank.place(1, [0, 1, 2, 3])
    reads = Reads(bank, (1, 0), is_ahead=True)
    assert bank.place_early(0, [4, 5]).misses == ()  # its slot would be the first to go
    assert (1, 0) in bank and not reads.settled


def test_what_was_to_be_placed_when_interrupted_is_not_found(make, monkeypatch):
    bank = make(4)
    bank.place(0, [1])
    admit = LRU.admit

    def interrupted(self, key):
        if key == (0, 3):
            raise KeyboardInterrupt
        admit(self, key)

    monkeypatch.setattr(LRU, "admit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bank.place(0, [1, 2, 3, 4])
    assert bank.contents() == [(0, 1)]
    monkeypatch.undo()
    assert bank.place(0, [1, 2, 3, 4]).misses == (2, 3, 4)
