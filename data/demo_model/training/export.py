"""Writes a trained model in the layout of the published checkpoints.

Experts stay fused ([E, 2F, H] and [E, H, F], where transformers' save_pretrained writes one tensor
each), text weights are named model.language_model.*, and the configuration nests a text_config.
transformers and mlx-lm load the folder as it lies.
"""

# pyright: reportMissingImports=false
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 15_900_000
"""Room for tensors in a file; with its header it stays under 16 MB."""

_FLOAT32 = ("A_log", "linear_attn.norm.weight")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def published_tensors(model: Any) -> dict[str, Tensor]:
    """The weights under their published names, bf16 but for the few that are float32 there."""
    tensors = {}
    for name, weight in model.state_dict().items():
        kind = torch.float32 if name.endswith(_FLOAT32) else torch.bfloat16
        published = name if name.startswith("lm_head") else f"model.language_model.{name[6:]}"
        tensors[published] = weight.detach().to("cpu", kind).contiguous()
    return tensors


def split_shards(tensors: dict[str, Tensor], limit: int = SHARD_BYTES) -> list[dict[str, Tensor]]:
    """Groups of tensors of at most `limit` bytes, largest first into the fullest with room."""
    shards: list[dict[str, Tensor]] = []
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        nbytes = tensors[name].nbytes
        if nbytes > limit:
            raise ValueError(f"{name} has {nbytes} bytes; a shard holds at most {limit}")
        with_room = [s for s in shards if sum(t.nbytes for t in s.values()) + nbytes <= limit]
        if not with_room:
            with_room = [{}]
            shards.append(with_room[0])
        with_room[0][name] = tensors[name]
    return shards


def published_config(model: Any) -> dict[str, Any]:
    """config.json."""
    text = model.config.to_dict()
    for key in ("architectures", "_name_or_path", "transformers_version"):
        text.pop(key, None)
    text |= {"dtype": "bfloat16", "full_attention_interval": 4, "use_cache": True}
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": text,
    }


def write_checkpoint(model: Any, tokenizer: Path, out: Path) -> list[Path]:
    """Writes shards, index, configuration and tokenizer; the shards' paths."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("model-*.safetensors"):
        old.unlink()
    tensors = published_tensors(model)
    shards, paths, places = split_shards(tensors), [], {}
    for number, shard in enumerate(shards, 1):
        path = out / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(sorted(shard.items())), path, metadata={"format": "pt"})
        paths.append(path)
        places |= dict.fromkeys(shard, path.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    end = model.config.eos_token_id
    generation = {
        "eos_token_id": [end, end - 2],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    _write_json(out / "model.safetensors.index.json", index)
    _write_json(out / "config.json", published_config(model))
    _write_json(out / "generation_config.json", generation)
    for name in _TOKENIZER_FILES:
        source = tokenizer / name
        if source.exists() and source.resolve() != (out / name).resolve():
            shutil.copyfile(source, out / name)
    return paths


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
