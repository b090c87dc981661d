"""The engine's settings: what is checked, what is refused, and that closing leaves nothing."""

import gc
import os
import shutil
import subprocess
import sys
import threading
import warnings
import weakref

import mlx.core as mx
import numpy as np
import pytest

import flashmoe_lab as fl
from flashmoe_lab import native
from flashmoe_lab.stages.router import route
from tests.saying import IDS, on_cpu, tokens_of


@pytest.fixture
def copied(packed, tmp_path):
    """A packed directory that a test may change."""
    return shutil.copytree(packed("golden/hf"), tmp_path / "copied")


# Checks


def nan(result, path):
    if isinstance(result, mx.array):
        return result * float("nan")
    return route(result.logits * float("nan"), 3)


@pytest.mark.parametrize(
    "path",
    ["embed", "layers.2.mixer", "layers.2.router", "layers.0.shared_expert", "norm", "lm_head"],
)
def test_checks_name_the_stage(packed, open_engine, path):
    engine = open_engine(packed("golden/hf"), checks=True)
    with engine.intercept(path, nan):
        with pytest.raises(FloatingPointError, match=f"^{path} gave NaN or infinity"):
            engine.logits(IDS)


def test_checks_find_damaged_weights(packed, open_engine):
    engine = open_engine(packed("golden/hf"), checks=True)
    assert len(tokens_of(engine)) == 5
    engine.layers[2].mixer.dt_bias = mx.array(np.full(4, np.nan, np.float32))
    with pytest.raises(FloatingPointError, match="^layers.2.mixer gave NaN or infinity"):
        engine.generate(IDS)


def test_without_checks_the_sampler_refuses(engine):
    with engine.intercept("layers.2.mixer", nan):
        with pytest.raises(FloatingPointError, match="load with checks=True to find where"):
            engine.generate(IDS)


def test_verify_names_file_layer_and_expert(copied, open_engine):
    layer = fl.PackedCheckpoint(copied).layers[1]
    with layer.path.open("r+b") as stream:
        stream.seek(layer.offset(6) + 100)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 4]))
    engine = open_engine(copied, verify=True)
    for _ in range(2):  # the damaged block is not found in the bank the second time
        with pytest.raises(ValueError, match="layer_01.safetensors: layer 1, expert 6: checksum"):
            engine.logits(IDS, num_experts_per_tok=8)
    assert open_engine(copied).logits(IDS).shape == (20, 512)


def test_verify_finds_nothing_wrong(packed, open_engine, engine):
    verified = open_engine(packed("golden/hf"), verify=True, resident=True)
    np.testing.assert_array_equal(verified.logits(IDS), engine.logits(IDS))


@on_cpu
@pytest.mark.parametrize("kernels", ["mlx", "native"])
def test_verifying_while_streaming_changes_nothing(packed, open_engine, use_kernels, kernels):
    """A prompt that names every expert of a layer, so that the last unchecked block comes with the
    first read."""
    if kernels == "native" and not native.available:
        pytest.skip("the native kernels were not built")
    use_kernels(kernels)
    prompt = list(range(3, 103))
    expected = open_engine(packed("golden/hf")).logits(prompt)
    verified = open_engine(packed("golden/hf"), verify=True)
    for _ in range(2):
        np.testing.assert_array_equal(verified.logits(prompt), expected)


# Opening and closing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_experts_per_tok=0), "num_experts_per_tok is 0; .* between 1 and 8"),
        (dict(num_experts_per_tok=9), "num_experts_per_tok is 9; .* between 1 and 8"),
        (dict(bank_gb=-0.5), "bank_gb is -0.5; it must be 0 or more"),
        (dict(resident=True, bank_gb=1), "leave bank_gb out"),
        (dict(reader="fast"), "reader must be one of .*'fast'"),
        (dict(threads=0), "threads must be 1 to 64, got 0"),
        (dict(split=17), "split must be 1 to 16, got 17"),
        (dict(prefetch=-1), "prefetch is -1 experts; it must be 0 or more"),
        (dict(policy="mru"), "policy is 'mru'; known are lru"),
        (dict(dtype="int8"), "dtype is 'int8'; known are"),
    ],
)
def test_settings_out_of_range(packed, open_engine, settings, message):
    with pytest.raises(ValueError, match=message):
        open_engine(packed("golden/hf"), **settings)


