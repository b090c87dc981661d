"""What `overlap.py` and `hits.py` say is worked out on paper here, and they can say no."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from flashmoe_lab.stages.experts import Experts
from flashmoe_lab.storage.slot_pool import SlotPool
from tests.trace.made import made_trace

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
hits, overlap = map(importlib.import_module, ("hits", "overlap"))
sys.path.remove(BENCHMARKS)


def spans(*pairs):
    return pd.DataFrame(pairs, columns=["start_ns", "end_ns"])


@pytest.mark.parametrize(
    ("pairs", "total"),
    [
        ((), 0),
        (((3, 5),), 2),
        (((3, 5), (4, 9), (4, 6)), 6),  # one within another
        (((10, 11), (0, 2), (2, 3)), 4),
    ],
)
def test_union(pairs, total):
    assert overlap.union_ns(spans(*pairs)) == total


def test_shares_of_a_made_trace():
    """Two passes of 20 and 30 ms; mixers 12 and the head 26 ms, reads of 9 ms under none of it."""
    found = overlap.explain(made_trace())
    assert found["shares"] == {"busy": 47 / 50, "by stage": 47 / 50, "in all": 38 / 50}
    assert found["ms"]["wall"] == 25 and found["ms"]["reading"] == 4.5
    assert found["tokens_per_second"] == 40


def test_experts_hide_behind_their_own_reads_alone():
    trace = made_trace()
    spans = trace.spans.copy()
    # Token 3 reads 4 ms in each layer: experts of 3 ms hide in the one, of 6 not in the other.
    spans.loc[(spans.token == 3) & (spans.stage == "mixer"), "stage"] = "experts"
    spans.loc[(spans.token == 3) & (spans.layer == 0) & (spans.lane == "compute"), "end_ns"] += 2e6
    trace.spans = spans
    head, token_2, token_3 = 26, 1 + 4 + 1, 4 + 6
    assert overlap.explain(trace)["shares"]["by stage"] == (head + token_2 + token_3) / 50


def test_calls_between_the_marks_are_counted_once():
    log = b"""\
1 read(3, ...) = 4
1 write(5, "the measured tokens begin", 25) = 25
1 futex(0x1, FUTEX_WAIT <unfinished ...>
2 preadv2(9, ...) = 4096
1 <... futex resumed>) = 0
2 --- SIGCHLD {} ---
1 write(5, "the measured tokens end", 23) = 23
1 munmap(0x1, 4) = 0
"""
    assert hits.calls_between(log.splitlines()) == Counter(futex=1, preadv2=1)


def test_a_copy_is_found(packed, open_engine, monkeypatch):
    engine = open_engine(packed("golden/hf", 4), resident=True)
    assert hits.copy_of(engine) == ""
    real = SlotPool.addresses
    monkeypatch.setattr(SlotPool, "addresses", lambda self, slots: real(self, slots) + 4096)
    assert "where the reader was told" in hits.copy_of(engine)
    monkeypatch.undo()
    monkeypatch.setattr(Experts, "__call__", lambda self, x, routing, fetched: x)
    assert "does not see" in hits.copy_of(engine)
