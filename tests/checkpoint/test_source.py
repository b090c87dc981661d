"""Published checkpoints in every layout give one form, and what is not as expected is refused."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab.checkpoint.source import Source, normalise
from flashmoe_lab.checkpoint.tensor_file import read_header
from flashmoe_lab.config import LINEAR, PROJECTIONS, Quantization, is_matrix

HF = ["golden/hf", "rect", "gqa8", "layer_types", "split", "sharded", "bf16", "next"]
MLX = ["golden/mlx4", "next_mlx4"]
L0 = "language_model.model.layers.0."  # MLX's prefix in golden/mlx4


def stored(directory):
    """Every tensor as it lies in the files, by its name there."""
    return {
        name: ref.read()
        for file in sorted(directory.glob("*.safetensors"))
        for name, ref in read_header(file)[0].items()
    }


def by_short_name(directory):
    prefixes = ("model.language_model.", "language_model.model.", "model.")
    tensors = {}
    for name, tensor in stored(directory).items():
        if ".visual." in name or name.startswith("mtp."):
            continue
        for prefix in prefixes:
            if name.startswith(prefix):
                name = "model." + name.removeprefix(prefix)
                break
        tensors[name.removeprefix("language_model.")] = tensor
    return tensors


def resident(source, name, max_nbytes=1 << 30):
    """A resident tensor put together from its slices."""
    slices = list(source.resident_slices(name, max_nbytes))
    return {part: np.concatenate([s[part].data for s in slices]) for part in slices[0]}


def fixtures_of(source):
    return by_short_name(source.path)


# Resident tensors


def centred(name):
    short = name.split(".")[-2]
    return short in ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm") or (
        name == "model.norm.weight"
    )


@pytest.mark.parametrize("name", HF)
def test_hugging_face_tensors_get_mlx_conventions(data, name):
    source = Source(data(name))
    files = fixtures_of(source)
    assert not source.is_mlx
    for tensor in source.config.resident_shapes():
        if tensor not in files:
            assert name == "next" and "in_proj" in tensor
            continue
        found, expected = resident(source, tensor)["weight"], files[tensor]
        if centred(tensor):
            assert source.resident_dtype(tensor) == "F32"
            assert np.array_equal(found, expected.float32() + np.float32(1))
        elif tensor.endswith("conv1d.weight"):
            assert found.shape == (source.config.conv_dim, 4, 1)
            assert np.array_equal(found[:, :, 0], expected.data[:, 0, :])
        else:
            assert source.resident_dtype(tensor) == expected.dtype
            assert np.array_equal(found, expected.data)


@pytest.mark.parametrize("name", MLX)
def test_mlx_tensors_are_taken_as_they_are(data, name):
    source = Source(data(name))
    files = fixtures_of(source)
    assert source.is_mlx
    for tensor in source.config.resident_shapes():
        base = tensor.removesuffix(".weight")
        parts = resident(source, tensor)
        assert set(parts) == ({"weight", "scales", "biases"} if is_matrix(tensor) else {"weight"})
        for part, found in parts.items():
            if base == tensor:
                assert np.array_equal(found, files[tensor].data)
            elif f"{base}.{part}" in files:
                assert np.array_equal(found, files[f"{base}.{part}"].data)
            else:
                assert name == "next_mlx4" and "in_proj" in tensor


def deinterleaved(config, qkvz, ba):
    """qwen3_next's fused projections taken apart row by row: for each key head q, k, the values
    and gates of its r value heads; then b and a of its r value heads."""
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    ratio = config.linear_num_value_heads // config.linear_num_key_heads
    rows = {part: [] for part in "qkvzba"}
    row = 0
    for _ in range(config.linear_num_key_heads):
        for part, count in (("q", key), ("k", key), ("v", ratio * value), ("z", ratio * value)):
            rows[part] += [qkvz[row + i] for i in range(count)]
            row += count
    assert row == len(qkvz)
    row = 0
    for _ in range(config.linear_num_key_heads):
        for part in "ba":
            rows[part] += [ba[row + i] for i in range(ratio)]
            row += ratio
    assert row == len(ba)
    found = {part: np.stack(found) for part, found in rows.items()}
    return {
        "qkv": np.concatenate([found["q"], found["k"], found["v"]]),
        **{part: found[part] for part in "zba"},
    }


@pytest.mark.parametrize("name, parts", [("next", 1), ("next_mlx4", 3)])
def test_interleaved_projections_come_apart(data, name, parts):
    source = Source(data(name))
    files, config = fixtures_of(source), source.config
    for layer, kind in enumerate(config.layer_types):
        if kind != LINEAR:
            continue
        base = f"model.layers.{layer}.linear_attn.in_proj_"
        for part in ("weight", "scales", "biases")[:parts]:
            qkvz, ba = (files[f"{base}{fused}.{part}"].data for fused in ("qkvz", "ba"))
            for short, expected in deinterleaved(config, qkvz, ba).items():
                found = resident(source, f"{base}{short}.weight")[part]
                assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", ["golden/hf", "golden/mlx4", "bf16"])
def test_slices_are_small_and_make_the_whole(data, name):
    source = Source(data(name))
    for tensor in ("model.embed_tokens.weight", "model.layers.0.linear_attn.conv1d.weight"):
        whole = resident(source, tensor)
        row_nbytes = sum(part[0].nbytes for part in whole.values())
        for limit in (1, 3 * row_nbytes, 1000, 10**9):
            slices = list(source.resident_slices(tensor, limit))
            sizes = [sum(p.data.nbytes for p in parts.values()) for parts in slices]
            assert max(sizes) <= max(limit, row_nbytes)
            for part, expected in whole.items():
                joined = np.concatenate([parts[part].data for parts in slices])
                assert np.array_equal(joined, expected)


def test_mlx_and_hugging_face_agree_on_the_same_model(data):
    """golden/mlx4 was converted from golden/hf, so what it did not quantise must be equal."""
    ours, theirs = Source(data("golden/hf")), Source(data("golden/mlx4"))
    shapes = ours.config.resident_shapes()
    for name in (n for n in shapes if not is_matrix(n)):
        assert np.array_equal(resident(ours, name)["weight"], resident(theirs, name)["weight"])
        assert resident(ours, name)["weight"].shape == shapes[name]


def test_norms_are_decided_for_the_whole_checkpoint(data, variant):
    """A checkpoint in MLX's form that nothing quantised: layer 3 has no convolution of its own to
    tell, and its norms must still be left alone."""

    def to_mlx(tensors):
        for name in list(tensors):
            if centred(name.removeprefix("model.language_model.")) or centred(
                name.replace("language_model.", "", 1)
            ):
                tensors[name] = tensors[name] + 1
            elif name.endswith("conv1d.weight"):
                tensors[name] = tensors[name].swapaxes(1, 2)

    source, original = Source(variant("golden/hf", to_mlx)), Source(data("golden/hf"))
    assert source.is_mlx
    for name in source.config.resident_shapes():
        assert np.array_equal(
            resident(source, name)["weight"], resident(original, name)["weight"]
        ), name


# Experts


@pytest.mark.parametrize("name", HF)
def test_unquantised_experts(data, name):
    source = Source(data(name))
    files, half = fixtures_of(source), source.config.moe_intermediate_size
    for layer in range(source.config.num_hidden_layers):
        base = f"model.layers.{layer}.mlp.experts."
        assert source.expert_quantization(layer) is None
        for expert in range(source.config.num_experts):
            found = source.expert(layer, expert)
            assert list(found) == list(PROJECTIONS)
            if f"{base}gate_up_proj" in files:
                fused = files[f"{base}gate_up_proj"].data[expert]
                down = files[f"{base}down_proj"].data[expert]
                expected = {"gate_proj": fused[:half], "up_proj": fused[half:], "down_proj": down}
            else:
                expected = {p: files[f"{base}{expert}.{p}.weight"].data for p in PROJECTIONS}
            for projection, matrix in expected.items():
                assert list(found[projection]) == ["weight"]
                assert found[projection]["weight"].dtype == source.expert_dtype(layer)
                assert np.array_equal(found[projection]["weight"].data, matrix)


@pytest.mark.parametrize("name", MLX)
def test_quantised_experts_are_slabs(data, name):
    source = Source(data(name))
    files = fixtures_of(source)
    for layer in range(source.config.num_hidden_layers):
        assert source.expert_quantization(layer) == Quantization(bits=4, group_size=64)
        for expert in range(source.config.num_experts):
            for projection, parts in source.expert(layer, expert).items():
                assert list(parts) == ["weight", "scales", "biases"]
                for part, tensor in parts.items():
                    stack = files[f"model.layers.{layer}.mlp.switch_mlp.{projection}.{part}"]
                    assert tensor.dtype == stack.dtype
                    assert np.array_equal(tensor.data, stack.data[expert])


@pytest.mark.parametrize("name", MLX)
def test_bits_of_each_matrix(data, name):
    source = Source(data(name))
    for tensor in filter(is_matrix, source.config.resident_shapes()):
        gate = tensor.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
        assert source.quantization(tensor) == Quantization(bits=8 if gate else 4, group_size=64)


def test_dtypes(data):
    source = Source(data("bf16"))
    assert source.dtype("model.layers.0.linear_attn.A_log") == "F32"
    assert source.dtype("model.layers.0.linear_attn.dt_bias") == "BF16"
    assert source.quantization("lm_head.weight") is None
    assert Source(data("next_mlx4")).dtype("lm_head.weight") == "BF16"


def test_split_and_fused_experts_are_the_same(data, variant):
    def split(tensors):
        for name in [n for n in tensors if n.endswith("experts.gate_up_proj")]:
            base = name.removesuffix("gate_up_proj")
            fused, down = tensors.pop(name), tensors.pop(base + "down_proj")
            half = fused.shape[1] // 2
            for e in range(fused.shape[0]):
                tensors[f"{base}{e}.gate_proj.weight"] = fused[e, :half]
                tensors[f"{base}{e}.up_proj.weight"] = fused[e, half:]
                tensors[f"{base}{e}.down_proj.weight"] = down[e]

    ours, theirs = Source(variant("rect", split)), Source(data("rect"))
    for expert in range(4):
        for projection, parts in theirs.expert(2, expert).items():
            found = ours.expert(2, expert)[projection]["weight"]
            assert np.array_equal(found.data, parts["weight"].data)


# What is left aside, and what identifies a checkpoint


@pytest.mark.parametrize(
    "name, skipped",
    [("rect", {"vision": 21, "mtp": 3}), ("golden/hf", {"vision": 21}), ("bf16", {})],
)
def test_vision_and_mtp_are_counted(data, name, skipped):
    source = Source(data(name))
    assert source.skipped == skipped
    assert not any("visual" in ref or "mtp" in ref for ref in source.refs)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("vision_tower.blocks.0.norm1.weight", "vision"),
        ("model.visual.merger.norm.weight", "vision"),
        ("mtp.layers.0.mlp.experts.0.gate_proj.weight", "mtp"),
        ("language_model.mtp.norm.weight", "mtp"),
        ("model.mtp.fc.weight", "mtp"),
    ],
)
def test_names_that_are_left_aside(variant, name, kind):
    source = Source(variant("gqa8", lambda tensors: tensors.update({name: mx.zeros((2, 2))})))
    assert source.skipped == {kind: 1}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.language_model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("language_model.model.layers.0.mlp.gate", "model.layers.0.mlp.gate"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_names_are_normalised(name, expected):
    assert normalise(name) == expected


def test_kept_files_are_the_small_ones(variant):
    directory = variant("sharded")
    small = ("tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE", "spiece.model")
    for name in small:
        (directory / name).write_text(name)
    for name in ("model.safetensors.index.json", "packed.json", "README.md", "model.bin"):
        (directory / name).write_text('{"weight_map": {"x": "model.safetensors"}}')
    kept = Source(directory).kept_files()
    assert set(kept) == {*small, "config.json"}
    assert kept["tokenizer.json"] == b"tokenizer.json"


def test_identity_is_that_of_the_content(data, variant):
    same = [Source(data("bf16")).identity, Source(data("bf16")).identity]
    assert same[0] == same[1]
    others = [
        variant("bf16", config=lambda c: c.update(eos_token_id=9), to="config"),
        variant("bf16", lambda t: t.update({"mtp.x": mx.zeros((1,))}), to="places"),
    ]
    assert len({same[0], *(Source(path).identity for path in others)}) == 3


def test_a_fine_tuned_checkpoint_has_another_identity(variant):
    """Same names, shapes, places and config; other weights."""

    def tune(tensors):
        for name, array in tensors.items():
            if array.dtype == mx.bfloat16:
                tensors[name] = array * 2

    before, after = variant("bf16", lambda t: None), variant("bf16", tune, to="tuned")
    assert Source(before).identity != Source(after).identity


# What is refused


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape, dtype=mx.float32):
    return lambda tensors: tensors.update({name: mx.zeros(shape, dtype)})


HF_L0 = "model.language_model.layers.0."


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("golden/hf", put("model.extra.weight", 3), "not explain 1 tensors: model.extra.weight"),
        ("golden/hf", put(HF_L0 + "mlp.gate.bias", 8), "explain 1 .*layers.0.mlp.gate.bias"),
        (
            "golden/hf",
            put("model.language_model.layers.4.input_layernorm.weight", 128),
            "layers.4.input_layernorm",
        ),
        ("split", put(HF_L0 + "mlp.experts.4.up_proj.weight", 64, 64), "experts.4.up_proj"),
        ("golden/hf", remove("lm_head.weight"), "tensor lm_head.weight is missing"),
        ("golden/hf", remove(HF_L0 + "mlp.gate.weight"), "layers.0.mlp.gate.weight is missing"),
        ("next", remove("model.layers.1.linear_attn.in_proj_ba.weight"), "layers.1.*in_proj_b"),
        ("golden/hf", remove(HF_L0 + "mlp.experts.down_proj"), "layer 0, expert 0.*down_proj"),
        ("golden/hf", remove(HF_L0 + "mlp.experts.gate_up_proj"), "layer 0, expert 0.*gate_proj"),
        (
            "split",
            remove("model.language_model.layers.2.mlp.experts.3.up_proj.weight"),
            "layer 2, expert 3: tensor .*experts.3.up_proj.weight is missing",
        ),
        (
            "split",
            remove(HF_L0 + "mlp.experts.0.gate_proj.weight"),
            "layer 0, expert 0: tensor .*experts.0.gate_proj.weight is missing",
        ),
        (
            "golden/mlx4",
            remove(L0 + "mlp.switch_mlp.up_proj.weight"),
            "layer 0, expert 0: .*up_proj",
        ),
        ("golden/hf", put(HF_L0 + "mlp.gate.weight", 9, 128), r"\[9, 128\].*\[8, 128\]"),
        ("golden/hf", put("model.language_model.norm.weight", 64), r"\[64\].*\[128\]"),
        ("golden/hf", put(HF_L0 + "linear_attn.conv1d.weight", 256, 4), "layer 0.*conv1d"),
        ("golden/hf", put(HF_L0 + "linear_attn.conv1d.weight", 256, 4, 1), "some layers are in"),
        (
            "golden/hf",
            put(HF_L0 + "linear_attn.A_log", 4, dtype=mx.int32),
            "A_log is I32; expected one of F32, F16, BF16",
        ),
        (
            "golden/hf",
            put(HF_L0 + "mlp.experts.gate_up_proj", 8, 64, 128),
            r"layer 0: .*gate_up_proj is \[8, 64, 128\], expected \[8, 128, 128\]",
        ),
        (
            "golden/hf",
            put(HF_L0 + "mlp.experts.down_proj", 7, 128, 64),
            "layer 0: .*down_proj holds 7 experts, config.json says 8",
        ),
        (
            "split",
            put(HF_L0 + "mlp.experts.2.down_proj.weight", 64, 32),
            r"layer 0, expert 2: .*down_proj.* is .*\[64, 32\].*\[64, 64\]",
        ),
        (
            "golden/mlx4",
            put("language_model.lm_head.weight", 512, 32, dtype=mx.uint32),
            "lm_head: config.json says .*'bits': 4.* mean {'bits': 8, 'group_size': 64}",
        ),
        (
            "golden/mlx4",
            put(L0 + "mlp.gate.scales", 8, 4),
            "layers.0.mlp.gate: config.json says .* mean {'bits': 8, 'group_size': 32}",
        ),
        (
            "golden/mlx4",
            put(L0 + "mlp.switch_mlp.gate_proj.weight", 8, 64, 32, dtype=mx.uint32),
            "switch_mlp.gate_proj: config.json says",
        ),
        (
            "golden/mlx4",
            put(L0 + "mlp.gate.weight", 8, 32),
            "layers.0.mlp.gate: config.json says",
        ),
        # Shapes and parts that must be held against config.json when it is opened
        ("next", put("model.layers.0.linear_attn.in_proj_qkvz.weight", 700, 64), "in_proj_qkvz"),
        ("next", put("model.layers.0.linear_attn.in_proj_ba.weight", 11, 64), "in_proj_ba"),
        ("next", put("model.layers.0.linear_attn.in_proj_qkvz.weight", 640, 32), "in_proj_qkvz"),
        ("golden/mlx4", remove(L0 + "mlp.gate.biases"), "layers.0.mlp.gate.*biases"),
        ("golden/mlx4", put(L0 + "mlp.gate.scales", 7, 2), "layers.0.mlp.gate"),
        ("golden/mlx4", put(L0 + "mlp.gate.biases", 8, 4), "layers.0.mlp.gate"),
        ("golden/mlx4", put(L0 + "mlp.gate.scales", 0), "layers.0.mlp.gate"),
        ("golden/mlx4", put(L0 + "mlp.gate.weight", 256, dtype=mx.uint32), "layers.0.mlp.gate"),
        (
            "golden/mlx4",
            remove(L0 + "mlp.switch_mlp.up_proj.biases"),
            "layer 0.*up_proj.*biases",
        ),
        (
            "golden/mlx4",
            put(L0 + "mlp.switch_mlp.up_proj.weight", 8, 32, 16, dtype=mx.uint32),
            "layer 0.*up_proj",
        ),
        ("golden/mlx4", put(L0 + "mlp.switch_mlp.up_proj.scales", 7, 64, 2), "layer 0.*up_proj"),
        (
            "golden/hf",
            put(HF_L0 + "mlp.experts.down_proj", 8, 128, 64, dtype=mx.int32),
            "layer 0.* I32",
        ),
        (
            "golden/hf",
            put(HF_L0 + "mlp.experts.down_proj", 8, 128, 64, dtype=mx.bfloat16),
            "layer 0.*BF16",
        ),
        (
            "split",
            put(HF_L0 + "mlp.experts.2.up_proj.weight", 64, 64, dtype=mx.float16),
            "layer 0, expert 2.*F16",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_when_opened(variant, name, change, message):
    directory = variant(name, change)
    with pytest.raises(ValueError, match=message) as caught:
        Source(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"bits": 3}, "config.json says .*'bits': 3.* mean {'bits': 4, 'group_size': 64}"),
        ({"group_size": 32}, "'group_size': 32.* mean {'bits': 4, 'group_size': 64}"),
        ({"mode": "mxfp4"}, "quantization of the model is 'mxfp4'; only 'affine'"),
        (
            {"language_model.model.layers.1.mlp.gate": {"bits": 4, "group_size": 64}},
            "layers.1.mlp.gate: config.json says .*'bits': 4.* mean {'bits': 8",
        ),
        (
            {"language_model.lm_head": {"bits": 4, "group_size": 64, "mode": "nvfp4"}},
            "quantization of lm_head is 'nvfp4'",
        ),
    ],
)
def test_quantisation_that_contradicts_the_shapes(variant, entry, message):
    directory = variant("golden/mlx4", config=lambda c: c["quantization"].update(entry))
    with pytest.raises(ValueError, match=message):
        Source(directory)


def test_quantisation_that_config_does_not_mention_is_read_from_the_shapes(variant):
    directory = variant("golden/mlx4", config=lambda c: c.pop("quantization"))
    assert Source(directory).quantization("lm_head.weight") == Quantization(bits=4)


def test_matrices_of_one_layer_must_agree(variant):
    def requantise(tensors):
        base = L0 + "mlp.switch_mlp.down_proj."
        wide = mx.dequantize(*(tensors[base + p] for p in ("weight", "scales", "biases")))
        for part, array in zip(
            ("weight", "scales", "biases"), mx.quantize(wide, bits=8), strict=True
        ):
            tensors[base + part] = array

    def config(entry):
        path = "language_model.model.layers.0.mlp.switch_mlp.down_proj"
        entry["quantization"][path] = {"bits": 8, "group_size": 64}

    with pytest.raises(ValueError, match="layer 0: its expert matrices are quantised differently"):
        Source(variant("golden/mlx4", requantise, config))


def test_a_layer_may_have_its_own_bits(variant):
    base = "language_model.model.layers.2.mlp.switch_mlp."

    def requantise(tensors):
        for projection in PROJECTIONS:
            names = [f"{base}{projection}.{part}" for part in ("weight", "scales", "biases")]
            wide = mx.dequantize(*(tensors[name] for name in names))
            tensors.update(zip(names, mx.quantize(wide, bits=8, group_size=32), strict=True))

    def config(entry):
        for projection in PROJECTIONS:
            entry["quantization"][base + projection] = {"bits": 8, "group_size": 32}

    source = Source(variant("golden/mlx4", requantise, config))
    found = [source.expert_quantization(layer) for layer in range(4)]
    four, eight = Quantization(bits=4), Quantization(bits=8, group_size=32)
    assert found == [four, four, eight, four]


# Shards


@pytest.fixture
def sharded(data, tmp_path):
    return shutil.copytree(data("sharded"), tmp_path / "sharded")


def reindex(directory, change):
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    return file


def test_files_that_the_index_does_not_name_are_ignored(sharded):
    expected = Source(sharded).identity
    (sharded / "zz.safetensors").write_bytes(b"not one")
    assert Source(sharded).identity == expected


def test_shards_are_found_without_an_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert len(Source(sharded).refs) == 72


def test_tensor_in_two_shards(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    shutil.copy(sharded / "model-00002-of-00004.safetensors", sharded / "model-2-again.safetensors")
    with pytest.raises(ValueError, match="again.safetensors: tensor .* is also in model-00002-of"):
        Source(sharded)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/model.safetensors", "..", "a/b"])
def test_shard_outside_the_directory(sharded, shard):
    file = reindex(sharded, lambda index: index["weight_map"].update({"x": shard}))
    with pytest.raises(ValueError, match=f"{file}: a shard lies outside"):
        Source(sharded)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("weight_map"),
        lambda index: index.update(weight_map=["a"]),
        lambda index: index.update(weight_map={"lm_head.weight": 3}),
    ],
)
def test_damaged_index(sharded, change):
    file = reindex(sharded, change)
    with pytest.raises(ValueError, match=f"{file}: .*weight_map"):
        Source(sharded)


def test_missing_shard(sharded):
    (sharded / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00003-of-00004.safetensors: no such file"):
        Source(sharded)


def test_cut_off_shard(sharded):
    file = sharded / "model-00003-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file}: cut off: tensor "):
        Source(sharded)


def test_no_weights(variant):
    directory = variant("bf16")
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"{directory}: no .safetensors file in it"):
        Source(directory)


def test_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        Source(tmp_path)