def test_unknown_setting(packed):
    with pytest.raises(TypeError, match="bank_gib"):
        fl.load(packed("golden/hf"), bank_gib=1)


def test_bank_that_does_not_fit(packed, open_engine, monkeypatch):
    monkeypatch.setattr("flashmoe_lab.storage.bank.available_memory_nbytes", lambda: 10**6)
    with pytest.raises(MemoryError, match="give a smaller bank_gb"):
        open_engine(packed("golden/hf"), resident=True)


@pytest.mark.parametrize(
    ("free", "slots"), [(10**12, 32), (None, 32), (4 * 10 * 98304, 10), (0, 3)]
)
def test_default_bank_is_a_quarter_of_the_free_memory(
    packed, open_engine, monkeypatch, free, slots
):
    monkeypatch.setattr("flashmoe_lab.storage.bank.available_memory_nbytes", lambda: free)
    monkeypatch.setattr("flashmoe_lab.storage.bank._check_memory", lambda nbytes: None)
    engine = open_engine(packed("golden/hf"))
    assert engine.bank.pool(0).layout.block_nbytes == 98304
    assert engine.bank.slots == slots


def test_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        fl.load(tmp_path / "nowhere")


def test_closed_engine_refuses(packed, open_engine):
    engine = open_engine(packed("golden/hf"))
    run = engine.stream_generate(IDS, 2)
    engine.close()
    for ask in (run.wait, lambda: engine.logits(IDS), lambda: engine.generate(IDS)):
        with pytest.raises(RuntimeError, match="the engine was closed"):
            ask()


def test_closing_stops_what_is_under_way(packed, open_engine):
    engine = open_engine(packed("golden/hf"))
    run = engine.stream_generate(IDS, 900)
    steps = iter(run)
    next(steps)
    engine.close()
    assert len(list(steps)) < 800 and run.finish_reason == "cancelled"


def test_exit_under_a_run(packed):
    program = (
        "import sys, flashmoe_lab as fl\n"
        "engine = fl.load(sys.argv[1])\n"
        "next(steps := iter(engine.stream_generate([5, 6, 7], 900)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, packed("golden/hf")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def left_over():
    gc.collect()
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    return threading.active_count(), files


def test_closing_leaves_nothing(packed, open_engine):
    before = left_over()
    for reader in ("pread", "mmap"):
        engine = open_engine(packed("golden/hf"), reader=reader, bank_gb=0)
        engine.generate(IDS, 3)
        engine.close()
        engine.close()
    assert left_over() == before


def test_dropping_leaves_nothing(packed, recwarn):
    before = left_over()
    engine = fl.load(packed("golden/hf"), checks=True)
    engine.generate(IDS, 3)
    worker = engine._thread._thread
    del engine
    gc.collect()
    worker.join(30)
    assert left_over() == before


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_closed_engine_s_memory_is_free_at_once(packed, prefetch):
    """It may be most of the machine's, and the next engine wants it: Python's collector, which
    breaks cycles, may come much later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no tokenizer
        engine = fl.load(packed("golden/hf"), bank_gb=0.001, prefetch=prefetch)
    gc.collect()
    gc.disable()
    try:
        engine.generate(IDS, 5)
        run = engine.stream_generate(IDS, 5, trace="flow").wait()
        engine.close()
        pool = weakref.ref(engine.bank.pool(0))
        del engine, run
        assert pool() is None
    finally:
        gc.enable()


def test_failed_opening_leaves_nothing(packed, open_engine):
    before = left_over()
    for _ in range(3):
        with pytest.raises(ValueError, match="policy"):
            open_engine(packed("golden/hf"), policy="mru")
    assert left_over() == before
