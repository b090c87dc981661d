"""A published checkpoint, read one tensor or one expert at a time, never whole.

Two layouts are understood, each as one safetensors file or as shards:
* Hugging Face's: `model.language_model.layers...`, norms stored zero-centred, convolution [C, 1,
  K], experts stacked (`experts.gate_up_proj`) or one by one (`experts.7.up_proj.weight`);
* MLX's: norms stored with the one added, convolution [C, K, 1], experts stacked (`switch_mlp`),
  quantised in affine groups or not.
What comes out has one form: MLX's names and conventions, with float tensors as `weight` and
quantised ones as `weight`, `scales`, `biases`. Vision and MTP tensors are left aside and counted.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flashmoe_lab.checkpoint.tensor_file import FLOATS, Tensor, TensorRef, read_header
from flashmoe_lab.config import (
    LINEAR,
    PROJECTIONS,
    ModelConfig,
    Quantization,
    is_matrix,
    read_json,
    stored_parts,
)

Parts = dict[str, Tensor]  # "weight" alone, or "weight", "scales" and "biases"
_KEPT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
_SAMPLE_NBYTES = 1024
_COMPONENTS = ("weight", "scales", "biases")
_CENTRED = re.compile(
    r"(input_layernorm|post_attention_layernorm|q_norm|k_norm|model\.norm)\.weight$"
)


class CheckpointSource(Protocol):
    """What packing asks of a checkpoint; see `Source` for what the answers mean."""

    path: Path
    config: ModelConfig

    @property
    def identity(self) -> str: ...  # noqa: D102
    def kept_files(self) -> dict[str, bytes]: ...  # noqa: D102
    def quantization(self, name: str) -> Quantization | None: ...  # noqa: D102
    def resident_dtype(self, name: str) -> str: ...  # noqa: D102
    def resident_slices(self, name: str, max_nbytes: int) -> Iterator[Parts]: ...  # noqa: D102
    def expert_quantization(self, layer: int) -> Quantization | None: ...  # noqa: D102
    def expert_dtype(self, layer: int) -> str: ...  # noqa: D102
    def expert(self, layer: int, expert: int) -> dict[str, Parts]: ...  # noqa: D102


class Source:
    """One checkpoint directory, checked against its config.json when it is opened.

    Attributes:
        config: the geometry.
        refs: where each tensor lies, by normalised name.
        skipped: how many "vision" and "mtp" tensors were left aside.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if (self.path / "packed.json").exists() and (self.path / "experts").is_dir():
            raise ValueError(f"{self.path}: is packed already; give the published checkpoint")
        self.config = ModelConfig.read(self.path)
        self.refs, self.skipped = _collect(self.path)
        self._settings = _quantization_settings(read_json(self.path / "config.json"))
        self._check_inventory()

    @cached_property
    def is_mlx(self) -> bool:
        """Whether the layout is MLX's: decided once for the whole checkpoint, by the convolutions'
        shape."""
        config = self.config
        forms: set[bool] = set()
        for layer, kind in enumerate(config.layer_types):
            ref = self.refs.get(f"model.layers.{layer}.linear_attn.conv1d.weight")
            if kind == LINEAR and ref is not None:
                mlx = (config.conv_dim, config.linear_conv_kernel_dim, 1)
                hugging = (config.conv_dim, 1, config.linear_conv_kernel_dim)
                if ref.shape not in (mlx, hugging):
                    raise ValueError(
                        f"{ref.file}: layer {layer}: tensor {ref.name} is {list(ref.shape)}; "
                        f"expected {list(hugging)} or, in MLX's layout, {list(mlx)}"
                    )
                forms.add(ref.shape == mlx)
        if len(forms) > 1:
            raise ValueError(f"{self.path}: some layers are in MLX's layout and some are not")
        return forms.pop() if forms else bool(self._settings)

    @property
    def identity(self) -> str:
        """A digest of names, shapes, places, and of how each tensor begins: changes when the
        checkpoint is another one."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted({ref.file for ref in self.refs.values()}):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for name, ref in sorted(self.refs.items()):
            digest.update(f"{name} {ref.dtype} {ref.shape} {ref.offset}\n".encode())
            digest.update(ref.head(_SAMPLE_NBYTES))
        return digest.hexdigest()

    # Resident tensors

    def quantization(self, name: str) -> Quantization | None:
        """How a resident matrix is quantised in the source, or None if it is not."""
        first, _ = self._origin(name)
        scales = self.refs.get(_part(first, "scales"))
        if scales is None:
            return None
        return self._derive(first, self.config.resident_shapes()[name][1])

    def dtype(self, name: str) -> str:
        """Storage type of a resident tensor (of its scales, if it is quantised)."""
        first, _ = self._origin(name)
        scales = self.refs.get(_part(first, "scales"))
        return (scales or self.refs[first]).dtype

    def resident_slices(self, name: str, max_nbytes: int) -> Iterator[Parts]:
        """A resident tensor in row slices of at most `max_nbytes` (a single row may be larger).

        Norms come with the one added (float32 if it was added here), convolutions as [C, K, 1].
        """
        first, rows = self._origin(name)
        refs = {
            part: self.refs[_part(first, part)]
            for part in _COMPONENTS
            if _part(first, part) in self.refs
        } or {"weight": self.refs[first]}
        if rows is not None:
            whole = {part: ref.read() for part, ref in refs.items()}
            yield {
                part: Tensor(dtype=tensor.dtype, data=tensor.data[rows])
                for part, tensor in whole.items()
            }
            return
        count = refs["weight"].shape[0]
        row_nbytes = sum(ref.nbytes for ref in refs.values()) // count
        step = max(1, max_nbytes // row_nbytes)
        for start in range(0, count, step):
            stop = min(start + step, count)
            parts = {part: ref.rows(start, stop).read() for part, ref in refs.items()}
            yield {part: self._conventional(name, tensor) for part, tensor in parts.items()}

    def _conventional(self, name: str, tensor: Tensor) -> Tensor:
        if self.is_mlx:
            return tensor
        if is_centred(name):
            # In bfloat16 the sum would lose up to 2**-9 of the weight.
            return Tensor(dtype="F32", data=tensor.float32() + np.float32(1))
        if name.endswith("conv1d.weight"):
            return Tensor(dtype=tensor.dtype, data=np.ascontiguousarray(tensor.data.swapaxes(1, 2)))
        return tensor

    def resident_dtype(self, name: str) -> str:
        """Storage type that `resident_slices` gives an unquantised tensor."""
        return "F32" if not self.is_mlx and is_centred(name) else self.dtype(name)

    def _origin(self, name: str) -> tuple[str, np.ndarray | None]:
        """The tensor in the file that holds `name`, and which of its rows, if they are
        interleaved."""
        if name in self.refs:
            return name, None
        match = re.fullmatch(r"(.*\.linear_attn)\.in_proj_(qkv|z|b|a)\.weight", name)
        if match:
            fused = "qkvz" if match[2] in ("qkv", "z") else "ba"
            candidate = f"{match[1]}.in_proj_{fused}.weight"
            if candidate in self.refs:
                return candidate, _interleaved_rows(self.config)[match[2]]
        raise ValueError(f"{self.path}: tensor {name} is missing")

    def kept_files(self) -> dict[str, bytes]:
        """Content of the small files that go along: configuration, tokenizer, templates."""
        return {
            file.name: file.read_bytes()
            for pattern in _KEPT_FILES
            for file in sorted(self.path.glob(pattern))
            if not file.name.endswith(".index.json") and file.name != "packed.json"
        }

    # Experts

    def expert_quantization(self, layer: int) -> Quantization | None:
        """How a layer's experts are quantised in the source, or None; all three matrices must
        agree."""
        found = {
            projection: self._expert_matrix_quantization(layer, projection)
            for projection in PROJECTIONS
        }
        if len(set(found.values())) > 1:
            raise ValueError(
                f"{self.path}: layer {layer}: its expert matrices are quantised "
                f"differently: {found}"
            )
        return found["gate_proj"]

    def expert_dtype(self, layer: int) -> str:
        """Storage type of a layer's experts (of their scales, if quantised)."""
        parts = self._expert_refs(layer, 0, "down_proj")
        return parts.get("scales", parts["weight"]).dtype

    def expert(self, layer: int, expert: int) -> dict[str, Parts]:
        """One expert's matrices [out, in] by projection."""
        return {
            projection: {
                part: ref.read()
                for part, ref in self._expert_refs(layer, expert, projection).items()
            }
            for projection in PROJECTIONS
        }

    def _expert_refs(self, layer: int, expert: int, projection: str) -> dict[str, TensorRef]:
        base = f"model.layers.{layer}.mlp"
        shape = self.config.expert_shapes()[projection]
        stacked = f"{base}.switch_mlp.{projection}."
        if stacked + "weight" in self.refs:
            return {
                part: self.refs[stacked + part][expert]
                for part in _COMPONENTS
                if stacked + part in self.refs
            }
        fused = "gate_up_proj" if projection != "down_proj" else "down_proj"
        if (ref := self.refs.get(f"{base}.experts.{fused}")) is not None:
            half = self.config.moe_intermediate_size
            rows = (1 if projection == "down_proj" else 2) * shape[0]
            if ref.shape[1:] != (rows, shape[1]):
                raise ValueError(
                    f"{ref.file}: layer {layer}: {ref.name} is {list(ref.shape)}, "
                    f"expected {[self.config.num_experts, rows, shape[1]]}"
                )
            slab = ref[expert]
            if projection == "gate_proj":
                slab = slab.rows(0, half)
            elif projection == "up_proj":
                slab = slab.rows(half, 2 * half)
            return {"weight": slab}
        single = f"{base}.experts.{expert}.{projection}."
        parts = {
            part: self.refs[single + part] for part in _COMPONENTS if single + part in self.refs
        }
        if "weight" not in parts:
            raise ValueError(
                f"{self.path}: layer {layer}, expert {expert}: tensor {single}weight is missing"
            )
        return parts

    def _expert_matrix_quantization(self, layer: int, projection: str) -> Quantization | None:
        parts = self._expert_refs(layer, 0, projection)
        if "scales" not in parts:
            return None
        return self._derive(parts["weight"].name, self.config.expert_shapes()[projection][1])

    # Checks

    def _derive(self, weight_name: str, columns: int) -> Quantization:
        """Bits and group size from the shapes, held against what config.json says of them."""
        weight = self.refs[weight_name]
        scales = self.refs[_part(weight_name, "scales")]
        if not all(weight.shape) or not all(scales.shape):
            raise ValueError(f"{weight.file}: {weight_name} or its scales are empty")
        bits, rest = divmod(weight.shape[-1] * 32, columns)
        group_size, rest_group = divmod(columns, scales.shape[-1])
        path = weight_name.removesuffix(".weight")
        said = {**self._settings.get("", {}), **self._settings.get(path, {})}
        derived = {"bits": bits, "group_size": group_size}
        wrong = {k: v for k, v in said.items() if k in derived and derived[k] != v}
        if rest or rest_group or wrong or weight.dtype != "U32":
            raise ValueError(
                f"{weight.file}: {path}: config.json says {said}, but weight "
                f"{list(weight.shape)} and scales {list(scales.shape)} for {columns} columns "
                f"mean {derived}"
            )
        return Quantization(bits=bits, group_size=group_size)

    def _check_inventory(self) -> None:
        config, used = self.config, set[str]()
        _ = self.is_mlx
        for name, shape in config.resident_shapes().items():
            origin, rows = self._origin(name)
            used.update(_part(origin, part) for part in _COMPONENTS)
            used.add(origin)
            if rows is not None:  # one of two parts; both together hold every row once
                fused = _interleaved_rows(config)
                both = ("qkv", "z") if origin.endswith("qkvz.weight") else ("b", "a")
                shape = (sum(len(fused[part]) for part in both), shape[1])
            self._check_shape(origin, shape, is_matrix(name))
        for layer in range(config.num_hidden_layers):
            used.update(self._check_experts(layer))
        unexplained = sorted(set(self.refs) - used)
        if unexplained:
            some = ", ".join(unexplained[:3])
            raise ValueError(
                f"{self.path}: config.json does not explain {len(unexplained)} tensors: {some}"
            )

    def _check_experts(self, layer: int) -> set[str]:
        names: set[str] = set()
        shapes = self.config.expert_shapes()
        stacked = not any(
            f"model.layers.{layer}.mlp.experts.0.{projection}.weight" in self.refs
            for projection in PROJECTIONS
        )
        experts = range(self.config.num_experts)
        for expert in experts[:1] if stacked else experts:
            for projection in PROJECTIONS:
                parts = self._expert_refs(layer, expert, projection)
                names.update(ref.name for ref in parts.values())
                for ref in parts.values() if stacked else ():
                    if (count := self.refs[ref.name].shape[0]) != len(experts):
                        raise ValueError(
                            f"{ref.file}: layer {layer}: {ref.name} holds {count} experts, "
                            f"config.json says {len(experts)}"
                        )
        quantization, dtype = self.expert_quantization(layer), self.expert_dtype(layer)
        for expert in experts[:1] if stacked else experts:
            for projection, shape in shapes.items():
                parts = self._expert_refs(layer, expert, projection)
                what = f"layer {layer}, expert {expert}: {parts['weight'].name}"
                self._check_parts(what, shape, parts, quantization, dtype)
        return names

    def _check_shape(self, name: str, shape: tuple[int, ...], matrix: bool) -> None:
        ref = self.refs[name]
        if name.endswith("conv1d.weight"):
            return  # is_mlx has checked it
        quantization = None
        if matrix and (scales := self.refs.get(_part(name, "scales"))):
            quantization, dtype = self._derive(name, shape[1]), scales.dtype
        else:
            dtype = ref.dtype
        found = {
            part: self.refs[full]
            for part in _COMPONENTS
            if (full := _part(name, part)) in self.refs
        }
        self._check_parts(f"tensor {name}", shape, found or {"weight": ref}, quantization, dtype)

    def _check_parts(
        self,
        what: str,
        shape: tuple[int, ...],
        found: Mapping[str, TensorRef],
        quantization: Quantization | None,
        dtype: str,
    ) -> None:
        """Hold a tensor's parts against the shape that config.json gives it."""
        file = found["weight"].file
        if dtype not in FLOATS:
            raise ValueError(f"{file}: {what} is {dtype}; expected one of {', '.join(FLOATS)}")
        for part, (kind, stored) in stored_parts(shape, quantization, dtype).items():
            ref = found.get(part)
            if ref is None:
                raise ValueError(f"{file}: {what} has no {part}")
            if (ref.dtype, ref.shape) != (kind, stored):
                raise ValueError(
                    f"{ref.file}: {what}: its {part} is {ref.dtype} {list(ref.shape)}; "
                    f"config.json says {kind} {list(stored)}"
                )


