"""The bank: who lies where, who must go, and that nobody is overwritten while being read."""

import weakref
from dataclasses import replace
from pathlib import Path
from threading import Thread

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import Quantization, kernels
from flashmoe_lab.checkpoint.layer_file import BlockLayout, LayerFile
from flashmoe_lab.storage import bank as bank_module
from flashmoe_lab.storage.bank import ExpertBank
from flashmoe_lab.storage.policy import LRU

E = 8


def layer_file(config, layer, quantization=None, dtype="F32"):
    layout = BlockLayout.of(config, quantization, dtype)
    return LayerFile(layer=layer, path=Path("nowhere"), layout=layout, num_experts=E)


@pytest.fixture
def make(config):
    """`make(slots)`: a bank for two layers of one layout."""
    layers = [layer_file(config, layer) for layer in range(2)]

    def make(slots, **settings):
        return ExpertBank(layers, slots * layers[0].layout.block_nbytes, **settings)

    return make


def test_first_request_misses_and_the_second_hits(make):
    bank = make(4)
    first = bank.place(0, [5, 2])
    assert (first.misses, set(first.slots)) == ((2, 5), {2, 5})
    again = bank.place(0, [2, 5])
    assert (again.misses, again.slots) == ((), first.slots)
    assert (0, 5) in bank and (1, 5) not in bank
    assert sorted(bank.contents()) == [(0, 2), (0, 5)]
    assert (bank.counts.hits, bank.counts.misses, bank.counts.hit_rate) == (2, 2, 0.5)
    assert make(4).counts.hit_rate == 0


def test_find_is_place_where_nothing_is_missing(make):
    """Slots, counts, and the order in which experts will go."""
    one, other = make(4), make(4)
    for bank in (one, other):
        bank.place(0, [1, 2])
        bank.place(1, [1, 2])
    slots = other.place(0, [1, 2]).slots
    assert one.find(0, [2, 1]) == [slots[2], slots[1]] and one.counts == other.counts
    for bank in (one, other):
        bank.place(1, [3])
        bank.place(0, [5])
        bank.place(1, [6])
    assert sorted(one.contents()) == sorted(other.contents()) == [(0, 2), (0, 5), (1, 3), (1, 6)]


def test_find_of_what_is_not_all_there_changes_nothing(make):
    bank = make(2)
    bank.place(0, [1])
    bank.place(0, [2])
    assert bank.find(0, [1, 3]) is None and bank.find(1, [1]) is None
    assert (bank.counts.hits, bank.counts.misses) == (0, 2)
    bank.place(0, [4])
    assert sorted(bank.contents()) == [(0, 2), (0, 4)]  # 1 was not used
    nothing = make(0, workspace=2)
    nothing.place(0, [1])
    assert nothing.find(0, [1]) is None  # a bank that keeps nothing has nothing to be found


class MRU(LRU):
    """Would give up what was just asked for, if it were not pinned."""

    name = "mru"

    def victim(self, pinned):
        key = next(key for key in reversed(list(self)) if key not in pinned)
        self.discard(key)
        return key


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


def test_lru_over_layers(make):
    bank = make(4)
    bank.place(0, [1, 2])
    bank.place(1, [1, 2])
    bank.place(0, [1])
    assert bank.place(1, [7]).misses == (7,)
    assert sorted(bank.contents()) == [(0, 1), (1, 1), (1, 2), (1, 7)]
    bank.place(0, [4, 5])
    assert sorted(bank.contents()) == [(0, 1), (0, 4), (0, 5), (1, 7)]


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


def test_slots_are_distinct_and_stay(make):
    bank, rng = make(5), np.random.default_rng(0)
    where = {}
    for _ in range(200):
        layer, experts = int(rng.integers(2)), rng.permutation(E)[:3].tolist()
        held = set(bank.contents())
        placement = bank.place(layer, experts)
        for expert, slot in placement.slots.items():
            if (layer, expert) in held:
                assert where[layer, expert] == slot
            where[layer, expert] = slot
        assert set(placement.misses) == {e for e in experts if (layer, e) not in held}
        now = [where[key] for key in bank.contents()]
        assert len(now) == len(set(now)) <= 5
        assert bank.holds(placement)


def test_pinned_experts_are_never_given_up(make):
    bank = make(3, policy=MRU)
    bank.place(0, [0, 1, 2])
    placement = bank.place(0, [5, 1, 6])
    assert bank.holds(placement) and len(set(placement.slots.values())) == 3
    assert sorted(bank.contents()) == [(0, 1), (0, 5), (0, 6)]
    assert bank.policy_name == "mru"


def test_more_than_fit_at_once(make):
    with pytest.raises(ValueError, match=r"layer 1: 4 experts at once, .* 3 slots; use waves"):
        make(3).place(1, [0, 1, 2, 3])


