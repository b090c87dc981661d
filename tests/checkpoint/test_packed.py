"""A packed directory opens only when it is whole, and every flipped byte is found by name."""

import json
import shutil

import pytest

from flashmoe_lab.checkpoint.pack import PackPlan, PackSettings, pack
from flashmoe_lab.checkpoint.packed import Manifest, PackedCheckpoint
from flashmoe_lab.checkpoint.source import Source
from flashmoe_lab.config import ModelConfig, Quantization


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """golden/mlx4 packed once; nobody changes this one."""
    data = __file__.rpartition("/checkpoint/")[0] + "/data/golden/mlx4"
    directory = tmp_path_factory.mktemp("packed") / "mlx4"
    pack(PackPlan.make(Source(data), directory, PackSettings.of(None)))
    return directory


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "mlx4")


@pytest.fixture
def edit(directory):
    """Change packed.json as JSON."""

    def change(function):
        file = directory / "packed.json"
        entry = json.loads(file.read_text())
        function(entry)
        file.write_text(json.dumps(entry))
        return file

    return change


def flip(file, at, bit=0):
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1 << bit]))


# Opening


def test_whole_directory_opens(directory, data):
    checkpoint = PackedCheckpoint(str(directory))
    assert checkpoint.path == directory
    assert checkpoint.config == ModelConfig.read(data("golden/mlx4"))
    assert [layer.layer for layer in checkpoint.layers] == [0, 1, 2, 3]
    assert checkpoint.label == "4 bits, group 64"
    expert = checkpoint.layers[0].layout
    assert expert.payload_nbytes == 3 * 64 * 128 // 2 + 3 * 64 * 128 // 64 * 2 * 4
    assert checkpoint.expert_nbytes == 4 * 8 * expert.block_nbytes
    source = Source(data("golden/mlx4"))
    experts = sum(ref.nbytes for name, ref in source.refs.items() if "switch_mlp" in name)
    total = sum(ref.nbytes for ref in source.refs.values())
    assert checkpoint.resident_nbytes == total - experts
    assert checkpoint.manifest.source == {"name": "mlx4", "identity": source.identity}
    assert checkpoint.manifest.resident_quantization["lm_head"] == Quantization(bits=4)
    told = []
    assert list(checkpoint.verify(told.append)) == []
    assert sum(told) == checkpoint.resident_nbytes + checkpoint.expert_nbytes


def test_tilde_is_the_home_directory(directory, monkeypatch):
    monkeypatch.setenv("HOME", str(directory.parent))
    assert PackedCheckpoint(f"~/{directory.name}").path == directory


def test_packed_directory_is_no_source(directory):
    with pytest.raises(ValueError, match="is packed already"):
        Source(directory)


def test_label_names_all_forms(make_source, tmp_path):
    path = make_source()
    plan = PackPlan.make(Source(path), tmp_path / "packed", PackSettings.of(None))
    pack(plan)
    assert PackedCheckpoint(tmp_path / "packed").label == "BF16"


def test_manifest_is_read_as_it_was_written(directory, tmp_path):
    manifest = Manifest.read(directory)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert (tmp_path / "packed.json").read_bytes() == (directory / "packed.json").read_bytes()


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'no'}: no such directory"):
        PackedCheckpoint(tmp_path / "no")


def test_directory_of_something_else(data):
    with pytest.raises(
        FileNotFoundError, match="bf16: not a packed checkpoint .*flashmoe-lab pack"
    ):
        PackedCheckpoint(data("bf16"))


def test_unfinished_packing(directory):
    (directory / "packed.json").rename(directory / "packed.json.partial")
    with pytest.raises(FileNotFoundError, match=f"{directory}: its packing was not finished"):
        PackedCheckpoint(directory)


@pytest.mark.parametrize("version", [2, 99, 0, None, "1"])
def test_other_format_version(edit, directory, version):
    file = edit(lambda entry: entry.update(format_version=version))
    with pytest.raises(ValueError, match=f"{file}: format version {version!r}; this .* reads 1"):
        PackedCheckpoint(directory)


@pytest.mark.parametrize("content", [b"", b'{"format_version": 1, "lay', b"\xff\xfe", b"[]"])
def test_manifest_that_is_no_json(directory, content):
    (directory / "packed.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{directory}/packed.json: (not JSON|holds list)"):
        PackedCheckpoint(directory)


