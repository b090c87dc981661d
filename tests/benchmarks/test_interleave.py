"""Cases in turn: the order of runs, and ratios that a machine's changes of speed leave alone."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
turns = importlib.import_module("interleave")
sys.path.remove(BENCHMARKS)


def test_every_second_repetition_is_reversed():
    ran: list[str] = []
    found = turns.interleave(
        {name: lambda: 1.0 for name in "abc"}, 3, lambda name, _: ran.append(name)
    )
    assert "".join(ran) == "abccbaabc"
    assert all(len(samples) == 3 for samples in found.values())


def test_a_ratio_is_of_pairs():
    read = turns.Samples(values=[30.0, 60.0, 60.0, 30.0, 30.0])
    half = turns.Samples(values=[15.0, 30.0, 30.0, 15.0, 30.0])
    assert half.median / read.median == 1.0  # of different speeds of the machine
    assert half.beside(read).median == 0.5


def test_a_ratio_wants_as_many_of_both():
    with pytest.raises(ValueError, match="longer"):
        turns.Samples(values=[1.0]).beside(turns.Samples(values=[1.0, 2.0]))
