"""The geometry of a model, read from its config.json.

Nothing about a model is compiled into the package: every size comes from here, and so does the
inventory of tensors (names and shapes) that packing, loading, `synth` and the derived figures
share. This module reads JSON only; it opens no weights and knows nothing of MLX.

Tensor names are MLX's, without the `language_model.` prefix that multimodal checkpoints carry.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from numbers import Integral
from pathlib import Path
from typing import Any

SUPPORTED = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
FULL, LINEAR = "full_attention", "linear_attention"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Affine group quantisation: `w = code * scale + bias`, one scale and bias per group of a
    row."""

    bits: int
    group_size: int = 64

    BITS = (2, 3, 4, 5, 6, 8)
    GROUP_SIZES = (32, 64, 128)

    def __post_init__(self) -> None:
        if self.bits not in self.BITS:
            raise ValueError(f"bits is {self.bits}; allowed are {', '.join(map(str, self.BITS))}")
        if self.group_size not in self.GROUP_SIZES:
            allowed = ", ".join(map(str, self.GROUP_SIZES))
            raise ValueError(f"group_size is {self.group_size}; allowed are {allowed}")

    def nbytes(self, shape: Shape, scale_nbytes: int = 2) -> int:
        """Bytes of a quantised matrix of `shape`, scales and biases included."""
        weights = shape[0] * shape[1]
        return weights * self.bits // 8 + weights // self.group_size * 2 * scale_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of one model, in the words of its config.json.

    Attributes that need a word:
        layer_types: "linear_attention" (GatedDeltaNet) or "full_attention", one a layer.
        num_experts_per_tok: K, the experts that the model was trained to use for a token.
        eos_token_ids: every token that ends a text, from config.json and generation_config.json
            together.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    partial_rotary_factor: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"config.json: {field.name} is {value}; it must be at least 1")
        for many, few in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(
                    f"config.json: {many} ({getattr(self, many)}) must be a multiple of "
                    f"{few} ({getattr(self, few)})"
                )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"config.json: num_experts_per_tok is {self.num_experts_per_tok}; "
                f"it must be between 1 and num_experts ({self.num_experts})"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"config.json: layer_types names {len(self.layer_types)} layers, "
                f"num_hidden_layers is {self.num_hidden_layers}"
            )
        unknown = set(self.layer_types) - {FULL, LINEAR}
        if unknown:
            raise ValueError(
                f"config.json: layer_types has {sorted(unknown)}; known are {FULL}, {LINEAR}"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"config.json: partial_rotary_factor {self.partial_rotary_factor} of head_dim "
                f"{self.head_dim} gives {self.rotary_dim} rotary dimensions; "
                "they must be even and positive"
            )

    # Construction

    @classmethod
    def read(cls, path: str | Path) -> "ModelConfig":
        """Read from a checkpoint directory or a config.json, with generation_config.json where it
        lies beside."""
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        config = read_json(file)
        generation = file.parent / "generation_config.json"
        try:
            return cls.from_dict(config, read_json(generation) if generation.exists() else {})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Build from a parsed config.json and, for its stop tokens, generation_config.json.

        Raises:
            ValueError: an architecture, or a setting of one, that this package does not compute.
        """
        text = _object(config, "text_config", config)
        model_type = text.get("model_type", config.get("model_type"))
        if model_type not in SUPPORTED:
            raise ValueError(f"model_type is {model_type!r}; supported are {', '.join(SUPPORTED)}")
        _refuse_unknown_settings(text)
        values: dict[str, Any] = {"model_type": model_type}
        rope = {**text, **_object(text, "rope_parameters", {})}
        for field in fields(cls):
            if field.name in ("model_type", "layer_types", "eos_token_ids"):
                continue
            found = rope.get(field.name)
            if field.name == "tie_word_embeddings":
                found = config.get(field.name, found)
            if found is not None:
                values[field.name] = _checked(field.name, found, field.type)
        values["layer_types"] = _layer_types(text)
        values["eos_token_ids"] = _stop_tokens(config, text, generation or {})
        missing = [
            field.name
            for field in fields(cls)
            if field.name not in values and field.name not in cls._optional()
        ]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        return cls(**values)

    @staticmethod
    def _optional() -> tuple[str, ...]:
        return ("norm_topk_prob", "tie_word_embeddings")

    # Derived sizes

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def linear_key_dim(self) -> int:
        """All DeltaNet key heads side by side."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self) -> int:
        """All DeltaNet value heads side by side."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the DeltaNet convolution: q, k and v side by side."""
        return 2 * self.linear_key_dim + self.linear_value_dim

    def layers_of(self, layer_type: str) -> int:
        """How many layers are of `layer_type`."""
        return self.layer_types.count(layer_type)

    def expert_shapes(self) -> dict[str, Shape]:
        """Shapes [out, in] of one expert's three matrices, in the order of a packed block."""
        hidden, ffn = self.hidden_size, self.moe_intermediate_size
        return {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}

    def layer_shapes(self, layer: int) -> dict[str, Shape]:
        """Names and unquantised shapes of a layer's resident tensors (all but its experts)."""
        hidden, shared = self.hidden_size, self.shared_expert_intermediate_size
        mixer = (
            self._attention_shapes() if self.layer_types[layer] == FULL else self._linear_shapes()
        )
        shapes = {
            "input_layernorm.weight": (hidden,),
            **mixer,
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate.weight": (self.num_experts, hidden),
            "mlp.shared_expert.gate_proj.weight": (shared, hidden),
            "mlp.shared_expert.up_proj.weight": (shared, hidden),
            "mlp.shared_expert.down_proj.weight": (hidden, shared),
            "mlp.shared_expert_gate.weight": (1, hidden),
        }
        return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}

    def _attention_shapes(self) -> dict[str, Shape]:
        hidden, head = self.hidden_size, self.head_dim
        query, key = self.num_attention_heads * head, self.num_key_value_heads * head
        return {
            "self_attn.q_proj.weight": (2 * query, hidden),
            "self_attn.k_proj.weight": (key, hidden),
            "self_attn.v_proj.weight": (key, hidden),
            "self_attn.o_proj.weight": (hidden, query),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
        }

    def _linear_shapes(self) -> dict[str, Shape]:
        hidden, heads = self.hidden_size, self.linear_num_value_heads
        return {
            "linear_attn.in_proj_qkv.weight": (self.conv_dim, hidden),
            "linear_attn.in_proj_z.weight": (self.linear_value_dim, hidden),
            "linear_attn.in_proj_b.weight": (heads, hidden),
            "linear_attn.in_proj_a.weight": (heads, hidden),
            "linear_attn.conv1d.weight": (self.conv_dim, self.linear_conv_kernel_dim, 1),
            "linear_attn.A_log": (heads,),
            "linear_attn.dt_bias": (heads,),
            "linear_attn.norm.weight": (self.linear_value_head_dim,),
            "linear_attn.out_proj.weight": (hidden, self.linear_value_dim),
        }

    def resident_shapes(self) -> dict[str, Shape]:
        """Names and unquantised shapes of everything that stays in memory."""
        shapes: dict[str, Shape] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }
        for layer in range(self.num_hidden_layers):
            shapes.update(self.layer_shapes(layer))
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    # Derived figures, in bytes

    def expert_nbytes(self, quantization: Quantization | None) -> int:
        """Bytes of one expert; unquantised counts bfloat16."""
        return sum(_nbytes(shape, quantization) for shape in self.expert_shapes().values())

    def resident_nbytes(
        self, quantization: Quantization | None, router: Quantization | None = None
    ) -> int:
        """Bytes of everything but the experts; `router` is the quantisation of the two gates."""
        return sum(
            _nbytes(shape, (router if is_gate(name) and router else quantization))
            if is_matrix(name)
            else _nbytes(shape, None)
            for name, shape in self.resident_shapes().items()
        )

    def kv_nbytes_per_token(self, item_nbytes: int = 2) -> int:
        """Bytes that the KV cache of all full-attention layers grows by with each token."""
        per_layer = 2 * self.num_key_value_heads * self.head_dim * item_nbytes
        return self.layers_of(FULL) * per_layer

    def recurrent_nbytes(self, item_nbytes: int = 2) -> int:
        """Bytes of the DeltaNet state, which does not grow: float32 matrices and the convolution's
        last inputs."""
        heads = self.linear_num_value_heads * self.linear_key_head_dim * self.linear_value_head_dim
        conv = (self.linear_conv_kernel_dim - 1) * self.conv_dim
        return self.layers_of(LINEAR) * (heads * 4 + conv * item_nbytes)

    def read_nbytes_per_token(
        self, quantization: Quantization | None, num_experts_per_tok: int | None = None
    ) -> int:
        """Bytes of routed experts that one token needs, before any is found in memory."""
        k = num_experts_per_tok or self.num_experts_per_tok
        return self.num_hidden_layers * k * self.expert_nbytes(quantization)