def component(entry, i=0):
    return entry["layers"][2]["components"][i]


DAMAGE = {
    "no layers": lambda e: e.pop("layers"),
    "no resident": lambda e: e.pop("resident"),
    "no files": lambda e: e["resident"].pop("files"),
    "no checksums": lambda e: e["resident"].pop("xxh3_64"),
    "no source": lambda e: e.pop("source"),
    "layers is null": lambda e: e.update(layers=None),
    "layer is text": lambda e: e["layers"].__setitem__(1, "x"),
    "quantization is a list": lambda e: e["resident"].update(quantization=[]),
    "quantization of a list": lambda e: e["resident"]["quantization"].update(lm_head=[4]),
    "unknown key": lambda e: e["resident"]["quantization"]["lm_head"].update(mode="affine"),
    "component without offset": lambda e: component(e).pop("offset"),
    "component of unknown type": lambda e: component(e, 8).update(dtype="F8"),
    "resident bits": lambda e: e["resident"]["quantization"]["lm_head"].update(bits=7),
    "expert bits": lambda e: e["layers"][2].update(bits=7),
    "block_nbytes": lambda e: e["layers"][2].update(block_nbytes=32768),
    "no components": lambda e: e["layers"][2].update(components=[]),
    "files is a number": lambda e: e["resident"].update(files=[7]),
    "checksums is a list": lambda e: e["resident"].update(xxh3_64=[]),
    "checksum left out": lambda e: e["resident"]["xxh3_64"].pop("model.norm.weight"),
    "swapped shape": lambda e: component(e).update(shape=[16, 64]),
    "moved component": lambda e: component(e, 1).update(offset=0),
    "other component": lambda e: component(e, 1).update(name="gate_proj.biases"),
    "other bits, same words": lambda e: e["layers"][2].update(bits=8),
    "other resident bits": lambda e: e["resident"]["quantization"]["lm_head"].update(bits=8),
    "resident left unquantised": lambda e: e["resident"]["quantization"].pop("lm_head"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_manifest(edit, directory, name):
    edit(DAMAGE[name])
    with pytest.raises(ValueError, match=f"^{directory}"):
        PackedCheckpoint(directory)


def test_layers_left_out_of_the_manifest(edit, directory):
    file = edit(lambda entry: entry["layers"].pop())
    with pytest.raises(ValueError, match=f"{file}: describes 3 layers, config.json 4"):
        PackedCheckpoint(directory)


@pytest.mark.parametrize(
    "field, value",
    [("num_experts", 9), ("hidden_size", 256), ("vocab_size", 500), ("head_dim", 32)],
)
def test_config_of_another_model(directory, field, value):
    file = directory / "config.json"
    entry = json.loads(file.read_text())
    entry["text_config"][field] = value
    file.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=f"^{directory}"):
        PackedCheckpoint(directory)


def test_missing_config(directory):
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{directory}/config.json"):
        PackedCheckpoint(directory)


@pytest.mark.parametrize("layer", range(4))
def test_missing_layer(directory, layer):
    file = directory / f"experts/layer_0{layer}.safetensors"
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file}: layer {layer}: the file is missing"):
        PackedCheckpoint(directory)


@pytest.mark.parametrize("layer, expert", [(0, 0), (1, 3), (3, 7)])
def test_cut_off_layer(directory, layer, expert):
    where = PackedCheckpoint(directory).layers[layer]
    content = where.path.read_bytes()
    where.path.write_bytes(content[: where.offset(expert) + 5])
    message = f"{where.path}: layer {layer}: cut off: .* expert {expert} is the first .* not whole"
    with pytest.raises(ValueError, match=message):
        PackedCheckpoint(directory)


@pytest.mark.parametrize("at", [0, 8, 40, 100])
def test_layer_header_that_lies(directory, at):
    file = directory / "experts/layer_01.safetensors"
    flip(file, at)
    with pytest.raises(ValueError, match=f"{file}: layer 1: its header is not the one"):
        PackedCheckpoint(directory)


