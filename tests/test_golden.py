"""Every tiny model gives the logits that transformers gives, and the same bits in every setting."""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab.kernels import KERNELS

DATA = Path(__file__).parent / "data"
GOLDEN = ["golden/hf", "golden/mlx4"]
FIXTURES = sorted(
    path.parent.name for path in DATA.glob("*/ref.npz") if path.parent != DATA / "golden"
)
on_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="bitwise on a CPU only")


def logits(model, ids, chunk=512):
    state = model.empty_state()
    starts = range(0, len(ids), chunk)
    return np.concatenate([np.array(model(ids[i : i + chunk], state)) for i in starts])


def test_all_fixtures_are_here():
    assert len(FIXTURES) == 8


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", GOLDEN + FIXTURES)
def test_logits_are_those_of_transformers(packed, sample, open_engine, use_kernels, name, kernels):
    """The matrices here are too narrow for native_int's integers: it is exact on them."""
    use_kernels(kernels)
    ids, truth = sample(name)
    found = open_engine(packed(name), dtype="float32").logits(ids)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, truth, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(found.argmax(-1), truth.argmax(-1))


@pytest.mark.parametrize("name", GOLDEN + FIXTURES)
def test_reference_is_the_truth(packed, sample, make_model, name):
    """What is left is the packed norm weight: 1 + w, rounded to float32."""
    ids, truth = sample(name)
    found = make_model(packed(name)).reference(ids)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-6 if name in GOLDEN else 2e-6)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_reference_with_another_k(packed, sample, make_model, k):
    ids, _ = sample("golden/hf")
    model = make_model(packed("golden/hf"))
    found = np.array(model(ids[:40], model.empty_state(), k))
    np.testing.assert_allclose(found, model.reference(ids[:40], k), rtol=0, atol=2e-5)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_packed_to_fewer_bits(packed, sample, make_model, bits):
    ids, _ = sample("golden/hf")
    model = make_model(packed("golden/hf", bits), capacity=0)
    np.testing.assert_allclose(logits(model, ids[:40], 7), model.reference(ids[:40]), atol=2e-5)


K_SLOTS, QUARTER = "K slots", "a quarter"
SETTINGS = {
    "chunks of 64": dict(chunk=64),
    "chunks of 7": dict(chunk=7),
    "token by token": dict(chunk=1),
    "K slots in all": dict(capacity=K_SLOTS),
    "a quarter of the slots": dict(capacity=QUARTER, chunk=64),
    "no slots": dict(capacity=0, chunk=64),
    "one thread": dict(capacity=0, threads=1),
    "blocks in 3 pieces": dict(capacity=QUARTER, split=3),
    "direct": dict(capacity=QUARTER, reader="direct"),
    "direct, pieces": dict(capacity=0, reader="direct", threads=1, split=3, form="stacked"),
    "mmap": dict(capacity=QUARTER, reader="mmap", split=3),
    "stacked": dict(form="stacked", chunk=64),
    "stacked, few slots": dict(form="stacked", capacity=K_SLOTS, split=3),
    "gather": dict(variant="gather", chunk=64),
    "by expert": dict(variant="by_expert", chunk=64),
    "by expert, few slots": dict(variant="by_expert", capacity=K_SLOTS, chunk=7),
    "gather, stacked, few slots": dict(variant="gather", form="stacked", capacity=QUARTER, chunk=7),
}


@on_cpu
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [*GOLDEN, "next"])
def test_same_bits_in_every_setting(packed, sample, make_model, use_kernels, name, setting):
    settings = dict(SETTINGS[setting])
    use_kernels("mlx" if "variant" in settings else None)
    path, ids = packed(name), sample(name)[0][:90]
    if settings.get("reader") == "direct":
        skip_if_refused(path / "packed.json")
    expected = logits(make_model(path), ids)
    chunk = settings.pop("chunk", 512)
    if "capacity" in settings:
        settings["capacity"] = slots_nbytes(make_model(path), settings["capacity"])
    np.testing.assert_array_equal(logits(make_model(path, **settings), ids, chunk), expected)


@on_cpu
@pytest.mark.parametrize("name", [*GOLDEN, "next"])
def test_streamed_is_resident(packed, sample, open_engine, name):
    ids, _ = sample(name)
    resident = open_engine(packed(name), resident=True)
    streamed = open_engine(packed(name), bank_gb=0)
    np.testing.assert_array_equal(resident.logits(ids), streamed.logits(ids, prefill_chunk=64))


def slots_nbytes(model, capacity):
    """The capacity in bytes."""
    pool = model.layers[0].fetch.bank.pool(0)
    count = {0: 0, K_SLOTS: model.config.num_experts_per_tok, QUARTER: pool.slots // 4}
    return count[capacity] * pool.layout.block_nbytes


def skip_if_refused(path):
    if hasattr(os, "O_DIRECT"):
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            pytest.skip(f"the file system of {path} refuses O_DIRECT")