def check_num_experts_per_tok(value: int, num_experts: int) -> int:
    """Return K if it is allowed, else raise ValueError with the range."""
    if not isinstance(value, Integral) or not 1 <= value <= num_experts:
        raise ValueError(
            f"num_experts_per_tok is {value}; it must be between 1 and {num_experts}, "
            "the number of experts in a layer"
        )
    return value


def is_matrix(name: str) -> bool:
    """Whether a resident tensor takes part in a product, and so may be quantised."""
    vectors = ("norm.weight", "layernorm.weight", "conv1d.weight")
    return name.endswith(".weight") and not name.endswith(vectors)


def is_gate(name: str) -> bool:
    """Whether a tensor is the router or the gate of the shared expert, kept at more bits by
    default."""
    return name.endswith(("mlp.gate.weight", "mlp.shared_expert_gate.weight"))


def stored_parts(
    shape: Shape, quantization: Quantization | None, dtype: str
) -> dict[str, tuple[str, Shape]]:
    """Type and shape of each part that a tensor is stored as: "weight" alone or, quantised,
    "weight", "scales" and "biases"; `dtype` is that of the scales, or of the unquantised weight."""
    if quantization is None:
        return {"weight": (dtype, shape)}
    rows, columns = shape
    groups = (rows, columns // quantization.group_size)
    words = (rows, columns * quantization.bits // 32)
    return {"weight": ("U32", words), "scales": (dtype, groups), "biases": (dtype, groups)}


def geometries() -> dict[str, dict[str, Any]]:
    """The published geometries of the family by short name, each a config.json's content."""
    text = resources.files("flashmoe_lab").joinpath("geometries.json").read_text()
    return {name: entry["config"] for name, entry in json.loads(text).items()}


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object, or raise ValueError or FileNotFoundError naming the file."""
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds {type(value).__name__}, expected an object")
    return value


def _nbytes(shape: Shape, quantization: Quantization | None) -> int:
    if quantization is not None and len(shape) == 2:
        return quantization.nbytes(shape)
    size = 2
    for dim in shape:
        size *= dim
    return size


def _object(parent: Mapping[str, Any], name: str, default: Mapping[str, Any]) -> Mapping[str, Any]:
    value = parent.get(name)
    if value is None:
        return default
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json: {name} is {value!r}; expected an object")
    return value


def _checked(name: str, value: Any, kind: Any) -> Any:
    expected = {int: "int", float: "float", bool: "bool"}
    kind_name = kind if isinstance(kind, str) else expected.get(kind, "")
    right = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "bool": isinstance(value, bool),
    }[kind_name]
    if not right:
        raise ValueError(f"config.json: {name} is {value!r}; expected {kind_name}")
    return float(value) if kind_name == "float" else value


def _refuse_unknown_settings(text: Mapping[str, Any]) -> None:
    rope = _object(text, "rope_parameters", {}) or _object(text, "rope_scaling", {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    expected = {
        "hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "attention_bias": (text.get("attention_bias", False), False),
        "attn_output_gate": (text.get("attn_output_gate", True), True),
        "rope_type": (rope_type, "default"),
        "decoder_sparse_step": (text.get("decoder_sparse_step", 1), 1),
        "mlp_only_layers": (text.get("mlp_only_layers") or [], []),
    }
    for name, (found, only) in expected.items():
        if found != only:
            raise ValueError(f"config.json: {name} is {found!r}; only {only!r} is supported")


def _layer_types(text: Mapping[str, Any]) -> tuple[str, ...]:
    if kinds := text.get("layer_types"):
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"config.json: layer_types is {kinds!r}; expected a list of names")
        return tuple(kinds)
    interval = text.get("full_attention_interval", 4)
    layers = text.get("num_hidden_layers")
    if not isinstance(interval, int) or interval < 1 or not isinstance(layers, int):
        raise ValueError(
            f"config.json: full_attention_interval is {interval!r} and num_hidden_layers "
            f"{layers!r}; both must be positive integers where layer_types is absent"
        )
    return tuple(FULL if (i + 1) % interval == 0 else LINEAR for i in range(layers))


def _stop_tokens(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    found: set[int] = set()
    for config in configs:
        entry = config.get("eos_token_id")
        ids = entry if isinstance(entry, list) else [] if entry is None else [entry]
        found.update(_checked("eos_token_id", token, int) for token in ids)
    return tuple(sorted(found))
