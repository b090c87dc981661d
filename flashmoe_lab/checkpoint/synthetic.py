"""A checkpoint of any geometry with random weights, for benchmarks at full size without a download.

It can be packed like a published one (its weights then come quantised, as random codes at the speed
of the random numbers), or written in the published layout in bfloat16, to be packed for real.
Weights have zero mean and the size that keeps activations near one, so routing differs from token
to token. It says nothing: the text that it generates is noise, and no statement about quality or
cache policies follows from it.
"""

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from math import log2, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flashmoe_lab.checkpoint.layer_file import Progress
from flashmoe_lab.checkpoint.packed import write_whole
from flashmoe_lab.checkpoint.resident_file import ResidentTensor, write_tensors
from flashmoe_lab.checkpoint.source import Parts, is_centred
from flashmoe_lab.checkpoint.tensor_file import DTYPES, Tensor
from flashmoe_lab.config import (
    PROJECTIONS,
    ModelConfig,
    Quantization,
    Shape,
    is_gate,
    is_matrix,
)

_BF16_ONE = 127 << 7  # exponent bits of 1.0
_UNIFORM_OCTAVE_STD = sqrt(7 / 3)  # of +-[1, 2), uniform
_ROUTER_GAIN = 2.0  # standard deviation of router logits


class SyntheticSource:
    """Random weights of a geometry, with the interface of `Source`.

    Args:
        config: a config.json's content (see `config.geometries`).
        layers: keep this many layers of it; None keeps all.
        quantization: of every matrix; gates have 8 bits. None gives bfloat16.
        seed: equal seeds give equal checkpoints.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        layers: int | None,
        quantization: Quantization | None,
        seed: int = 0,
    ) -> None:
        self.raw = cut_layers(config, layers)
        self.config = ModelConfig.from_dict(self.raw)
        self.seed, self._quantization = seed, quantization
        self.path = Path("synthetic")

    @property
    def identity(self) -> str:
        """What the weights follow from."""
        return json.dumps(["synthetic", 1, self.raw, str(self._quantization), self.seed])

    def kept_files(self) -> dict[str, bytes]:
        """config.json and a tokenizer of single bytes."""
        return {
            "config.json": json.dumps(self.raw, indent=1).encode(),
            "tokenizer.json": _byte_tokenizer().to_str().encode(),
        }

    # The interface of Source

    def quantization(self, name: str) -> Quantization | None:
        """See Source."""
        if self._quantization is None:
            return None
        size = self._quantization.group_size
        return Quantization(bits=8, group_size=size) if is_gate(name) else self._quantization

    def resident_dtype(self, name: str) -> str:
        """See Source."""
        return "F32" if name.endswith(("A_log", "linear_attn.norm.weight")) else "BF16"

    def resident_slices(self, name: str, max_nbytes: int) -> Iterator[Parts]:
        """See Source."""
        shape = self.config.resident_shapes()[name]
        if not is_matrix(name):
            yield {"weight": self._vector(name, shape, shift=1.0 if is_centred(name) else 0.0)}
            return
        step = max(1, max_nbytes // (2 * shape[1]))
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            rng = self._random(name, start)
            std = self._std(name, shape)
            yield _matrix(rng, (rows, shape[1]), std, self.quantization(name))

    def expert_quantization(self, layer: int) -> Quantization | None:
        """See Source."""
        return self._quantization

    def expert_dtype(self, layer: int) -> str:
        """See Source."""
        return "BF16"

    def expert(self, layer: int, expert: int) -> dict[str, Parts]:
        """See Source."""
        return {
            projection: self.expert_matrix(layer, expert, projection) for projection in PROJECTIONS
        }

    def expert_matrix(self, layer: int, expert: int, projection: str) -> Parts:
        """One of an expert's three matrices."""
        shape = self.config.expert_shapes()[projection]
        rng = self._random(projection, layer, expert)
        return _matrix(rng, shape, 1 / sqrt(shape[1]), self._quantization)

    # Random numbers

    def _random(self, name: str, *numbers: int) -> np.random.Generator:
        words = [self.seed, *name.encode(), *numbers]
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(words)))

    def _std(self, name: str, shape: Shape) -> float:
        if "embed_tokens" in name:
            return 1.0
        return (_ROUTER_GAIN if name.endswith("mlp.gate.weight") else 1.0) / sqrt(shape[1])

    def _vector(self, name: str, shape: Shape, shift: float) -> Tensor:
        rng, dtype = self._random(name), self.resident_dtype(name)
        if name.endswith("A_log"):
            values = np.log(rng.uniform(1, 16, shape))
        elif name.endswith("linear_attn.norm.weight"):
            values = rng.uniform(0.9, 1.1, shape)
        else:
            values = rng.uniform(-0.3, 0.3, shape) + shift
        bits = values.astype(np.float32)
        if dtype == "BF16":
            nearest = (bits.view(np.uint32) + 0x8000) >> 16
            return Tensor(dtype=dtype, data=nearest.astype(np.uint16))
        return Tensor(dtype=dtype, data=bits)


