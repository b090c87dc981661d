"""The benchmark of errors says how far a layer is from float64, and fails where it is too far."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
errors = importlib.import_module("errors")
sys.path.remove(BENCHMARKS)


@pytest.mark.filterwarnings("ignore:.*no tokenizer.json")
@pytest.mark.parametrize("bound, code", [(1e-4, 0), (1e-12, 1)])
def test_logits_are_held_to_float64(packed, tmp_path, monkeypatch, bound, code):
    file = tmp_path / "lines.jsonl"
    options = ["--model", str(packed("golden/hf")), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["errors.py", *options])
    monkeypatch.setattr(errors, "BOUND", bound)
    assert errors.main() == code
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({line["case"] for line in lines}) == 2  # both kinds of layer
    assert all(0 < line["error_rms"] < 1e-4 for line in lines)
    assert all(line["conditions"]["same_experts"] == 1 for line in lines)
