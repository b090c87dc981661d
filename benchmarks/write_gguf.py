"""Write a packed checkpoint of 4 bits as a GGUF file of Q4_0, for measuring llama.cpp beside us.

The geometry, the bits per weight (4.5 with scales) and the codes are the same. The numbers are not:
Q4_0 knows no bias, so its values are a half step lower, and the order that llama.cpp wants for
DeltaNet's value heads is not made. So the file is good for speed and for nothing else. It needs the
package `gguf`, and has no vocabulary.

    python benchmarks/write_gguf.py PACKED FILE.gguf
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np

from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.checkpoint.tensor_file import read_header
from flashmoe_lab.config import FULL, PROJECTIONS

ARCH = "qwen35moe"
Q4_0_NBYTES = 18  # of 32 values
MIXER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.out_proj": "ssm_out",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
PLAIN = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
}

Entry = tuple[str, tuple[int, ...], bool]  # name, shape as NumPy has it, whether Q4_0


class Exporter:
    """One packed checkpoint on its way into a GGUF file."""

    def __init__(self, checkpoint: PackedCheckpoint) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.tensors = {}
        for file in checkpoint.manifest.resident_files:
            self.tensors |= read_header(checkpoint.path / file)[0]

    def write(self, path: Path) -> None:
        """Write header, then every tensor in turn: memory stays at a few hundred megabytes."""
        writer = gguf.GGUFWriter(path, ARCH)
        self._settings(writer)
        entries = list(self._entries())
        for name, shape, quantized in entries:
            _announce(writer, name, shape, quantized)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        stream = writer.fout[0]
        writer.write_padding(stream, stream.tell())
        for name, shape, quantized in entries:
            for data in self._data(name, shape, quantized):
                stream.write(data.tobytes())
            writer.write_padding(stream, _nbytes(shape, quantized))
        writer.close()

    def _settings(self, writer: gguf.GGUFWriter) -> None:
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
        rotary = int(config.head_dim * config.partial_rotary_factor)
        writer.add_rope_dimension_count(rotary)
        third = rotary // 2 // 3
        writer.add_rope_dimension_sections([rotary // 2 - 2 * third, third, third, 0])
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        writer.add_uint32(f"{ARCH}.full_attention_interval", 4)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("none")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def _entries(self) -> Iterator[Entry]:
        config = self.config
        shapes = config.resident_shapes()
        yield "token_embd.weight", shapes["model.embed_tokens.weight"], True
        yield "output_norm.weight", shapes["model.norm.weight"], False
        yield "output.weight", shapes["lm_head.weight"], True
        for layer in range(config.num_hidden_layers):
            base, block = f"model.layers.{layer}.", f"blk.{layer}."
            for ours, theirs in MIXER.items():
                if base + ours + ".weight" in shapes:
                    yield f"{block}{theirs}.weight", shapes[base + ours + ".weight"], True
            for ours, theirs in PLAIN.items():
                if base + ours in shapes:
                    yield block + theirs, _squeezed(shapes[base + ours]), False
            yield f"{block}ffn_gate_inp.weight", shapes[base + "mlp.gate.weight"], False
            yield f"{block}ffn_gate_inp_shexp.weight", (config.hidden_size,), False
            for projection in PROJECTIONS:
                shape = (config.num_experts, *config.expert_shapes()[projection])
                yield f"{block}ffn_{projection.removesuffix('_proj')}_exps.weight", shape, True

    def _data(self, name: str, shape: tuple[int, ...], quantized: bool) -> Iterator[np.ndarray]:
        if name.endswith("_exps.weight"):
            yield from self._experts(name)
            return
        ours = self._ours(name)
        if quantized:
            yield self._q4_0(ours.removesuffix(".weight"))
            return
        if ours.removesuffix(".weight") in self.checkpoint.manifest.resident_quantization:
            # Routers have 8 bits here; llama.cpp keeps them in float32. Any numbers will do.
            yield np.random.default_rng(0).normal(0, 2 / shape[-1] ** 0.5, shape).astype("<f4")
            return
        values = self.tensors[ours].read().float32()
        if name.endswith("ssm_a"):
            values = -np.exp(values)
        yield np.ascontiguousarray(values.reshape(shape), "<f4")

    def _ours(self, name: str) -> str:
        outer = {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }
        if name in outer:
            return outer[name]
        _, layer, rest = name.split(".", 2)
        back = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in MIXER.items()}
        back |= {theirs: ours for ours, theirs in PLAIN.items()}
        back["ffn_gate_inp.weight"] = "mlp.gate.weight"
        back["ffn_gate_inp_shexp.weight"] = "mlp.shared_expert_gate.weight"
        return f"model.layers.{layer}.{back[rest]}"

    def _q4_0(self, path: str) -> np.ndarray:
        weight = self.tensors[f"{path}.weight"].read().data
        scales = self.tensors[f"{path}.scales"].read().float32()
        return to_q4_0(weight, scales)

    def _experts(self, name: str) -> Iterator[np.ndarray]:
        layer = self.checkpoint.layers[int(name.split(".")[1])]
        projection = name.split("_")[1] + "_proj"
        for expert in range(layer.num_experts):
            part = layer.layout.split(layer.read_block(expert))[projection]
            yield to_q4_0(part["weight"].data, part["scales"].float32())


def to_q4_0(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MLX's codes uint32 [rows, columns / 8] and scales [rows, columns / group] -> Q4_0 blocks.

    MLX's byte j of a group has values 2j and 2j + 1; Q4_0's byte j of 32 has values j and j + 16.
    """
    codes = np.ascontiguousarray(weight).view(np.uint8)
    rows, columns = codes.shape[0], codes.shape[1] * 2
    values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1, 2, 16)
    per_32 = np.repeat(scales, columns // 32 // scales.shape[1], axis=1).astype("<f2")
    blocks = np.empty((rows * columns // 32, Q4_0_NBYTES), np.uint8)
    blocks[:, :2] = per_32.reshape(-1, 1).view(np.uint8)
    blocks[:, 2:] = values[:, 0] | values[:, 1] << 4
    return blocks


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], quantized: bool) -> None:
    nbytes = _nbytes(shape, quantized)
    if quantized:
        stored = (*shape[:-1], shape[-1] // 32 * Q4_0_NBYTES)
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), nbytes, raw_dtype=kind)
    else:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes)


def _nbytes(shape: tuple[int, ...], quantized: bool) -> int:
    count = int(np.prod(shape))
    return count // 32 * Q4_0_NBYTES if quantized else 4 * count


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size > 1)


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("gguf", type=Path)
    options = parser.parse_args()
    checkpoint = PackedCheckpoint(options.packed)
    if checkpoint.config.layer_types[3::4] != (FULL,) * (checkpoint.config.num_hidden_layers // 4):
        raise SystemExit("every fourth layer must be attention, as in the published models")
    if not all(
        f.layout.quantization and f.layout.quantization.bits == 4 for f in checkpoint.layers
    ):
        raise SystemExit("the experts must have 4 bits")
    Exporter(checkpoint).write(options.gguf)
    return 0


if __name__ == "__main__":
    sys.exit(main())
