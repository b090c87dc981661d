"""Geometries are read whole and right, and what is not computed is refused by name."""

import copy
import json
from math import prod
from pathlib import Path

import pytest

from flashmoe_lab.config import (
    FULL,
    LINEAR,
    ModelConfig,
    Quantization,
    check_num_experts_per_tok,
    geometries,
    is_gate,
    is_matrix,
    read_json,
)

DATA = Path(__file__).parent / "data"
FOUR, EIGHT = Quantization(bits=4), Quantization(bits=8)
HF = json.loads((DATA / "golden/hf/config.json").read_text())


def changed(**text):
    """The golden model's config.json with other values in its text_config; None removes one."""
    config = copy.deepcopy(HF)
    config["text_config"].update(text)
    config["text_config"] = {k: v for k, v in config["text_config"].items() if v is not None}
    return config


# fixture: model type, layers that attend in full, experts, K, stop tokens
FIXTURES = {
    "golden/hf": ("qwen3_5_moe_text", {3}, 8, 3, (2,)),
    "golden/mlx4": ("qwen3_5_moe_text", {3}, 8, 3, (2,)),
    "rect": ("qwen3_5_moe_text", {1, 3}, 4, 2, (2, 3)),
    "gqa8": ("qwen3_5_moe_text", {3}, 6, 3, (2, 3)),
    "layer_types": ("qwen3_5_moe_text", {0, 3}, 4, 2, (2, 3)),
    "split": ("qwen3_5_moe_text", {2}, 4, 2, (2, 3)),
    "sharded": ("qwen3_5_moe_text", {3}, 6, 4, (2, 3)),
    "bf16": ("qwen3_5_moe_text", {3}, 6, 3, (2, 3)),
    "next": ("qwen3_next", {3}, 4, 2, (2, 3)),
    "next_mlx4": ("qwen3_next", {3}, 4, 2, (2, 3)),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_every_fixture_reads(name):
    model_type, full, experts, k, stop = FIXTURES[name]
    config = ModelConfig.read(DATA / name)
    assert config.model_type == model_type
    assert {i for i, kind in enumerate(config.layer_types) if kind == FULL} == full
    assert (config.num_experts, config.num_experts_per_tok) == (experts, k)
    assert config.eos_token_ids == stop
    assert config.rope_theta == 1e7
    assert config.rotary_dim == config.head_dim // 4
    assert ModelConfig.read(DATA / name / "config.json") == config


# Published geometries


@pytest.mark.parametrize(
    "name, expert, per_token, experts",
    [
        ("397b", 7_077_888, 4_246_732_800, 217.43e9),
        ("122b", 5_308_416, 2_038_431_744, 65.23e9),
        ("35b", 1_769_472, 566_231_040, 18.12e9),
    ],
)
def test_published_expert_figures(name, expert, per_token, experts):
    config = ModelConfig.from_dict(geometries()[name])
    assert config.expert_nbytes(FOUR) == expert
    assert config.read_nbytes_per_token(FOUR) == per_token
    total = config.num_hidden_layers * config.num_experts * expert
    assert total == pytest.approx(experts, rel=1e-4)


@pytest.mark.parametrize("name", geometries())
def test_expert_is_three_matrices_at_any_bits(name):
    config = ModelConfig.from_dict(geometries()[name])
    weights = 3 * config.hidden_size * config.moe_intermediate_size
    assert config.expert_nbytes(None) == 2 * weights
    for bits in Quantization.BITS:
        for group_size in Quantization.GROUP_SIZES:
            expected = weights * (bits + 32 / group_size) / 8
            quantization = Quantization(bits=bits, group_size=group_size)
            assert config.expert_nbytes(quantization) == expected


def test_397b_state_and_resident_figures():
    config = ModelConfig.from_dict(geometries()["397b"])
    assert (config.layers_of(LINEAR), config.layers_of(FULL)) == (45, 15)
    assert config.layer_types[3] == FULL and config.layer_types[59] == FULL
    assert (config.conv_dim, config.linear_key_dim, config.linear_value_dim) == (12288, 2048, 8192)
    assert config.kv_nbytes_per_token() == 30_720
    assert config.kv_nbytes_per_token() * 262_144 == pytest.approx(8.05e9, rel=1e-3)
    assert config.recurrent_nbytes() == 188_743_680 + 45 * 3 * 12288 * 2
    assert config.recurrent_nbytes(4) == 188_743_680 + 45 * 3 * 12288 * 4
    assert config.resident_nbytes(FOUR) == pytest.approx(5.5e9, rel=0.01)
    assert config.rotary_dim == 64
    assert config.eos_token_ids == (248044, 248046)


def test_397b_parameters_by_kind():
    shapes = ModelConfig.from_dict(geometries()["397b"]).resident_shapes()

    def billions(*words):
        found = [prod(s) for n, s in shapes.items() if any(word in n for word in words)]
        return round(sum(found) / 1e9, 3)

    assert billions("embed_tokens", "lm_head") == 2.034
    assert billions("linear_attn") == 5.311
    assert billions("self_attn") == 1.573
    assert billions("shared_expert") == 0.755
    assert billions("mlp.gate.") == 0.126


def test_read_per_token_follows_k():
    config = ModelConfig.from_dict(geometries()["397b"])
    assert config.read_nbytes_per_token(FOUR, 4) == 60 * 4 * 7_077_888


def test_router_bits_count_in_the_resident_bytes():
    config = ModelConfig.read(DATA / "golden/hf")
    gates = [n for n in config.resident_shapes() if is_gate(n)]
    assert len(gates) == 2 * config.num_hidden_layers
    weights = sum(prod(config.resident_shapes()[n]) for n in gates)
    more = config.resident_nbytes(FOUR, EIGHT) - config.resident_nbytes(FOUR)
    assert more == weights * 4 // 8


@pytest.mark.parametrize(
    "name, matrix, gate",
    [
        ("model.embed_tokens.weight", True, False),
        ("model.layers.0.mlp.gate.weight", True, True),
        ("model.layers.0.mlp.shared_expert_gate.weight", True, True),
        ("model.layers.0.mlp.shared_expert.gate_proj.weight", True, False),
        ("model.layers.0.linear_attn.in_proj_qkv.weight", True, False),
        ("model.layers.0.linear_attn.conv1d.weight", False, False),
        ("model.layers.0.linear_attn.norm.weight", False, False),
        ("model.layers.0.linear_attn.A_log", False, False),
        ("model.layers.0.input_layernorm.weight", False, False),
        ("model.layers.3.self_attn.q_norm.weight", False, False),
        ("model.norm.weight", False, False),
    ],
)
def test_kinds_of_tensors(name, matrix, gate):
    assert (is_matrix(name), is_gate(name)) == (matrix, gate)


def test_tied_embeddings_have_no_head():
    config = ModelConfig.from_dict({**HF, "tie_word_embeddings": True})
    assert config.tie_word_embeddings
    assert "lm_head.weight" not in config.resident_shapes()
    assert "lm_head.weight" in ModelConfig.from_dict(HF).resident_shapes()


# Where each value comes from


def test_layer_types_win_over_the_interval():
    kinds = [FULL, LINEAR, FULL, LINEAR]
    config = ModelConfig.from_dict(changed(layer_types=kinds, full_attention_interval=4))
    assert config.layer_types == tuple(kinds)


@pytest.mark.parametrize("interval, full", [(1, {0, 1, 2, 3}), (2, {1, 3}), (4, {3}), (None, {3})])
def test_interval_where_layer_types_is_absent(interval, full):
    config = ModelConfig.from_dict(changed(layer_types=None, full_attention_interval=interval))
    assert {i for i, kind in enumerate(config.layer_types) if kind == FULL} == full


@pytest.mark.parametrize(
    "top, text, generation, expected",
    [
        (None, None, {}, ()),
        (None, 248044, {"eos_token_id": [248046, 248044]}, (248044, 248046)),
        ([5, 6], 7, {"eos_token_id": 8}, (5, 6, 7, 8)),
        (None, 0, {}, (0,)),
    ],
)
def test_stop_tokens_come_from_everywhere(top, text, generation, expected):
    config = {**changed(eos_token_id=text), "eos_token_id": top}
    assert ModelConfig.from_dict(config, generation).eos_token_ids == expected


def test_stop_tokens_of_both_files(tmp_path):
    config = {**changed(eos_token_id=5), "eos_token_id": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelConfig.read(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 6]}))
    assert ModelConfig.read(tmp_path).eos_token_ids == (5, 6, 7)


