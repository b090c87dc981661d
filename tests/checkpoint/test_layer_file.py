"""A layer's file: blocks where they should be, going on after a stop, and damage found."""

import json

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file

from flashmoe_lab.checkpoint.layer_file import BLOCK_ALIGN, BlockLayout, LayerFile
from flashmoe_lab.checkpoint.tensor_file import DTYPES, Tensor
from flashmoe_lab.config import PROJECTIONS, ModelConfig, Quantization, geometries

FORMS = [None, *(Quantization(bits=b, group_size=g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64))]
IDS = ["BF16", *(f"{q.bits}b-g{q.group_size}" for q in FORMS[1:] if q)]


@pytest.fixture
def config(data):
    return ModelConfig.read(data("golden/hf"))


@pytest.fixture(params=FORMS, ids=IDS)
def layout(request, config):
    return BlockLayout.of(config, request.param, "BF16")


def random_expert(layout, seed):
    rng = np.random.default_rng(seed)
    expert = {projection: {} for projection in PROJECTIONS}
    for component in layout.components:
        projection, part = component.name.split(".")
        data = rng.integers(0, 256, component.nbytes, np.uint8).view(DTYPES[component.dtype])
        data = data.reshape(component.shape)
        expert[projection][part] = Tensor(dtype=component.dtype, data=data)
    return expert


def test_published_block(data):
    config = ModelConfig.from_dict(geometries()["397b"])
    layout = BlockLayout.of(config, Quantization(bits=4), "BF16")
    assert layout.payload_nbytes == layout.block_nbytes == 7_077_888
    assert [c.offset for c in layout.components] == [
        *(0, 2097152, 2228224),
        *(2359296, 4456448, 4587520),
        *(4718592, 6815744, 6946816),
    ]
    assert [c.name for c in layout.components[:4]] == [
        *("gate_proj.weight", "gate_proj.scales", "gate_proj.biases"),
        "up_proj.weight",
    ]
    assert layout.components[-1].shape == (4096, 16)


def test_components_lie_without_gaps(layout, config):
    position = 0
    for component in layout.components:
        assert component.offset == position
        position += component.nbytes
    assert layout.payload_nbytes == position == config.expert_nbytes(layout.quantization)
    assert 0 <= layout.block_nbytes - position < BLOCK_ALIGN == 16384
    assert layout.block_nbytes % 16384 == 0


def test_split_undoes_assemble(layout):
    expert = random_expert(layout, 1)
    block = layout.assemble(expert)
    assert block.nbytes == layout.block_nbytes and not block[layout.payload_nbytes :].any()
    found = layout.split(block)
    for projection, parts in expert.items():
        assert list(found[projection]) == list(parts)
        for part, tensor in parts.items():
            assert found[projection][part].dtype == tensor.dtype
            assert np.array_equal(found[projection][part].data, tensor.data)


def test_json_gives_the_layout_again(layout):
    entry = json.loads(json.dumps(layout.to_json()))
    assert BlockLayout.from_json(entry) == layout


def test_label(config):
    assert BlockLayout.of(config, None, "F16").label == "F16"
    assert BlockLayout.of(config, Quantization(bits=3), "BF16").label == "3 bits, group 64"


@pytest.mark.parametrize("change", ["type", "shape"])
def test_assemble_refuses_other_parts(config, change):
    layout = BlockLayout.of(config, None, "BF16")
    expert = random_expert(layout, 1)
    data = expert["up_proj"]["weight"].data
    expert["up_proj"]["weight"] = (
        Tensor(dtype="F16", data=data.view("<f2"))
        if change == "type"
        else Tensor(dtype="BF16", data=data.T)
    )
    with pytest.raises(
        ValueError, match=r"up_proj.weight is .*, the layout wants BF16 \[64, 128\]"
    ):
        layout.assemble(expert)


# Writing


@pytest.fixture
def file(config, tmp_path):
    layout = BlockLayout.of(config, Quantization(bits=4), "BF16")
    return LayerFile(layer=2, path=tmp_path / "experts/l.safetensors", layout=layout, num_experts=8)


def block(file, expert):
    return file.layout.assemble(random_expert(file.layout, expert))


@pytest.mark.parametrize("workers", [1, 2, 20])
def test_written_file_is_standard_and_aligned(file, workers):
    told = []
    file.write(lambda expert: block(file, expert), told.append, workers)
    file.check()
    assert [f.name for f in file.path.parent.iterdir()] == [file.path.name]
    assert file.path.stat().st_size == file.nbytes
    tensors = load_file(file.path)
    assert list(tensors["experts"].shape) == [8, file.layout.block_nbytes]
    for expert in range(8):
        expected = block(file, expert)
        assert file.offset(expert) % 16384 == 0
        assert np.array_equal(tensors["experts"][expert], expected)
        assert np.array_equal(file.read_block(expert), expected)
        assert tensors["checksums"][expert] == xxhash.xxh3_64_intdigest(expected.tobytes())
        file.check_block(expert, file.read_block(expert), int(file.checksums()[expert]))
    assert tensors["checksums"].dtype == np.uint64
    assert sum(told) <= file.nbytes


