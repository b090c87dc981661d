"""A budget adds up to what was recorded, and what-if is arithmetic that can be done by hand."""

import pytest

from flashmoe_lab.study.budget import Budget
from tests.trace.made import BLOCK, made_trace


@pytest.fixture
def budget() -> Budget:
    return Budget.of(made_trace(mode="stages"))


def test_parts_by_hand(budget: Budget) -> None:
    # Two decode steps: mixers 1+4+1+6, fetching 2+2+4+4, head 11+15, Python 10+10+5.
    assert dict(budget.ms) == {
        "mixers, norms, routers": 6,
        "experts": 0,
        "fetching experts": 6,
        "head": 13,
        "Python": 12.5,
    }
    assert budget.total_ms == 37.5 and budget.tokens_per_second == pytest.approx(1000 / 37.5)
    assert budget.hit_rate == 5 / 8 and budget.asked_nbytes == 4 * BLOCK
    assert budget.read_nbytes == 1.5 * BLOCK
    assert budget.bandwidth_gbps == pytest.approx(1500 / 6e-3 / 1e9)


def test_each_layer_has_blocks_of_its_own_size() -> None:
    found = Budget.of(made_trace(mode="stages", layer_block_nbytes="1000,500"))
    assert found.asked_nbytes == 2 * 1000 + 2 * 500


def test_what_if(budget: Budget) -> None:
    same = budget.what_if()
    assert dict(same.ms) == pytest.approx(dict(budget.ms))
    fast = budget.what_if(bandwidth_gbps=2 * budget.bandwidth_gbps)
    assert fast.ms["fetching experts"] == pytest.approx(3)
    assert budget.what_if(hit_rate=1).ms["fetching experts"] == 0
    half = budget.what_if(num_experts_per_tok=1)
    assert half.ms["fetching experts"] == pytest.approx(3) and half.ms["head"] == 13
    assert half.read_nbytes == 0.75 * BLOCK


def test_errors(budget: Budget) -> None:
    with pytest.raises(ValueError, match="mode is 'flow'"):
        Budget.of(made_trace())
    for wrong, words in (
        ({"hit_rate": 1.5}, "hit_rate is 1.5; it must be 0 to 1"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"bandwidth_gbps": 0}, "bandwidth_gbps is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            budget.what_if(**wrong)  # pyright: ignore[reportArgumentType]
