"""Make the small model fixtures in this folder, with transformers as the judge.

Each fixture is a folder with a tiny random model in one of the layouts that the loader must
read, and a ``ref.npz`` that holds, for 100 random token ids,

* ``ids``: the token ids (int64),
* ``ref``: the logits of transformers in float32, fed token by token with its cache (float32),
* ``ref64``: the logits of transformers' own modelling code run in float64 (float64).

For ``ref64`` the modelling file of transformers is executed a second time with each hard-coded
float32 replaced by float64 (see ``float64_module``). The truth thus comes from code that is not
part of this project. All reference logits are computed from the files as written, read back.

The committed files were made with transformers 5.23.0, torch 2.13.0 (CPU), mlx-lm 0.32.2,
mlx 0.32.4, safetensors 0.8.0 and numpy 2.4.6. The same versions give the same bytes. Another
version can give other random weights or names.

Run it with ``python tests/data/make_fixtures.py`` to write all fixtures again, or name some of
them as arguments. It needs torch, transformers and mlx-lm (``next_mlx4`` only). The tests need
none of them: they read the files.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
TOKENS = 100
VOCAB = 128
MAX_BYTES = 1_200_000
MIN_ROUTER_GAP = 5e-5
MAX_ERROR = 2e-5

LINEAR = "linear_attention"
FULL = "full_attention"

#: Sizes common to all fixtures. Every matrix has an input dimension that is a multiple of 64.
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

#: A vision tower of a few hundred numbers. Its tensors are stored in ``rect`` only.
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 1,
    "patch_size": 2,
    "temporal_patch_size": 1,
    "spatial_merge_size": 1,
    "num_position_embeddings": 4,
    "out_hidden_size": 8,
}

#: Parameters that the published checkpoints keep in float32 while all else is bfloat16.
KEPT_FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")


@dataclass(frozen=True)
class Fixture:
    """One fixture: a model architecture, its sizes and the way it is stored."""

    architecture: str
    seed: int
    text: dict[str, Any] = field(default_factory=dict)
    #: Fused experts (the published Qwen3.5 layout) or one tensor per expert and matrix.
    fused: bool = True
    dtype: torch.dtype = torch.bfloat16
    #: Keep ``KEPT_FLOAT32`` in float32, as published, instead of casting everything.
    published_mix: bool = False
    shard_bytes: int | None = None
    #: Store the vision tower and a few ``mtp.`` tensors, all of which a loader must skip.
    extras: bool = False
    #: Entries written to the (text) config after transformers has saved it.
    text_config_patch: dict[str, Any] = field(default_factory=dict)


WRAPPER = "Qwen3_5MoeForConditionalGeneration"
TEXT_ONLY = "Qwen3_5MoeForCausalLM"
NEXT = "Qwen3NextForCausalLM"

FIXTURES: dict[str, Fixture] = {
    "rect": Fixture(
        WRAPPER,
        seed=11,
        text={
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "layer_types": [LINEAR, FULL, LINEAR, FULL],
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        extras=True,
        text_config_patch={"full_attention_interval": 2},
    ),
    "gqa8": Fixture(
        TEXT_ONLY,
        seed=21,
        text={"num_attention_heads": 8, "num_key_value_heads": 1},
    ),
    "layer_types": Fixture(
        WRAPPER,
        seed=3,
        text={
            "num_hidden_layers": 5,
            "layer_types": [FULL, LINEAR, LINEAR, FULL, LINEAR],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 64,
        },
    ),
    "split": Fixture(
        WRAPPER,
        seed=4,
        text={
            "num_hidden_layers": 3,
            "layer_types": [LINEAR, LINEAR, FULL],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
        },
        fused=False,
        dtype=torch.float32,
    ),
    "sharded": Fixture(
        WRAPPER,
        seed=5,
        text={"num_experts_per_tok": 4},
        shard_bytes=300_000,
    ),
    "bf16": Fixture(
        WRAPPER,
        seed=61,
        text={"num_attention_heads": 4, "num_key_value_heads": 2},
        published_mix=True,
    ),
    "next": Fixture(
        NEXT,
        seed=7,
        text={
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        fused=False,
    ),
}


def make_config(fixture: Fixture) -> Any:
    """Return the transformers configuration of a fixture."""
    text = TEXT | fixture.text
    rotary = text["head_dim"] // 4
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    if fixture.architecture == NEXT:
        return transformers.Qwen3NextConfig(**text, rope_parameters=rope)
    side = rotary // 8
    rope |= {"mrope_interleaved": True, "mrope_section": [rotary // 2 - 2 * side, side, side]}
    text["rope_parameters"] = rope
    if fixture.architecture == TEXT_ONLY:
        return transformers.Qwen3_5MoeTextConfig(**text)
    return transformers.Qwen3_5MoeConfig(text_config=text, vision_config=VISION)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter with random numbers of a scale that keeps the model well conditioned.

    The embedding has a standard deviation of 1, so that rounding errors do not grow from layer to
    layer, and no parameter keeps a trivial initial value that could hide a bug.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(p: torch.Tensor, std: float, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(p.shape, generator=rng)

    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if name.endswith("embed_tokens.weight"):
                p.copy_(normal(p, 1.0))
            elif name.endswith("A_log"):
                p.copy_(torch.log(0.05 + 2.0 * torch.rand(p.shape, generator=rng)))
            elif name.endswith("dt_bias"):
                p.copy_(normal(p, 1.0, mean=-1.0))
            elif name.endswith("linear_attn.norm.weight"):
                p.copy_(normal(p, 0.2, mean=1.0))
            elif name.endswith("conv1d.weight"):
                p.copy_(normal(p, 0.5))
            elif p.ndim == 1:
                p.copy_(normal(p, 0.2))
            elif name.endswith("mlp.gate.weight"):
                p.copy_(normal(p, 1.5 / math.sqrt(p.shape[-1])))
            else:
                p.copy_(normal(p, 1.0 / math.sqrt(p.shape[-1])))


def extra_tensors() -> dict[str, torch.Tensor]:
    """Return tiny tensors with the names of the multi-token-prediction head, not to be loaded."""
    names = ("mtp.fc.weight", "mtp.layers.0.mlp.experts.0.gate_proj.weight", "mtp.norm.weight")
    return {name: torch.full((2, 2), 9.0, dtype=torch.bfloat16) for name in names}


def write_model(fixture: Fixture, folder: Path) -> None:
    """Make the random model of a fixture and store it in a folder."""
    torch.manual_seed(fixture.seed)
    model = getattr(transformers, fixture.architecture)(make_config(fixture)).eval()
    randomise(model, fixture.seed)
    exact = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(KEPT_FLOAT32)}
    model.to(fixture.dtype)
    if fixture.published_mix:
        for name, value in exact.items():
            model.get_parameter(name).data = value
    model.generation_config.eos_token_id = [3, 2]
    state = model.state_dict()
    if not fixture.extras:
        state = {name: value for name, value in state.items() if ".visual." not in name}
    model.save_pretrained(
        folder,
        state_dict=state,
        save_original_format=not fixture.fused,
        **({"max_shard_size": fixture.shard_bytes} if fixture.shard_bytes else {}),
    )
    if fixture.extras:
        path = folder / "model.safetensors"
        save_file(load_file(path) | extra_tensors(), path, metadata={"format": "pt"})
    if fixture.text_config_patch:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config.get("text_config", config).update(fixture.text_config_patch)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_model(folder: Path) -> torch.nn.Module:
    """Read a stored model back with transformers, in float32."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    missing = [name for name in info["missing_keys"] if ".visual." not in name]
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise RuntimeError(f"{folder.name}: transformers did not read the file well: {info}")
    return model.eval()


