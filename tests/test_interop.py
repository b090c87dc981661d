"""Our engine against kept answers of stock transformers, where the demo model's weights are.

tests/interop/README.md says how they are made.
"""

import json
from pathlib import Path

import pytest

import flashmoe_lab as fl
from flashmoe_lab.bundled import bundled

KEPT = Path(__file__).parent / "interop" / "answers.json"


def test_same_greedy_answers_as_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = bundled("demo_model")
    if not (weights / "model.safetensors.index.json").exists():
        pytest.skip(f"the weights are not in {weights}")
    if not KEPT.exists():
        pytest.skip(f"{KEPT} has not been made")
    kept = json.loads(KEPT.read_text())
    assert kept["source"] == fl.Source(weights).identity, (
        "make the kept answers anew: other weights"
    )
    assert len(kept["answers"]) >= 10
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path))
    with fl.load("demo", "none", dtype="float32") as engine:
        for row in kept["answers"]:
            assert engine.generate(row["prompt"], 160).tokens == row["answer"], row["kind"]
