"""The simulated bank is the engine's bank; Belady is the bound of every other policy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import flashmoe_lab as fl
from flashmoe_lab.study.bank_simulation import Belady, simulate
from tests.trace.made import made_trace


def test_a_run_s_own_bank_is_simulated_to_the_last_hit(
    packed: Callable[..., Path], open_engine: Callable[..., fl.Engine]
) -> None:
    path = packed("golden/hf", 4)
    block = fl.PackedCheckpoint(path).layers[0].layout.block_nbytes
    total = 0
    for slots in (5, 14, 22):  # with 5 a layer of the prompt comes in waves
        engine = open_engine(path, bank_gb=slots * block / 1e9)
        prompt = np.random.default_rng(1).integers(0, 90, 40).tolist()
        run = engine.stream_generate(prompt, 20, trace="flow", follow=prompt[::-1]).wait()
        assert run.trace is not None and engine.bank.slots == slots
        found = simulate(run.trace, [slots], ["lru"]).iloc[0]
        assert found.hits == run.stats.prefill.hits + run.stats.decode.hits
        total += found.hits
    assert total


def test_hits_by_hand() -> None:
    found = simulate(made_trace(), [2, 6, 8]).set_index(["policy", "slots"]).hits
    # With room for all, what was asked for before is hit: 3 and 2 in token 2, 1 and 1 in token 3.
    assert found["lru", 8] == found["belady", 8] == 2 + 2 + 1 + 1
    assert found["lru", 2] == 0


def test_no_order_of_giving_up_hits_more_than_belady() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        keys = rng.integers(0, 4, 8).tolist()
        assert _hits(keys) == max(_hits_by_choice(keys, choice) for choice in _choices(len(keys)))


def _hits(keys: list[int]) -> int:
    policy, held, hits = Belady(keys), set[int](), 0
    for key in keys:
        if key in held:
            policy.touch(key)
            hits += 1
            continue
        if len(held) == 2:
            held -= {policy.victim({key})}
        held.add(key)
        policy.admit(key)
    return hits


def _choices(length: int) -> list[tuple[int, ...]]:
    """Every way to say at each request which of two to give up."""
    return [tuple(n >> place & 1 for place in range(length)) for n in range(2**length)]


def _hits_by_choice(keys: list[int], choice: tuple[int, ...]) -> int:
    held, hits = list[int](), 0
    for key, which in zip(keys, choice, strict=True):
        if key in held:
            hits += 1
            continue
        if len(held) == 2:
            held.pop(which)
        held.append(key)
    return hits


def test_errors() -> None:
    with pytest.raises(ValueError, match="slots is 1; a layer needs at least K = 2"):
        simulate(made_trace(), [1])
    with pytest.raises(ValueError, match="policy 'best' is unknown; there are lru, belady"):
        simulate(made_trace(), [4], ["best"])
    with pytest.raises(LookupError):
        policy = Belady([1])
        policy.admit(1)
        policy.victim({1})
