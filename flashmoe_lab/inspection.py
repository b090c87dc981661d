"""What a model is and what it costs, without loading weights: the content of `flashmoe-lab
inspect`."""

from dataclasses import dataclass
from pathlib import Path

from flashmoe_lab.checkpoint.packed import MANIFEST, PackedCheckpoint
from flashmoe_lab.checkpoint.source import Source
from flashmoe_lab.config import (
    FULL,
    LINEAR,
    ModelConfig,
    Quantization,
    check_num_experts_per_tok,
    geometries,
    is_gate,
    is_matrix,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Figures of a model.

    Attributes:
        title: what was looked at.
        facts: name -> value in words.
        nbytes: name -> bytes.
    """

    title: str
    facts: dict[str, str]
    nbytes: dict[str, float]

    def text(self) -> str:
        """A table for the terminal: bytes in GB (10**9) and GiB (2**30)."""
        wide = max(len(name) for name in (*self.facts, *self.nbytes)) + 2
        lines = [self.title, ""]
        lines += [f"{name:<{wide}}{value}" for name, value in self.facts.items()]
        lines += ["", f"{'':<{wide}}{'bytes':>19}{'GB':>12}{'GiB':>12}"]
        lines += [
            f"{name:<{wide}}{value:>19,.0f}{_short(value / 1e9):>12}{_short(value / 2**30):>12}"
            for name, value in self.nbytes.items()
        ]
        return "\n".join(lines)


def inspect(
    path: str,
    quantization: Quantization | None = None,
    num_experts_per_tok: int | None = None,
) -> Inspection:
    """Look at a packed checkpoint, a published one, a config.json, or a geometry by name.

    Args:
        quantization: what an unquantised model would be packed to; 4 bits without.
        num_experts_per_tok: K for the bytes of a token; the model's own without.

    Raises:
        FileNotFoundError, ValueError: what is wrong, naming the file.
    """
    place = Path(path)
    known = geometries()
    if path in known and not place.exists():
        config = ModelConfig.from_dict(known[path])
        return _planned(f"{path} (published geometry)", config, quantization, num_experts_per_tok)
    if (place / MANIFEST).exists():
        return _packed(PackedCheckpoint(place), num_experts_per_tok)
    if not place.exists():
        raise FileNotFoundError(f"{path}: no such directory; known names are {', '.join(known)}")
    if place.is_file() or not list(place.glob("*.safetensors")):
        config = ModelConfig.read(place)
        return _planned(f"{path} (config only)", config, quantization, num_experts_per_tok)
    source = Source(place)
    found = source.expert_quantization(0)
    layout = "MLX" if source.is_mlx else "Hugging Face"
    inspection = _planned(
        f"{path} (published checkpoint)", source.config, found or quantization, num_experts_per_tok
    )
    skipped = ", ".join(f"{n} {kind}" for kind, n in source.skipped.items()) or "none"
    stored = f"{found.bits} bits" if found else source.expert_dtype(0)
    extra = {"layout": layout, "experts stored as": stored, "tensors left aside": skipped}
    return Inspection(
        title=inspection.title,
        facts={**inspection.facts, **extra},
        nbytes=inspection.nbytes,
    )


def _planned(
    title: str, config: ModelConfig, quantization: Quantization | None, k: int | None
) -> Inspection:
    quantization = quantization or Quantization(bits=4)
    router = Quantization(bits=8, group_size=quantization.group_size)
    expert = config.expert_nbytes(quantization)
    k = _checked_k(config, k)
    words = f"{quantization.bits} bits, group {quantization.group_size} (router 8 bits)"
    return Inspection(
        title=title,
        facts={**_facts(config, k), "figures for": words},
        nbytes={
            "one expert": expert,
            "all experts": expert * config.num_experts * config.num_hidden_layers,
            "resident part": config.resident_nbytes(quantization, router),
            **_running(config),
            f"read per token, K={k}": config.read_nbytes_per_token(quantization, k),
        },
    )


def _packed(checkpoint: PackedCheckpoint, k: int | None) -> Inspection:
    config = checkpoint.config
    k = _checked_k(config, k)
    blocks = [layer.layout.block_nbytes for layer in checkpoint.layers]
    largest = "one expert (block)" if len(set(blocks)) == 1 else "one expert (largest block)"
    return Inspection(
        title=f"{checkpoint.path} (packed checkpoint)",
        facts={
            **_facts(config, k),
            "experts stored as": checkpoint.label,
            "resident stored as": _resident_label(checkpoint),
            "packed from": checkpoint.manifest.source.get("name", "unknown"),
        },
        nbytes={
            largest: max(blocks),
            "all experts": checkpoint.expert_nbytes,
            "resident part": checkpoint.resident_nbytes,
            **_running(config),
            f"read per token, K={k}": k * sum(blocks),
        },
    )


def _resident_label(checkpoint: PackedCheckpoint) -> str:
    found = checkpoint.manifest.resident_quantization
    words: dict[str, str] = {}
    for name, ref in checkpoint.resident.items():
        if is_matrix(name):
            quantization = found.get(name.removesuffix(".weight"))
            kind = "gates" if is_gate(name) else "matrices"
            words[kind] = f"{quantization.bits} bits" if quantization else ref.dtype
    return ", ".join(f"{kind} {word}" for kind, word in words.items())


def _facts(config: ModelConfig, k: int) -> dict[str, str]:
    own = config.num_experts_per_tok
    words = "" if k == own else f" (the model's own: {own})"
    heads = f"{config.num_attention_heads} query, {config.num_key_value_heads} key and value heads"
    delta = f"{config.linear_num_value_heads} value, {config.linear_num_key_heads} key heads"
    return {
        "architecture": config.model_type,
        "layers": f"{config.num_hidden_layers} ({config.layers_of(LINEAR)} GatedDeltaNet, "
        f"{config.layers_of(FULL)} full attention)",
        "hidden size": f"{config.hidden_size}",
        "experts": f"{config.num_experts} a layer, {k} a token{words}, width "
        f"{config.moe_intermediate_size}",
        "shared expert": f"width {config.shared_expert_intermediate_size}",
        "attention": f"{heads} of {config.head_dim}, {config.rotary_dim} rotated",
        "DeltaNet": f"{delta} of {config.linear_value_head_dim} and {config.linear_key_head_dim}",
        "vocabulary": f"{config.vocab_size}",
        "end tokens": ", ".join(map(str, config.eos_token_ids)) or "none named",
    }


def _running(config: ModelConfig) -> dict[str, float]:
    longest = config.max_position_embeddings
    return {
        "KV cache per token (16 bit)": config.kv_nbytes_per_token(),
        f"KV cache at {longest:,} tokens": config.kv_nbytes_per_token() * longest,
        "recurrent state": config.recurrent_nbytes(),
    }


def _checked_k(config: ModelConfig, k: int | None) -> int:
    return check_num_experts_per_tok(
        config.num_experts_per_tok if k is None else k, config.num_experts
    )


def _short(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.6f}"