def float64_module(name: str) -> types.ModuleType:
    """Execute a modelling module of transformers with float64 in place of each hard-coded float32.

    The source is the installed one. Only three spellings change: ``torch.float32`` and
    ``torch.float`` become ``torch.float64``, and ``.float()`` becomes ``.double()``. That covers
    the norms, the rotary frequencies, the softmaxes and the gated delta rule.
    """
    original = importlib.import_module(name)
    path = str(original.__file__)
    source = Path(path).read_text()
    source = re.sub(r"torch\.float(32)?\b(?!\d)", "torch.float64", source)
    source = source.replace(".float()", ".double()")
    module = types.ModuleType(name + "_float64")
    module.__file__ = path
    module.__package__ = original.__package__
    sys.modules[module.__name__] = module
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def to_float64(model: torch.nn.Module) -> torch.nn.Module:
    """Return the float64 twin of a float32 model."""
    module = float64_module(type(model).__module__)
    twin = getattr(module, type(model).__name__)(model.config)
    if type(model).__name__ == WRAPPER:
        # The wrapper asks AutoModel for its language model, which finds the float32 code again.
        twin.model.language_model = module.Qwen3_5MoeTextModel(model.config.text_config)
    twin.to(torch.float64).load_state_dict(model.state_dict(), strict=True)
    return twin.eval()


@contextmanager
def router_gaps(model: torch.nn.Module) -> Iterator[list[float]]:
    """Record the gap in probability between the last chosen and the first refused expert."""
    gaps: list[float] = []

    def hook(top_k: int) -> Callable[..., None]:
        def record(_module: torch.nn.Module, _args: Any, output: Any) -> None:
            best = output[0].softmax(-1).topk(top_k + 1, dim=-1).values
            gaps.append(float((best[:, top_k - 1] - best[:, top_k]).min()))

        return record

    handles = [
        m.register_forward_hook(hook(m.top_k))
        for m in model.modules()
        if type(m).__name__.endswith("TopKRouter")
    ]
    try:
        yield gaps
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def token_by_token(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    """Return the logits [T, vocab] of a model fed one token at a time with its cache."""
    cache, rows = None, []
    for token in ids:
        out = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, 0])
    return torch.stack(rows).numpy()


@dataclass(frozen=True)
class Report:
    """What was measured on one fixture."""

    name: str
    bytes: int
    error: float
    prefill: float
    gap: float
    largest: float