class Stop(Exception):
    pass


def write_until(file, stop, workers=1):
    """Write, but fail when block `stop` is asked for."""

    def make(expert):
        if expert == stop:
            raise Stop
        return block(file, expert)

    with pytest.raises(Stop):
        file.write(make, lambda nbytes: None, workers)


def resume(file):
    """Write on to the end; the experts that were made, and the whole file."""
    made = []

    def make(expert):
        made.append(expert)
        return block(file, expert)

    file.write(make, lambda nbytes: None)
    return made, file.path.read_bytes()


@pytest.fixture
def whole(file):
    content = resume(file)[1]
    file.path.unlink()
    return content


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("stop", range(8))
def test_goes_on_where_it_stopped(file, whole, stop, workers):
    write_until(file, stop, workers)
    assert not file.path.exists()
    made, content = resume(file)
    assert content == whole
    assert made[-1] == 7 and len(made) <= 8
    if workers == 1:
        assert made == list(range(stop, 8))
    assert len(list(file.path.parent.iterdir())) == 1


def partials(file):
    return {
        name: file.path.with_name(file.path.name + name)
        for name in (".partial", ".journal.partial")
    }


@pytest.mark.parametrize(
    "damage, first",
    [
        (lambda data, journal: (data, b""), 0),
        (lambda data, journal: (data, journal[:-1]), 4),
        (lambda data, journal: (data, journal[:16] + b"\0" * 8 + journal[24:]), 2),
        (lambda data, journal: (data, journal + b"\xff" * 8), 5),
        (lambda data, journal: (data, journal * 5), 5),
        (lambda data, journal: (data[:-1], journal), 4),
        (lambda data, journal: (data[: len(data) // 2], journal), 2),
        (lambda data, journal: (b"", journal), 0),
        (lambda data, journal: (b"\0" * len(data), journal), 0),
    ],
)
def test_what_a_power_cut_spoilt_is_made_again(file, whole, damage, first):
    write_until(file, 5)
    data, journal = (path.read_bytes() for path in partials(file).values())
    for path, content in zip(partials(file).values(), damage(data, journal), strict=True):
        path.write_bytes(content)
    made, content = resume(file)
    assert made == list(range(first, 8))
    assert content == whole


def test_a_lost_journal_means_from_the_start(file, whole):
    write_until(file, 5)
    partials(file)[".journal.partial"].unlink()
    made, content = resume(file)
    assert (made, content) == (list(range(8)), whole)


# Damage


@pytest.fixture
def written(file):
    resume(file)
    return file


def test_missing_file(file):
    with pytest.raises(FileNotFoundError, match=f"{file.path}: layer 2: the file is missing"):
        file.check()


@pytest.mark.parametrize("expert, into", [(0, 0), (0, 1), (3, 0), (3, 100), (7, 16383)])
def test_cut_off_names_the_first_expert_that_is_not_whole(written, expert, into):
    content = written.path.read_bytes()[: written.offset(expert) + into]
    written.path.write_bytes(content)
    message = f"{written.path}: layer 2: cut off: {len(content)} of {written.nbytes} bytes; expert"
    with pytest.raises(ValueError, match=f"{message} {expert} is the first that is not whole"):
        written.check()


@pytest.mark.parametrize("missing", [1, 8, 64])
def test_cut_off_checksums(written, missing):
    written.path.write_bytes(written.path.read_bytes()[:-missing])
    with pytest.raises(ValueError, match="its checksums are not whole"):
        written.check()


@pytest.mark.parametrize("size", [0, 5, 100])
def test_cut_off_header(written, size):
    written.path.write_bytes(written.path.read_bytes()[:size])
    with pytest.raises(ValueError, match="expert 0 is the first that is not whole"):
        written.check()


def test_too_long(written):
    written.path.write_bytes(written.path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=f"{written.path}: layer 2: "):
        written.check()


@pytest.mark.parametrize("at", [0, 7, 9, 30, 60, 16383])
def test_header_that_lies(written, at):
    content = bytearray(written.path.read_bytes())
    content[at] ^= 1
    written.path.write_bytes(content)
    with pytest.raises(ValueError, match="layer 2: its header is not the one that packed.json"):
        written.check()


def test_block_read_past_the_end(written):
    written.path.write_bytes(written.path.read_bytes()[: written.offset(4) + 10])
    assert written.read_block(3).nbytes == written.layout.block_nbytes
    with pytest.raises(ValueError, match=f"{written.path}: layer 2, expert 4 is cut off"):
        written.read_block(4)


def test_damaged_block_is_named(written):
    damaged = written.read_block(6)
    damaged[-1] ^= 128
    message = f"{written.path}: layer 2, expert 6: checksum is [0-9a-f]{{16}}, the file says"
    with pytest.raises(ValueError, match=message):
        written.check_block(6, damaged, int(written.checksums()[6]))
    with pytest.raises(ValueError, match=message):
        written.check_block(6, memoryview(damaged), int(written.checksums()[6]))
