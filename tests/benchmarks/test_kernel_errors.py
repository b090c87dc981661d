"""The benchmark of the native kernels holds each to float64, and fails where one is wrong."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import Quantization, kernels, native

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
_spec = importlib.util.spec_from_file_location("kernels_benchmark", f"{BENCHMARKS}/kernels.py")
assert _spec and _spec.loader
bench = importlib.util.module_from_spec(_spec)
sys.modules["kernels_benchmark"] = bench  # dataclasses look there
_spec.loader.exec_module(bench)
sys.path.remove(BENCHMARKS)

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu or not native.available, reason="native on a CPU only"
)
CASES = {
    "matvec": lambda: bench._Matrices(Quantization(bits=4), 0).matvec("native_int"),
    "matvecs": lambda: bench._Matrices(Quantization(bits=4), 0).matvecs("native_int"),
    "matmul": lambda: bench._Matrices(Quantization(bits=4), 0).matmul("native"),
    "experts": lambda: bench._Experts(0).token("native_int", 10),
    "attention": lambda: bench._Attention(300).decode(),
    "delta": lambda: bench._Delta(1).decode(),
}


@pytest.fixture(autouse=True)
def as_before():
    yield
    kernels.use(None)


@pytest.mark.parametrize("name", CASES)
def test_every_operation_is_checked(name):
    case = CASES[name]()
    assert case.error_rms > 0 and case.right


def wrong_experts(monkeypatch):
    real = native.expert_mlp
    monkeypatch.setattr(native, "expert_mlp", lambda *parts: 1.01 * real(*parts))
    return bench._Experts(0).token("native", 10)


def wrong_attention(monkeypatch):
    real = native.attention
    monkeypatch.setattr(native, "attention", lambda *parts: real(*parts[:7], 1e4, *parts[8:]))
    return bench._Attention(300).decode()


def wrong_delta(monkeypatch):
    real = native.delta_net
    monkeypatch.setattr(native, "delta_net", lambda *parts: real(*parts[:9], 1e-2, *parts[10:]))
    return bench._Delta(1).decode()


class Short:
    """A matrix whose products leave out the last row."""

    def __init__(self, matrix):
        self.matrix, self.rows = matrix, matrix.rows

    def product(self, x, tokens, out):
        whole = np.empty_like(out)
        self.matrix.product(x, tokens, whole)
        out[:, :-1] = whole[:, :-1]


def wrong_product(monkeypatch):
    matrices = bench._Matrices(Quantization(bits=4), 0)
    real = matrices._rows
    monkeypatch.setattr(matrices, "_rows", lambda first, last: Short(real(first, last)))
    return matrices.matvecs("native")


@pytest.mark.parametrize("wrong", [wrong_product, wrong_experts, wrong_attention, wrong_delta])
def test_a_wrong_kernel_is_seen(monkeypatch, wrong):
    """A row not written, experts one per cent too large, another rope_theta, another eps."""
    assert not wrong(monkeypatch).right


@pytest.mark.parametrize("error, right", [(1e-6, True), (1e-4, False), (np.nan, False)])
def test_an_error_fails_the_run(capsys, monkeypatch, error, right):
    monkeypatch.setattr(bench, "last_level_cache", lambda: 1 << 30)
    case = bench.Case(
        name="x", variant="native", run=lambda: None, work=1.0, unit="GB/s", error_rms=error
    )
    options = argparse.Namespace(repetitions=1, json=None)
    assert bench._measure([case], [np.zeros(100, np.uint64)], options) is right
    said = capsys.readouterr().out
    assert ("WRONG" in said) is not right and "fits in the cache" in said


def test_a_ratio_is_of_speeds_within_a_repetition(monkeypatch, tmp_path):
    samples = sys.modules["interleave"].Samples
    found = {"native": samples([15, 30, 30, 15, 30]), "read": samples([30, 60, 60, 30, 30])}
    monkeypatch.setattr(bench, "interleave", lambda runs, repetitions: found)
    case = bench.Case(
        name="x", variant="native", run=lambda: None, work=1.0, unit="GB/s", error_rms=0.0
    )
    options = argparse.Namespace(repetitions=5, json=tmp_path / "lines.jsonl")
    assert bench._measure([case], [np.zeros(8)], options)
    line = json.loads(options.json.read_text())
    assert line["ratio"] == 0.5 and line["conditions"]["read_gbps"] == 30