def cut_layers(config: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """A config.json's content with fewer layers, of the same kinds in the same order."""
    raw = deepcopy(dict(config))
    text = raw.get("text_config", raw)
    if layers is not None:
        most = text["num_hidden_layers"]
        if not 1 <= layers <= most:
            raise ValueError(f"layers is {layers}; it must be between 1 and {most}")
        text["num_hidden_layers"] = layers
        if text.get("layer_types"):
            text["layer_types"] = text["layer_types"][:layers]
    return raw


def write_published(
    source: SyntheticSource, destination: Path, progress: Progress = lambda nbytes: None
) -> None:
    """Write in Hugging Face's layout, bfloat16 and fused experts, one file a layer.

    Raises:
        FileExistsError: the destination is not empty.
    """
    if destination.exists() and any(destination.iterdir()):
        raise FileExistsError(f"{destination}: is not empty; choose another")
    destination.mkdir(parents=True, exist_ok=True)
    files = published_files(source)
    for name, tensors in files.items():
        write_tensors(destination / name, tensors, progress)
    weight_map = {t: file for file, tensors in files.items() for x in tensors for t in x.stored()}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_whole(destination / "model.safetensors.index.json", json.dumps(index).encode())
    for name, content in source.kept_files().items():
        write_whole(destination / name, content)


def published_files(source: SyntheticSource) -> dict[str, list[ResidentTensor]]:
    """The tensors of the published layout by file."""
    config = source.config
    if config.model_type == "qwen3_next":
        raise ValueError("the published layout is written for qwen3_5_moe only; give --bits N")
    prefix = "model.language_model."
    groups: list[list[ResidentTensor]] = []
    for layer in range(config.num_hidden_layers):
        resident = [_published(source, name, prefix) for name in config.layer_shapes(layer)]
        groups.append([*resident, *_fused_experts(source, layer, prefix)])
    outer = [name for name in config.resident_shapes() if ".layers." not in name]
    groups.append([_published(source, name, prefix) for name in outer])
    count = len(groups)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups)}


def _published(source: SyntheticSource, name: str, prefix: str) -> ResidentTensor:
    shape, dtype = source.config.resident_shapes()[name], source.resident_dtype(name)
    if name.endswith("conv1d.weight"):
        shape = (shape[0], 1, shape[1])

    def slices() -> Iterator[Parts]:
        if is_matrix(name):
            yield from source.resident_slices(name, 64 << 20)
        else:
            yield {"weight": source._vector(name, shape, 0.0)}

    full = name if name.startswith("lm_head") else prefix + name.removeprefix("model.")
    return ResidentTensor(name=full, parts={"weight": (dtype, shape)}, slices=slices)


def _fused_experts(source: SyntheticSource, layer: int, prefix: str) -> list[ResidentTensor]:
    config = source.config
    shapes = config.expert_shapes()
    base = f"{prefix}layers.{layer}.mlp.experts."
    rows, columns = shapes["up_proj"]

    def gate_up() -> Iterator[Parts]:
        for expert in range(config.num_experts):
            for projection in ("gate_proj", "up_proj"):
                yield source.expert_matrix(layer, expert, projection)

    def down() -> Iterator[Parts]:
        for expert in range(config.num_experts):
            yield source.expert_matrix(layer, expert, "down_proj")

    count = config.num_experts
    return [
        ResidentTensor(
            name=base + "gate_up_proj",
            parts={"weight": ("BF16", (count, 2 * rows, columns))},
            slices=gate_up,
        ),
        ResidentTensor(
            name=base + "down_proj",
            parts={"weight": ("BF16", (count, *shapes["down_proj"]))},
            slices=down,
        ),
    ]


def _matrix(
    rng: np.random.Generator, shape: Shape, std: float, quantization: Quantization | None
) -> Parts:
    if quantization is None:
        return {"weight": _bfloat16(rng, shape, std)}
    bits, groups = quantization.bits, shape[1] // quantization.group_size
    words = _words(rng, shape[0] * shape[1] * bits // 8)
    # A power of two makes scale and bias exact in bfloat16, and so the mean exactly zero.
    exponent = round(log2(std / sqrt((4**bits - 1) / 12)))
    sign = rng.integers(0, 2, (shape[0], groups), dtype=np.uint16) << 15
    scales = sign | np.uint16(_BF16_ONE + (exponent << 7))
    half = np.float32(-(2**bits - 1) / 2 * 2.0**exponent)
    bias = np.uint16(half.view(np.uint32) >> 16)
    return {
        "weight": Tensor(dtype="U32", data=words.view(np.uint32).reshape(shape[0], -1)),
        "scales": Tensor(dtype="BF16", data=scales),
        "biases": Tensor(dtype="BF16", data=sign ^ bias),
    }


def _bfloat16(rng: np.random.Generator, shape: Shape, std: float) -> Tensor:
    """Values of either sign, spread evenly over one octave around `std`."""
    exponent = round(log2(std / _UNIFORM_OCTAVE_STD))
    words = _words(rng, int(np.prod(shape)) * DTYPES["BF16"].itemsize).view(np.uint16)
    words &= np.uint16(0x807F)
    words |= np.uint16(_BF16_ONE + (exponent << 7))
    return Tensor(dtype="BF16", data=words.reshape(shape))


def _words(rng: np.random.Generator, nbytes: int) -> np.ndarray:
    words = rng.integers(0, 2**64, -(-nbytes // 8), dtype=np.uint64, endpoint=False)
    return words.view(np.uint8)[:nbytes]


def _byte_tokenizer() -> Tokenizer:
    """One token for each byte, in the byte-level alphabet of the family."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    return tokenizer