@pytest.mark.parametrize("slots", range(1, 10))
@pytest.mark.parametrize("held", [[], [6, 1], [0, 1, 2, 3]])
def test_waves_cover_all_once_and_fit(make, slots, held):
    bank = make(slots)
    held = held[:slots]
    bank.place(0, held)
    wanted = [7, 6, 4, 1, 0]
    waves = bank.waves(0, wanted)
    assert sorted(sum(waves, [])) == sorted(wanted)
    assert all(0 < len(wave) <= slots for wave in waves)
    assert len(waves) == -(-len(wanted) // slots)
    assert set(wanted).intersection(held) <= set(waves[0])
    assert all(wave == sorted(wave) for wave in waves)
    misses = sum(len(bank.place(0, wave).misses) for wave in waves)
    assert misses == len(set(wanted) - set(held))


def test_no_capacity_keeps_nothing(make):
    bank = make(0, workspace=3)
    assert (bank.keeps, bank.slots) == (False, 3)
    for layer in (0, 0, 1):
        assert bank.place(layer, [1, 2]).misses == (1, 2)
        assert sorted(bank.contents()) == [(layer, 1), (layer, 2)]
    assert (bank.counts.hits, bank.counts.misses) == (0, 6)


def test_sizes(make, config):
    nbytes = layer_file(config, 0).layout.block_nbytes
    assert (make(5).slots, make(5).nbytes, make(5).keeps) == (5, 5 * nbytes, True)
    assert make(1, workspace=3).slots == 3  # never fewer than a layer needs at once
    assert make(5.9).slots == 5  # never more than was allowed
    assert make(100).slots == 2 * E
    assert make(1, workspace=100).slots == 2 * E
    assert ExpertBank([layer_file(config, 0)], None).slots == E


@pytest.mark.parametrize("form", ["block", "stacked"])
def test_form(make, form):
    assert make(2, form=form).pool(1).form == form


def test_layouts_share_the_capacity(config):
    four, eight = Quantization(bits=4), Quantization(bits=8)
    layers = [
        layer_file(config, 0, four, "BF16"),
        layer_file(config, 1, eight, "BF16"),
        layer_file(config, 2, four, "BF16"),
    ]
    everything = sum(E * layer.layout.block_nbytes for layer in layers)
    bank = ExpertBank(layers, everything // 2)
    assert bank.pool(0) is bank.pool(2) is not bank.pool(1)
    assert (bank.pool(0).slots, bank.pool(1).slots) == (8, 4)
    assert bank.nbytes <= everything // 2
    bank.place(0, [0, 1])
    bank.place(1, [0, 1])
    assert bank.place(2, range(8)).misses == tuple(range(8))  # all of its pool
    assert sorted(bank.contents())[:2] == [(1, 0), (1, 1)]  # and none of the other's


def test_forgotten_experts_are_missed(make):
    bank = make(3)
    first = bank.place(0, [0, 1, 2])
    bank.forget([(0, 1), (0, 7), (1, 0)])
    assert not bank.holds(first)
    assert sorted(bank.contents()) == [(0, 0), (0, 2)]
    assert bank.place(0, [3]).slots == {3: first.slots[1]}  # the slot is free again
    assert (0, 0) in bank
    bank.place(0, [4])  # and nobody gives up the forgotten one a second time
    assert sorted(bank.contents()) == [(0, 2), (0, 3), (0, 4)]


def test_holds(make):
    bank = make(2)
    placement = bank.place(0, [0, 1])
    assert bank.holds(placement)
    assert not bank.holds(replace(placement, layer=1))
    bank.place(0, [2])
    assert not bank.holds(placement)


def lazy_product(bank, layer, experts):
    placement = bank.place(layer, experts)
    pool = bank.pool(layer)
    weights = kernels.ExpertWeights(components=pool.components, quantization=None)
    slots = np.sort(np.fromiter(placement.slots.values(), int))
    return kernels.expert_mlp(mx.ones((1, 64)), np.zeros(len(slots), int), slots, weights)


@pytest.mark.parametrize("form", ["block", "stacked"])
def test_no_slot_is_overwritten_under_a_product(make, fill_slot, form):
    bank = make(2, form=form)
    pool = bank.pool(0)
    for slot in bank.place(0, [0, 1]).slots.values():
        fill_slot(pool, slot)
    expected = np.array(lazy_product(bank, 0, [0, 1]))
    product = lazy_product(bank, 0, [0, 1])
    bank.in_use(product)
    for slot in bank.place(1, [0, 1]).slots.values():
        fill_slot(pool, slot)
    np.testing.assert_array_equal(np.array(product), expected)
    assert not np.array_equal(np.array(lazy_product(bank, 1, [0, 1])), expected)


def test_finished_products_are_let_go(make):
    """A bank that holds everything never waits, and must not keep every product of a long run."""
    bank = make(4)
    bank.place(0, [0, 1])
    products = []
    for _ in range(1000):
        bank.place(0, [0, 1])
        product = mx.ones(3) * 2
        mx.eval(product)
        bank.in_use(product)
        products.append(weakref.ref(product))
        del product
    assert sum(ref() is not None for ref in products) <= 500


def test_large_products_are_let_go(make):
    """The products of a long prompt are large: few are kept at once."""
    bank = make(4)
    bank.place(0, [0, 1])
    products = []
    for _ in range(40):
        product = mx.ones(1 << 20) * 2
        bank.in_use(product)
        products.append(weakref.ref(product))
        del product
    assert sum(ref() is not None for ref in products) <= 5


def test_product_of_another_thread(make):
    """Stages called in a cell run in the cell's thread, and the next run in the engine's."""
    bank, errors = make(2), []
    bank.place(0, [0, 1])
    bank.in_use(lazy_product(bank, 0, [0, 1]))

    def place():
        try:
            bank.place(0, [2, 3])
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=place)
    thread.start()
    thread.join()
    assert errors == []


def test_memory_that_is_not_there(make, config, monkeypatch):
    needed = 2 * E * layer_file(config, 0).layout.block_nbytes
    monkeypatch.setattr(bank_module, "available_memory_nbytes", lambda: needed - 1)
    with pytest.raises(MemoryError, match="the bank wants .* give a smaller bank_gb"):
        make(100)
    make(2)
    monkeypatch.setattr(bank_module, "available_memory_nbytes", lambda: needed)
    make(100)
    monkeypatch.setattr(bank_module, "available_memory_nbytes", lambda: None)
    make(100)


def test_negative_capacity(make):
    with pytest.raises(ValueError, match="bank capacity is -"):
        make(-1)


def test_unknown_policy(make):
    with pytest.raises(ValueError, match="policy is 'mru'"):
        make(2, policy="mru")
