"""Cases in turn: the order of runs, and ratios that a machine's changes of speed leave alone."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "interleave.py"


@pytest.fixture(scope="module")
def turns():
    spec = importlib.util.spec_from_file_location("interleave_benchmark", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["interleave_benchmark"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_every_second_repetition_is_reversed(turns):
    ran: list[str] = []
    found = turns.interleave(
        {name: lambda: 1.0 for name in "abc"}, 3, lambda name, _: ran.append(name)
    )
    assert "".join(ran) == "abccbaabc"
    assert all(len(samples) == 3 for samples in found.values())


def test_a_ratio_is_of_pairs(turns):
    read = turns.Samples(values=[30.0, 60.0, 60.0, 30.0, 30.0])
    half = turns.Samples(values=[15.0, 30.0, 30.0, 15.0, 30.0])
    assert half.median / read.median == 1.0  # of different speeds of the machine
    assert half.beside(read).median == 0.5


def test_a_ratio_wants_as_many_of_both(turns):
    with pytest.raises(ValueError, match="longer"):
        turns.Samples(values=[1.0]).beside(turns.Samples(values=[1.0, 2.0]))