def test_rope_is_that_of_the_text():
    rope = {"rope_theta": 5e6, "partial_rotary_factor": 0.5, "rope_type": "default"}
    config = ModelConfig.from_dict(changed(rope_parameters=rope))
    assert HF["vision_config"]["rope_parameters"]["rope_theta"] == 1e4
    assert (config.rope_theta, config.rotary_dim) == (5e6, 32)


def test_flat_rope_is_read_too():
    flat = changed(rope_parameters=None, rope_theta=10_000_000, partial_rotary_factor=0.25)
    assert ModelConfig.from_dict(flat) == ModelConfig.from_dict(HF)


@pytest.mark.parametrize("name", ["rope_theta", "partial_rotary_factor"])
def test_missing_rope_value_is_refused(name):
    rope = {k: v for k, v in HF["text_config"]["rope_parameters"].items() if k != name}
    with pytest.raises(ValueError, match=f"lacks {name}$"):
        ModelConfig.from_dict(changed(rope_parameters=rope))


def test_missing_values_are_all_named():
    with pytest.raises(ValueError, match="lacks hidden_size, num_experts$"):
        ModelConfig.from_dict(changed(hidden_size=None, num_experts=None))


# What is refused


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'; supported are qwen3_5_moe,"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type is 'linear'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attn_output_gate": False}, "attn_output_gate is False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_only_layers": [0, 2]}, r"mlp_only_layers is \[0, 2\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok is 9; .* num_experts \(8\)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; it must be at least 1"),
        ({"hidden_size": -128}, "hidden_size is -128"),
        ({"num_attention_heads": 3}, r"num_attention_heads \(3\) .* num_key_value_heads \(2\)"),
        ({"linear_num_value_heads": 5}, r"linear_num_value_heads \(5\) .* \(2\)"),
        ({"num_hidden_layers": 5}, "names 4 layers, num_hidden_layers is 5"),
        ({"layer_types": ["sliding_attention"] * 4}, r"\['sliding_attention'\]; known are"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"layer_types": None, "full_attention_interval": "4"}, "full_attention_interval is '4'"),
        ({"hidden_size": "128"}, "hidden_size is '128'; expected int"),
        ({"num_experts": 8.0}, "num_experts is 8.0; expected int"),
        ({"vocab_size": True}, "vocab_size is True; expected int"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected float"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; expected bool"),
        ({"head_dim": 60}, "gives 15 rotary dimensions"),
        (
            {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 1.5}},
            "partial_rotary_factor 1.5",
        ),
        ({"layer_types": 4}, "layer_types"),
        ({"layer_types": [["full_attention"]] * 4}, "layer_types"),
        ({"rope_parameters": [1e7]}, "rope_parameters"),
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id"),
        ({"eos_token_id": [[2]]}, "eos_token_id"),
    ],
)
def test_refused_by_name_and_value(tmp_path, values, message):
    (tmp_path / "config.json").write_text(json.dumps(changed(**values)))
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize("text", ["qwen", [1]])
def test_text_config_of_a_wrong_type(text):
    with pytest.raises(ValueError, match="text_config"):
        ModelConfig.from_dict({**HF, "text_config": text})


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe{}", b"[1, 2]", b"null"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_bad_json_names_the_file(tmp_path, name, content):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / name}: (not JSON|holds .*object)"):
        ModelConfig.read(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/config.json: no such file"):
        ModelConfig.read(tmp_path)


def test_read_json_reads_utf8(tmp_path):
    (tmp_path / "a.json").write_bytes('{"name": "Übung 日本"}'.encode())
    assert read_json(tmp_path / "a.json") == {"name": "Übung 日本"}


@pytest.mark.parametrize("value", [0, -1, 9])
def test_k_of_a_run_is_checked(value):
    with pytest.raises(ValueError, match=f"num_experts_per_tok is {value}; .* between 1 and 8"):
        check_num_experts_per_tok(value, 8)


@pytest.mark.parametrize("value", [1, 8])
def test_k_of_a_run_in_range(value):
    assert check_num_experts_per_tok(value, 8) == value


@pytest.mark.parametrize("bits", [0, 1, 7, 16])
def test_bits_are_checked(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}; allowed are 2, 3, 4, 5, 6, 8"):
        Quantization(bits=bits)


@pytest.mark.parametrize("group_size", [0, 16, 65])
def test_group_sizes_are_checked(group_size):
    with pytest.raises(ValueError, match=f"group_size is {group_size}; allowed are 32, 64, 128"):
        Quantization(bits=4, group_size=group_size)
