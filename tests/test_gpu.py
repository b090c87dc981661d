"""What can only be shown on a GPU: skipped where MLX runs on the CPU.

Run with MLX_ENABLE_TF32=0: CUDA's default float32 product rounds its operands to 10 bits. Then
float32 activations stay within 1e-4 of float64 (other summation orders than on a CPU, but nothing
lost). With bfloat16 activations, the default, each of the 50 or so roundings of a token costs up to
2**-9; models of width 64 do not average that out, hence 5 % rms, with the experts that float32
chose: one flipped choice of two experts moves a tiny model's logits by more than all the rounding.
"""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import flashmoe_lab as fl
from flashmoe_lab.checkpoint.synthetic import SyntheticSource
from flashmoe_lab.config import geometries
from flashmoe_lab.gather import gathered_mlp

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
    routings = {}

    def keep(routing, path):
        mx.eval(routing.logits, routing.experts, routing.weights)  # crosses to another thread
        return routings.setdefault(path, routing)

    exact = open_engine(packed(name), dtype="float32")
    with exact.intercept("layers.*.router", keep):
        exact.logits(ids)
    rounded = open_engine(packed(name))
    own = rounded.logits(ids)
    with rounded.intercept("layers.*.router", lambda _, path: routings[path]):
        found = rounded.logits(ids)
    error, free = (np.linalg.norm(x - truth) / np.linalg.norm(truth) for x in (found, own))
    agreement = (own.argmax(-1) == truth.argmax(-1)).mean()
    print(f"{name}: relative rms {error:.2e} ({free:.2e} with its own routing), "
          f"argmax agreement {agreement:.2%}")  # fmt: skip
    assert error < 5e-2


@pytest.mark.parametrize("source", ["golden/hf", "golden/mlx4", "next_mlx4"])
def test_streamed_gives_the_tokens_of_resident(packed, sample, open_engine, source):
    ids, _ = sample(source)
    resident = open_engine(packed(source), resident=True).generate(ids[:20], 40)
    streamed = open_engine(packed(source), bank_gb=1e-4).generate(ids[:20], 40)
    assert streamed.tokens == resident.tokens
    assert len(streamed.tokens) >= 1


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two layers as wide as the 397B's, with 48 experts each, at 4 bits: 0.75 GB."""
    config = geometries()["397b"]
    text = config.get("text_config", config)
    text["num_experts"], text["vocab_size"] = 48, 4096
    source = SyntheticSource(config, 2, fl.Quantization(bits=4, group_size=64))
    path = tmp_path_factory.mktemp("wide") / "packed"
    fl.pack(fl.PackPlan.make(source, path, fl.PackSettings.of(None)))
    return path


@pytest.mark.parametrize("bank_gb", [0, 0.15, 0.4])
def test_wide_layers_streamed_have_the_bits_of_resident(wide, open_engine, bank_gb):
    """Where this fails, the first line that differs says what: bytes in slots, one token after
    another, or a whole prompt."""
    ids = list(range(65, 77))
    resident, streamed = open_engine(wide, resident=True), open_engine(wide, bank_gb=bank_gb)
    again = resident.logits(ids)
    np.testing.assert_array_equal(resident.logits(ids), again, err_msg="resident, twice")
    found = streamed.logits(ids), streamed.logits(ids)
    for layer, expert in streamed.bank.contents() if bank_gb else []:
        place = streamed.bank.place(layer, [expert]).slots[expert]
        truth = resident.bank.place(layer, [expert]).slots[expert]
        for name, stack in streamed.bank.pool(layer).components.items():
            same = stack[place] == resident.bank.pool(layer).components[name][truth]
            assert same.all().item(), f"layer {layer} expert {expert} {name}: wrong in its slot"
    by_token = [engine.logits(ids, prefill_chunk=1) for engine in (resident, streamed)]
    np.testing.assert_array_equal(by_token[1], by_token[0], err_msg="token after token")
    for logits in found:
        error = np.linalg.norm(logits - again) / np.linalg.norm(again)
        print(f"bank {bank_gb} GB: a prompt at once differs by {error:.1e} rms")
        assert error < 1e-2


def test_experts_far_into_a_large_stack():
    """MLX's matrix kernel reads another slot beyond 2^32 codes: 1100 slots of 4096 x 1024."""
    parts = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows, columns = (4096, 1024) if name == "down_proj" else (1024, 4096)
        scales = mx.random.uniform(0.5, 1.5, (1100, rows, columns // 64)) / 8 / columns**0.5
        parts |= {
            f"{name}.weight": mx.random.randint(
                0, 2**32 - 1, (1100, rows, columns // 8), mx.uint32
            ),
            f"{name}.scales": scales.astype(mx.bfloat16),
            f"{name}.biases": (-7.5 * scales).astype(mx.bfloat16),
        }
    slots, quantization = (
        np.array([7, 900, 1021, 1024, 1099]),
        fl.Quantization(bits=4, group_size=64),
    )
    near = {name: stack[mx.array(slots)] for name, stack in parts.items()}
    for tokens in (1, 12):
        x = mx.random.normal((tokens, 4096)).astype(mx.bfloat16)
        pairs = np.arange(5) % tokens
        far = gathered_mlp(x, pairs, slots, parts, quantization)
        truth = gathered_mlp(x, pairs, np.arange(5), near, quantization)
        assert mx.array_equal(far, truth).item(), f"{tokens} tokens"
