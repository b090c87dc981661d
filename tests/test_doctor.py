"""The doctor finds a healthy machine healthy and a sick one sick."""

from pathlib import Path

import numpy as np
import pytest

from flashmoe_lab import doctor
from flashmoe_lab.cli import main


def test_every_check_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings = list(doctor.examine(tmp_path))
    failed = [f.line() for f in findings if f.state == "failed"]
    # A file system may refuse direct reads or eviction; arithmetic may not fail.
    assert not [line for line in failed if "reader direct" not in line and "page cache" not in line]
    assert {f.name for f in findings} >= {"experts, 4 bits", "delta rule", "reader pread"}
    assert list(tmp_path.iterdir()) == []


def test_wrong_arithmetic_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = doctor.kernels.expert_mlp_reference
    monkeypatch.setattr(
        doctor.kernels, "expert_mlp_reference", lambda x, m: right(x, m) * (1 + 1e-3)
    )
    states = {f.name: f.state for f in doctor.examine(tmp_path)}
    assert states["experts, 4 bits"] == "failed"
    assert states["delta rule"] == "ok"


def test_wrong_bytes_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.np, "array_equal", lambda a, b: False)
    findings = {f.name: f for f in doctor.examine(tmp_path)}
    assert findings["reader pread"].state == "failed"
    assert findings["bank memory, block"].state == "failed"
    assert main(["doctor", "--directory", str(tmp_path)]) == 1


def test_nan_is_not_close() -> None:
    with pytest.raises(ValueError, match="relative error nan"):
        doctor._close(np.array([np.nan]), np.array([1.0]), doctor.mx.float32)


def test_threads_of_python_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.native_crew, "is_built", lambda: False)
    monkeypatch.setattr(doctor.native, "missing", "was not built here")
    facts = {f.name: f.detail for f in doctor._facts()}
    assert facts["reading threads"].startswith("of Python")
    assert facts["reading threads"].endswith("flashmoe_lab._native was not built here")
