"""The bank: who lies where, who must go, and that nobody is overwritten while being read."""

import weakref
from dataclasses import replace
from functools import partial
from threading import Thread

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import Quantization, kernels
from flashmoe_lab.storage import bank as bank_module
from flashmoe_lab.storage.bank import ExpertBank
from tests.storage.made_banks import MRU, E, bank_of_two, layer_file


@pytest.fixture
def make(config):
    """`make(slots)`: a bank for two layers of one layout."""
    return partial(bank_of_two, config)


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


def test_lru_over_layers(make):
    bank = make(4)
    bank.place(0, [1, 2])
    bank.place(1, [1, 2])
    bank.place(0, [1])
    assert bank.place(1, [7]).misses == (7,)
    assert sorted(bank.contents()) == [(0, 1), (1, 1), (1, 2), (1, 7)]
    bank.place(0, [4, 5])
    assert sorted(bank.contents()) == [(0, 1), (0, 4), (0, 5), (1, 7)]


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