def test_layers_of_another_checkpoint(directory, make_source, tmp_path):
    path = make_source(experts=8)
    pack(PackPlan.make(Source(path), tmp_path / "other", PackSettings.of(4)))
    file = directory / "experts/layer_00.safetensors"
    shutil.copy(tmp_path / "other/experts/layer_00.safetensors", file)
    with pytest.raises(ValueError, match=f"{file}: layer 0: "):
        PackedCheckpoint(directory)


def test_missing_resident_file(directory):
    (directory / "resident.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="resident.safetensors: no such file"):
        PackedCheckpoint(directory)


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_cut_off_resident_file(directory, size):
    file = directory / "resident.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{file}: .*cut off"):
        PackedCheckpoint(directory)


def test_resident_tensor_under_another_name(directory):
    file = directory / "resident.safetensors"
    content = file.read_bytes()
    assert content.count(b'"lm_head.scales"') == 1
    file.write_bytes(content.replace(b'"lm_head.scales"', b'"lm_head.scalez"'))
    with pytest.raises(ValueError, match="resident tensor lm_head.scales is missing"):
        PackedCheckpoint(directory)


@pytest.mark.parametrize(
    "before, after",
    [
        (b'"lm_head.weight":{"dtype":"U32","shape":[512,16]', b"[256,32]"),
        (b'"model.norm.weight":{"dtype":"F32"', b'"I32"'),
    ],
)
def test_resident_tensor_of_another_form(directory, before, after):
    """As many bytes, so only its name and config.json say that it is wrong."""
    file = directory / "resident.safetensors"
    content = file.read_bytes()
    assert content.count(before) == 1
    file.write_bytes(content.replace(before, before[: -len(after)] + after))
    name = before.decode().split('"')[1]
    with pytest.raises(ValueError, match=f"{file}: .*{name}"):
        PackedCheckpoint(directory)


# Verifying


@pytest.mark.parametrize("layer", range(4))
def test_flipped_byte_in_any_block_is_found(directory, layer):
    checkpoint = PackedCheckpoint(directory)
    where = checkpoint.layers[layer]
    last = where.layout.block_nbytes - 1
    for expert in range(where.num_experts):
        for into in (0, 9000, where.layout.payload_nbytes - 1, last):
            flip(where.path, where.offset(expert) + into, bit=expert)
            (found,) = checkpoint.verify()
            assert found.startswith(f"{where.path}: layer {layer}, expert {expert}: checksum is ")
            flip(where.path, where.offset(expert) + into, bit=expert)
    assert list(checkpoint.verify()) == []


def test_flipped_checksum_is_found(directory):
    where = PackedCheckpoint(directory).layers[2]
    flip(where.path, where.nbytes - 1)
    (found,) = PackedCheckpoint(directory).verify()
    assert f"{where.path}: layer 2, expert 7" in found


def test_flipped_byte_in_any_resident_tensor_is_found(directory):
    checkpoint = PackedCheckpoint(directory)
    checkpoint.layers = ()  # they are verified above
    file = directory / "resident.safetensors"
    assert len(checkpoint.resident) > 100
    for name, ref in checkpoint.resident.items():
        flip(file, ref.offset + ref.nbytes // 2)
        (found,) = checkpoint.verify()
        assert found.startswith(f"{file}: resident tensor {name}: checksum is ")
        flip(file, ref.offset + ref.nbytes // 2)
    assert list(checkpoint.verify()) == []


def test_all_damage_is_listed(directory):
    checkpoint = PackedCheckpoint(directory)
    flip(directory / "resident.safetensors", checkpoint.resident["model.norm.weight"].offset)
    for layer, expert in ((0, 1), (0, 2), (3, 7)):
        where = checkpoint.layers[layer]
        flip(where.path, where.offset(expert) + 1)
    found = [line.split(": ")[1] for line in checkpoint.verify()]
    assert found == [
        "resident tensor model.norm.weight",
        *("layer 0, expert 1", "layer 0, expert 2", "layer 3, expert 7"),
    ]


def test_layer_cut_off_after_opening(directory):
    checkpoint = PackedCheckpoint(directory)
    where = checkpoint.layers[1]
    content = where.path.read_bytes()
    where.path.write_bytes(content[: where.offset(6)])
    found = list(checkpoint.verify())
    assert found and all(f"{where.path}: layer 1" in line for line in found)
