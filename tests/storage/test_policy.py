"""Cache policies alone, with any hashable keys."""

import random
from collections import OrderedDict

import pytest

from flashmoe_lab.storage.policy import LRU, POLICIES, make_policy


@pytest.fixture(params=POLICIES)
def policy(request):
    return make_policy(request.param)


def test_names(policy):
    assert make_policy(policy.name).name == policy.name
    assert make_policy(policy.name) is not policy


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="policy is 'mru'; known are .*lru"):
        make_policy("mru")


def test_victims_are_the_keys_once_each(policy):
    keys = {(layer, expert) for layer in range(3) for expert in range(4)}
    for key in sorted(keys):
        policy.admit(key)
    assert (len(policy), set(policy)) == (12, keys)
    assert {policy.victim(()) for _ in keys} == keys
    assert len(policy) == 0


def test_pinned_keys_stay(policy):
    for key in "abc":
        policy.admit(key)
    assert {policy.victim({"a"}), policy.victim({"a"})} == {"b", "c"}
    with pytest.raises(LookupError, match="in use"):
        policy.victim({"a"})
    assert list(policy) == ["a"]
    with pytest.raises(LookupError):
        make_policy(policy.name).victim(())


def test_discarded_keys_are_no_victims(policy):
    policy.admit("a")
    policy.admit("b")
    policy.discard("a")
    policy.discard("never there")
    assert policy.victim(()) == "b"


def test_lru_order():
    policy = LRU()
    for key in "abcd":
        policy.admit(key)
    policy.touch("a")
    policy.admit("b")
    assert list(policy) == ["c", "d", "a", "b"]
    assert [policy.victim(()) for _ in range(4)] == ["c", "d", "a", "b"]


def test_lru_against_a_list():
    rng, policy, order = random.Random(0), LRU(), OrderedDict[int, None]()
    for _ in range(500):
        key = rng.randrange(12)
        if key in order:
            policy.touch(key)
        else:
            if len(order) == 5:
                assert policy.victim(()) == order.popitem(last=False)[0]
            policy.admit(key)
        order[key] = None
        order.move_to_end(key)
        assert list(policy) == list(order)