def _collect(path: Path) -> tuple[dict[str, TensorRef], Counter[str]]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
            raise ValueError(f"{index}: weight_map is no object of tensor and file names")
        names = sorted(set(places.values()))
        if any("/" in name or name.startswith("..") for name in names):
            raise ValueError(f"{index}: a shard lies outside the checkpoint's directory")
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: no .safetensors file in it")
    refs: dict[str, TensorRef] = {}
    skipped: Counter[str] = Counter()
    for file in files:
        for raw, ref in read_header(file)[0].items():
            name = normalise(raw)
            if kind := _left_aside(name):
                skipped[kind] += 1
            elif name in refs:
                raise ValueError(f"{file}: tensor {raw} is also in {refs[name].file.name}")
            else:
                refs[name] = TensorRef(
                    name=name, file=file, dtype=ref.dtype, shape=ref.shape, offset=ref.offset
                )
    return refs, skipped


def is_centred(name: str) -> bool:
    """Whether Hugging Face stores this norm's weight without the one that is to be added."""
    return _CENTRED.search(name) is not None


def normalise(name: str) -> str:
    """A tensor's or module's name without the prefix of a multimodal checkpoint."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return name.removeprefix("language_model.")


def _left_aside(name: str) -> str | None:
    if re.match(r"(model\.)?(visual|vision_tower|vision_model|vision)\.", name):
        return "vision"
    if re.match(r"(model\.)?mtp\.", name):
        return "mtp"
    return None


def _part(name: str, part: str) -> str:
    return name.removesuffix(".weight") + "." + part


def _quantization_settings(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json's `quantization`: its defaults under "", per-path overrides under their paths."""
    entry = config.get("quantization") or {}
    settings: dict[str, dict[str, Any]] = {"": {}} if entry else {}
    for key, value in entry.items():
        if isinstance(value, dict):
            settings[normalise(key)] = value
        elif key in ("bits", "group_size", "mode"):
            settings[""][key] = value
    for path, said in settings.items():
        if said.get("mode", "affine") != "affine":
            raise ValueError(
                f"config.json: quantization of {path or 'the model'} is {said['mode']!r}; "
                "only 'affine' is supported"
            )
    return settings


def _interleaved_rows(config: ModelConfig) -> dict[str, np.ndarray]:
    """Rows of qwen3_next's fused projections, which interleave q, k, v, z (and b, a) by key
    head."""
    heads, key = config.linear_num_key_heads, config.linear_key_head_dim
    ratio = config.linear_num_value_heads // heads
    value = ratio * config.linear_value_head_dim
    qkvz = np.arange(heads * 2 * (key + value)).reshape(heads, -1)
    ba = np.arange(heads * 2 * ratio).reshape(heads, -1)
    parts = np.split(qkvz, [key, 2 * key, 2 * key + value], axis=1)
    q, k, v, z = (part.ravel() for part in parts)
    b, a = (part.ravel() for part in np.split(ba, 2, axis=1))
    return {"qkv": np.concatenate([q, k, v]), "z": z, "b": b, "a": a}
