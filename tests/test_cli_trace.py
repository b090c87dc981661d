"""The commands `trace` and `plot`, end to end on a tiny model."""

import json

import pytest

import flashmoe_lab as fl
from flashmoe_lab.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer.json")


@pytest.fixture(scope="module")
def recorded(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("trace") / "run"
    arguments = ["trace", str(packed("golden/hf", 4)), "--prompt-ids", "5,17,3", "--out", str(out)]
    arguments += ["--max-tokens", "6", "--mode", "stages", "--record", "layers.*.mixer.decay"]
    arguments += ["--export", "csv", "--export", "chrome", "--export", "libcachesim"]
    assert main(arguments) == 0
    return out


def test_trace_writes_a_trace_and_what_was_asked_for(recorded):
    trace = fl.Trace.read(recorded)
    assert trace.mode == "stages" and len(trace.tokens) == 9
    assert set(trace.arrays) == {f"layers.{n}.mixer.decay" for n in range(3)}
    names = {file.name for file in recorded.iterdir()}
    assert {"trace.json.gz", "libcachesim.csv", "reads.csv", "reads.parquet"} <= names


def test_trace_says_the_budget_and_the_cost(packed, tmp_path, capsys):
    arguments = ["trace", str(packed("golden/hf", 4)), "--prompt-ids", "5", "--max-tokens", "3"]
    assert main([*arguments, "--out", str(tmp_path), "--record", "layers.0.router.logits"]) == 0
    words = capsys.readouterr().err
    assert "arrays: up to 128 B of 1 GB allowed" in words
    assert "spans explain" in words and "recording took" in words
    over = [*arguments, "--out", str(tmp_path), "--record", "*", "--record-gb", "1e-6"]
    assert main(over) == 2
    assert "record_gb allows 1e-06" in capsys.readouterr().err


def test_a_run_that_fails_leaves_its_record(packed, tmp_path, monkeypatch, capsys):
    def fails(run, ids):
        for count, _ in enumerate(run, 1):
            if count == 3:
                raise OSError("the disk is gone")

    monkeypatch.setattr("flashmoe_lab.cli.trace.follow", fails)
    arguments = ["trace", str(packed("golden/hf", 4)), "--prompt-ids", "5", "--max-tokens", "9"]
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert "the disk is gone" in capsys.readouterr().err
    assert len(fl.Trace.read(tmp_path).tokens) >= 3


def test_plot_draws_what_it_can_and_says_what_it_cannot(recorded, tmp_path, capsys):
    assert main(["plot", str(recorded), "--out", str(tmp_path), "--format", "svg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    drawn = {file.stem for file in tmp_path.iterdir()}
    assert len(lines) == len(fl.plots.FIGURES)
    assert {"expert_histogram", "io_timeline", "layer_latency", "memory_length"} <= drawn
    assert any(line.startswith("state_norm: not drawn: the trace holds no") for line in lines)


def test_plot_of_what_is_no_trace(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "tokens.parquet: no such file; not a trace" in capsys.readouterr().err
    (tmp_path / "meta.json").write_text(json.dumps({}))
    assert main(["plot", str(tmp_path / "meta.json")]) == 2
