"""What can only be shown on a GPU: skipped where MLX runs on the CPU.

Run with MLX_ENABLE_TF32=0: CUDA's default float32 product rounds its operands to 10 bits. Then
float32 activations stay within 1e-4 of float64 (other summation orders than on a CPU, but nothing
lost); with bfloat16 activations, the default, each of the 50 or so roundings of a token costs up to
2**-9, and 5 % rms is the bound.
"""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

NAMES = sorted(
    path.name for path in (Path(__file__).parent / "data").iterdir() if (path / "ref.npz").exists()
)
pytestmark = pytest.mark.skipif(mx.default_device() == mx.cpu, reason="MLX runs on the CPU here")


@pytest.fixture(params=["golden/hf", "golden/mlx4", *[name for name in NAMES if name != "golden"]])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_float32_logits(packed, sample, open_engine, name):
    if os.environ.get("MLX_ENABLE_TF32") != "0":
        pytest.skip("set MLX_ENABLE_TF32=0")
    ids, truth = sample(name)
    found = open_engine(packed(name), dtype="float32").logits(ids)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found.argmax(-1), truth.argmax(-1))


def test_bfloat16_logits(packed, sample, open_engine, name):
    ids, truth = sample(name)
    found = open_engine(packed(name)).logits(ids)
    error = np.linalg.norm(found - truth) / np.linalg.norm(truth)
    agreement = (found.argmax(-1) == truth.argmax(-1)).mean()
    print(f"{name}: relative rms {error:.2e}, argmax agreement {agreement:.2%}")
    assert error < 5e-2


@pytest.mark.parametrize("source", ["golden/hf", "golden/mlx4", "next_mlx4"])
def test_streamed_gives_the_tokens_of_resident(packed, sample, open_engine, source):
    ids, _ = sample(source)
    resident = open_engine(packed(source), resident=True).generate(ids[:20], 40)
    streamed = open_engine(packed(source), bank_gb=1e-4).generate(ids[:20], 40)
    assert streamed.tokens == resident.tokens
    assert len(streamed.tokens) >= 1
