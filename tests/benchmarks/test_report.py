"""The report leaves out no line, and says once what all lines of a table share."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", BENCHMARKS / "report.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(benchmark="decode", variant="a", value=1.0, **changes):
    row = {
        "benchmark": benchmark,
        "case": "tiny",
        "variant": variant,
        "value": value,
        "unit": "tokens/s",
        "repetitions": 5,
        "spread": 0.1,
        "ratio_to": None,
        "ratio": None,
        "error_rms": None,
        "conditions": {"K": 8, "machine": "here"},
    }
    return row | changes


def test_every_line_is_in_a_table(report):
    rows = [line(variant=f"v{i}", benchmark=b) for i, b in enumerate(("peers", "decode", "new"))]
    text = "\n\n".join(report.tables(rows))
    assert [f"v{i}" in text for i in range(3)] == [True] * 3
    titles = [part for part in text.splitlines() if part.startswith("###")]
    assert titles == ["### Decode", "### Beside llama.cpp and mlx-lm", "### new"]


def test_shared_conditions_stand_once(report):
    rows = [line(conditions={"K": k, "machine": "here", "commit": str(k)}) for k in (4, 8)]
    (text,) = report.tables(rows)
    assert "machine here" in text and text.count("here") == 1
    header = next(part for part in text.splitlines() if part.startswith("| case"))
    assert header == "| case | variant | tokens/s | ± | n | K |"


def test_ratio_and_error_only_where_there_are_any(report):
    rows = [line(ratio=2.5, ratio_to="plain"), line(error_rms=1.5e-5)]
    (text,) = report.tables(rows)
    assert "2.50 of plain" in text and "1.5e-05" in text
    assert "ratio" not in report.tables([line()])[0]


def test_units_that_differ_stand_with_the_value(report):
    (text,) = report.tables([line(value=20.0, unit="GB/s"), line(value=3.0, unit="GMAC/s")])
    assert "20.0 GB/s" in text and "3.00 GMAC/s" in text


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123")],
)
def test_numbers(report, value, text):
    assert report.number(value) == text


def test_command(report, tmp_path, capsys, monkeypatch):
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(line()) + "\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(file)])
    assert report.main() == 0
    assert "### Decode" in capsys.readouterr().out
    file.write_text("")
    assert report.main() == 1