def write_reference(folder: Path, model: torch.nn.Module, seed: int) -> Report:
    """Compute and store the reference logits of a float32 model, and check them."""
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB, TOKENS))
    ref = token_by_token(model, ids)
    twin = to_float64(model)
    with router_gaps(twin) as gaps:
        ref64 = token_by_token(twin, ids)
    with torch.inference_mode():
        prefill64 = twin(input_ids=ids.view(1, -1), use_cache=False).logits[0].numpy()
    np.savez_compressed(folder / "ref.npz", ids=ids.numpy(), ref=ref, ref64=ref64)
    for path in folder.iterdir():
        path.chmod(0o644)

    report = Report(
        name=folder.name,
        bytes=sum(path.stat().st_size for path in folder.iterdir()),
        error=float(np.abs(ref - ref64).max()),
        prefill=float(np.abs(prefill64 - ref64).max()),
        gap=min(gaps),
        largest=float(np.abs(ref64).max()),
    )
    print(
        f"{report.name:12} {report.bytes:9,} bytes  |ref-ref64| {report.error:.1e}"
        f"  float64 prefill-decode {report.prefill:.1e}  router gap {report.gap:.1e}"
        f"  max |logit| {report.largest:.2f}"
    )
    checks = {
        "dtypes": (ids.dtype, ref.dtype, ref64.dtype) == (torch.int64, np.float32, np.float64),
        "float32 agrees with float64": report.error < MAX_ERROR,
        "float64 prefill agrees with decode, so nothing is float32": report.prefill < 1e-11,
        "router gap": report.gap > MIN_ROUTER_GAP,
        "size": report.bytes < MAX_BYTES,
    }
    failed = [name for name, good in checks.items() if not good]
    if failed:
        raise RuntimeError(f"{folder.name}: failed checks: {failed}")
    return report


def write_mlx4(source: Path, folder: Path) -> None:
    """Convert a qwen3_next fixture to 4 bits, group 64, as ``mlx_lm.convert`` does.

    The steps of ``mlx_lm.convert`` are called one by one, since it asks for a tokenizer. mlx-lm
    reads the rotary settings from flat keys, which transformers 5 no longer writes.
    """
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    rope = json.loads((source / "config.json").read_text())["rope_parameters"]
    flat = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
    model, config = load_model(source, model_config=flat)
    model, config = quantize_model(model, config, group_size=64, bits=4)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    shutil.copy(source / "generation_config.json", folder)


def read_mlx4(folder: Path) -> torch.nn.Module:
    """Return a float32 transformers model with the dequantised values of a converted model."""
    import mlx.core as mx

    config = json.loads((folder / "config.json").read_text())
    stored = mx.load(str(folder / "model.safetensors"))
    values: dict[str, torch.Tensor] = {}
    for name, array in stored.items():
        if name.endswith((".scales", ".biases")):
            continue
        base = name.removesuffix(".weight")
        if base + ".scales" in stored:
            quant = config["quantization"] | config["quantization"].get(base, {})
            scales, biases = (
                stored[f"{base}.{part}"].astype(mx.float32) for part in ("scales", "biases")
            )
            array = mx.dequantize(array, scales, biases, quant["group_size"], quant["bits"])
        values[name] = torch.from_numpy(np.array(array.astype(mx.float32)))

    state: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        if name.endswith("conv1d.weight"):
            state[name] = value.movedim(2, 1)
        elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            state[name] = value - 1.0  # mlx-lm stores 1 + w; the difference is exact
        elif ".switch_mlp." not in name:
            state[name] = value
        elif name.endswith(".gate_proj.weight"):
            up = values[name.replace("gate_proj", "up_proj")]
            target = name.replace("switch_mlp.gate_proj.weight", "experts.gate_up_proj")
            state[target] = torch.cat((value, up), dim=1)
        elif name.endswith(".down_proj.weight"):
            state[name.replace("switch_mlp.down_proj.weight", "experts.down_proj")] = value

    model_config = transformers.Qwen3NextConfig.from_pretrained(folder)
    del model_config.quantization_config
    model_config._attn_implementation = "eager"
    model_config._experts_implementation = "eager"
    model = transformers.Qwen3NextForCausalLM(model_config)
    model.load_state_dict({k: v.contiguous() for k, v in state.items()}, strict=True)
    return model.eval()


def check_mlx4(folder: Path) -> float:
    """Return the largest difference between mlx-lm in float32 and the stored ``ref64``."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    with np.load(folder / "ref.npz") as ref:
        logits = np.array(model(mx.array(ref["ids"])[None])[0])
        return float(np.abs(logits - ref["ref64"]).max())


def main(names: list[str]) -> None:
    """Write the named fixtures, or all of them."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
    for name in names or [*FIXTURES, "next_mlx4"]:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        if name == "next_mlx4":
            write_mlx4(HERE / "next", folder)
            write_reference(folder, read_mlx4(folder), FIXTURES["next"].seed)
            print(f"{name:12} mlx-lm in float32 against ref64: {check_mlx4(folder):.1e}")
        else:
            write_model(FIXTURES[name], folder)
            write_reference(folder, read_model(folder), FIXTURES[name].seed)


if __name__ == "__main__":
    main(sys.argv[1:])
