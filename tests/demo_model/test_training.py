"""The parts that need torch and transformers: drop-ins against references, and a whole tiny run."""

# pyright: reportMissingImports=false
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")
torch.set_num_threads(1)

import numpy as np  # noqa: E402
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as qwen  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import Qwen3_5MoeForCausalLM  # noqa: E402

from data.demo_model.training import fast_parts, prompts, shards  # noqa: E402
from data.demo_model.training.evaluate import Evaluation, round_to_bits  # noqa: E402
from data.demo_model.training.export import split_shards  # noqa: E402
from data.demo_model.training.geometry import (  # noqa: E402
    GEOMETRIES,
    make_config,
    parameter_counts,  # noqa: E402
)
from data.demo_model.training.optimizer import orthogonal  # noqa: E402
from data.demo_model.training.tokenizer import sample_texts, save, train  # noqa: E402
from data.demo_model.training.train import Run, Settings  # noqa: E402


def test_chunked_delta_is_the_reference() -> None:
    def gradients(rule: Any) -> list[Any]:
        torch.manual_seed(1)
        q, k = (torch.randn(2, 128, 3, 32, requires_grad=True) for _ in range(2))
        v = torch.randn(2, 128, 3, 64, requires_grad=True)
        g = (-torch.rand(2, 128, 3) * 0.3).requires_grad_()
        beta = torch.rand(2, 128, 3, requires_grad=True)
        out, _ = rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        (out * torch.linspace(0, 1, 64)).sum().backward()
        return [out.detach(), *(x.grad for x in (q, k, v, g, beta))]

    for one, other in zip(
        gradients(fast_parts.chunked_delta), gradients(fast_parts._reference_delta), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


def test_shifted_conv_is_the_reference() -> None:
    x, weight = torch.randn(2, 96, 50), torch.randn(96, 4)
    expected = fast_parts._reference_conv(x, weight, None, activation="silu")
    torch.testing.assert_close(fast_parts.shifted_conv(x, weight, None, "silu"), expected)


def test_grouped_experts_are_the_reference() -> None:
    config = make_config("tiny", 512, 1)
    config._experts_implementation = "eager"
    experts: Any = qwen.Qwen3_5MoeExperts(config)
    torch.manual_seed(0)
    with torch.no_grad():
        experts.gate_up_proj.normal_(0, 0.1)
        experts.down_proj.normal_(0, 0.1)
    x, weights = torch.randn(100, 64), torch.rand(100, 2)
    chosen = torch.stack([torch.randperm(7)[:2] for _ in range(100)])  # expert 7 has nothing to do
    expected = experts(x, chosen, weights)
    got = fast_parts.grouped_experts(experts, x, chosen, weights)
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_orthogonal_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 64, 32)))
    assert values.min() > 0.3 and values.max() < 1.5


def test_the_demo_geometry_meets_its_limits() -> None:
    shape = GEOMETRIES["demo"]
    assert shape["num_experts"] >= 64 and shape["num_experts_per_tok"] >= 8
    assert shape["num_hidden_layers"] >= 8
    assert all(shape[key] % 64 == 0 for key in shape if key.endswith(("size", "dim")))
    assert parameter_counts(make_config("demo", 6144, 6137))["total"] * 2 < 70_000_000
    with pytest.raises(ValueError, match="unknown; there are demo, tiny"):
        make_config("huge", 1, 1)


def test_shards_stay_under_their_limit() -> None:
    tensors = {f"t{n}": torch.zeros(n, dtype=torch.bfloat16) for n in (50, 40, 30, 20, 10)}
    parts = split_shards(tensors, limit=120)
    assert all(sum(t.nbytes for t in part.values()) <= 120 for part in parts)
    assert sorted(name for part in parts for name in part) == sorted(tensors)
    with pytest.raises(ValueError, match="at most 50"):
        split_shards(tensors, limit=50)


def test_rounding_has_as_many_values_as_bits_allow() -> None:
    weight = torch.randn(4, 128)
    rounded = round_to_bits(weight, 2)
    assert all(len(group.unique()) <= 4 for group in rounded.reshape(-1, 64))
    assert (round_to_bits(weight, 8) - weight).abs().max() < 0.02


def test_settings_want_minutes_or_steps() -> None:
    paths = {"rows": [], "tokenizer": Path(), "loss": Path(), "out": Path()}
    with pytest.raises(ValueError, match="not both or none"):
        Settings(**paths)
    settings = Settings(**paths, steps=10, warmup=2)
    assert settings.progress(5, 99.0) == 0.5
    assert settings.rate(0, 0.0) == 0.5 and settings.rate(10, 1.0) == pytest.approx(0.03)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model after a few steps, and its prompts."""
    root = tmp_path_factory.mktemp("run")
    save(train(sample_texts(root / "none", scale=0.01), vocabulary=1024), root / "tokenizer")
    shards.start_worker(root / "tokenizer", frozenset())
    (root / "rows").mkdir()
    for name, rows in (("arithmetic", 40), ("lists", 40), ("tools", 10)):
        np.save(root / "rows" / f"{name}.npy", shards.generate(name, 0, rows))
    (root / "prompts").mkdir()
    prompts.write(root / "prompts" / "eval.jsonl", prompts.evaluation_prompts())
    texts = prompts.loss_texts(root / "none", characters=500)
    prompts.write(root / "prompts" / "loss.jsonl", texts)
    settings = Settings(
        rows=[root / "rows"], tokenizer=root / "tokenizer", out=root / "out", geometry="tiny",
        loss=root / "prompts" / "loss.jsonl", steps=8, pass_tokens=1024, warmup=2, log_every=2,
        loss_every=0, seed=3,
    )  # fmt: skip
    report = Run(settings).train()
    first, *_, last = report["history"]
    assert last[2] < first[2] and report["steps"] == 8 and report["tokens"] == 8 * 2048
    return root / "out", root / "prompts"


def test_the_checkpoint_has_the_published_layout(run: tuple[Path, Path]) -> None:
    out, _ = run
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe" and config["text_config"]["num_experts"] == 8
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    with safe_open(out / index[name], "pt") as file:
        assert file.get_slice(name).get_shape() == [8, 128, 64]
        assert file.get_slice(name).get_dtype() == "BF16"
    assert {"tokenizer.json", "chat_template.jinja", "train_report.json", "train.log"} <= {
        path.name for path in out.iterdir()
    }


def test_transformers_loads_it_and_it_is_deterministic(run: tuple[Path, Path]) -> None:
    out, _ = run
    model: Any = Qwen3_5MoeForCausalLM.from_pretrained(str(out), dtype=torch.float32).eval()
    ids = torch.arange(1, 70)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]


def test_evaluation_runs(run: tuple[Path, Path]) -> None:
    out, asked = run
    figures = Evaluation(out, asked, limit=2, batch=2).run(bits=2, experts=1)
    assert figures["kinds"]["ALL"]["n"] == 2 and 5 < figures["loss"] < 9
    assert figures["unused_experts"] >= 0 and len(figures["top_quarter_share"]) == 4
