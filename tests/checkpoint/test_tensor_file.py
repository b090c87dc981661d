"""Safetensors files: what we write the library reads, and what lies is refused by name."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flashmoe_lab.checkpoint.tensor_file import (
    DTYPES,
    Tensor,
    make_header,
    read_fully,
    read_header,
    write_at,
)

RNG = np.random.default_rng(3)
BY_LIBRARY = {name: dtype for name, dtype in DTYPES.items() if name != "BF16"}


def random(dtype, shape):
    return RNG.integers(0, 255, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]


def raw(entries, data=b"", length=None):
    """A file's bytes from a header given as an object, or as bytes to spoil it."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tensors.safetensors"


# Writing


@pytest.mark.parametrize("align", [8, 4096, 16384])
def test_what_we_write_the_library_reads(path, align):
    arrays = {f"t{i}": random(d, (3, i + 1)) for i, d in enumerate(BY_LIBRARY.values())}
    tensors = {f"t{i}": (name, (3, i + 1)) for i, name in enumerate(BY_LIBRARY)}
    header, offsets = make_header(tensors, {"format": "test"}, align)
    assert len(header) % align == 0
    assert offsets["t0"] == len(header)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    write_at(descriptor, memoryview(header), 0)
    for name, array in arrays.items():
        write_at(descriptor, memoryview(array.tobytes()), offsets[name])
    os.close(descriptor)
    found = load_file(path)
    assert list(arrays) == sorted(found, key=lambda name: offsets[name])
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "test"}
    refs, metadata = read_header(path)
    assert metadata == {"format": "test"}
    assert {name: ref.offset for name, ref in refs.items()} == offsets


@pytest.mark.parametrize("length", range(1, 18))
def test_any_header_length_is_padded(length):
    header, offsets = make_header({"x" * length: ("U8", (3,)), "y": ("U16", (5,))}, align=64)
    assert len(header) % 64 == 0 and int.from_bytes(header[:8], "little") == len(header) - 8
    assert json.loads(header[8:])["y"]["data_offsets"] == [3, 13]
    assert offsets == {"x" * length: len(header), "y": len(header) + 3}


def test_short_writes_are_gone_on_with(path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:5], at))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    write_at(descriptor, memoryview(b"twelve bytes"), 3)
    os.close(descriptor)
    assert path.read_bytes() == b"\0\0\0twelve bytes"


# Reading


@pytest.mark.parametrize("name", BY_LIBRARY)
def test_what_the_library_writes_we_read(path, name):
    array = random(DTYPES[name], (4, 3, 2))
    save_file({"a": array, "b": array[:1]}, path)
    refs, metadata = read_header(path)
    assert metadata == {}
    for key, expected in {"a": array, "b": array[:1]}.items():
        tensor = refs[key].read()
        assert (tensor.dtype, tensor.shape) == (name, expected.shape)
        assert bytes(tensor.bytes_view()) == expected.tobytes()
        assert refs[key].nbytes == expected.nbytes


def test_mlx_does_not_align_and_we_read_it(path):
    array = mx.random.normal((5, 3)).astype(mx.bfloat16)
    mx.save_safetensors(str(path), {"odd" * i: array for i in range(1, 6)})
    refs, _ = read_header(path)
    assert any(ref.offset % 2 for ref in refs.values())
    for ref in refs.values():
        assert np.array_equal(ref.read().float32(), np.array(array.astype(mx.float32)))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parts_are_those_of_numpy(path, data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    save_file({"x": array}, path)
    ref = read_header(path)[0]["x"]
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start, shape[0]))
    assert np.array_equal(ref.rows(start, stop).read().data, array[start:stop])
    assert np.array_equal(ref[start].read().data, array[start])
    if len(shape) > 1 and stop > start:
        row = data.draw(st.integers(0, shape[1] - 1))
        assert np.array_equal(ref.rows(start, stop)[0][row].read().data, array[start][row])


def test_bfloat16_to_float32_is_exact_for_every_pattern():
    bits = np.arange(1 << 16, dtype=np.uint16)
    ours = Tensor(dtype="BF16", data=bits).float32()
    mlx = np.array(mx.array(bits).view(mx.bfloat16).astype(mx.float32))
    assert ours.dtype == np.float32
    assert np.array_equal(np.isnan(ours), np.isnan(mlx))
    assert np.array_equal(ours[~np.isnan(ours)], mlx[~np.isnan(mlx)])


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_floats_to_float32(dtype):
    values = np.array([1.5, -2.25, 6e-5], DTYPES[dtype])
    found = Tensor(dtype=dtype, data=values).float32()
    assert found.dtype == np.float32 and np.array_equal(found, values.astype(np.float32))


def test_bytes_of_a_view_are_in_order():
    data = np.arange(12, dtype="<u4").reshape(3, 4).T
    assert bytes(Tensor(dtype="U32", data=data).bytes_view()) == data.tobytes()


def test_short_reads_are_gone_on_with(path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:3]], at))
    save_file({"x": np.arange(10, dtype=np.int32)}, path)
    assert np.array_equal(read_header(path)[0]["x"].read().data, np.arange(10))


# Files that are not what they say


def test_missing_file(path):
    with pytest.raises(FileNotFoundError, match=f"{path}: no such file"):
        read_header(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "header should be 0 bytes, the file is 0"),
        (b"\x10\0\0", "the file is 3"),
        (raw({}, length=10**9), "header should be 1000000000 bytes, the file is 10"),
        (raw({}, length=2**64 - 1), "header should be 18446744073709551615 bytes"),
        (raw({}, length=3), "header should be 3 bytes"),
        (raw(b"{not json"), "header is damaged"),
        (raw(b"\xff\xfe"), "header is damaged"),
        (raw([1, 2]), "header is damaged"),
        (raw(b'"text"'), "header is damaged"),
        (raw({"w": 5}), "header is damaged"),
        (raw({"w": {"dtype": "F32"}}), "header is damaged"),
        (raw({"w": entry(shape=(2, 2)) | {"shape": None}}), "header is damaged"),
        (raw({"w": entry() | {"dtype": ["F32"]}}), "header is damaged"),
        (raw({"w": entry(dtype="F8_E4M3")}, b"0" * 16), "tensor w has type F8_E4M3; supported"),
        (raw({"w": entry(offsets=(0, 12))}, b"0" * 16), r"w 12 bytes; F32 \[2, 2\] needs 16"),
        (raw({"w": entry(offsets=(16, 0))}, b"0" * 16), "tensor w -16 bytes"),
        (raw({"w": entry(offsets=(-16, 0))}, b"0" * 16), "tensor w 16 bytes"),
        (raw({"w": entry(shape=(-2, -2))}, b"0" * 16), r"F32 \[-2, -2\]"),
        (raw({"w": entry()}, b"0" * 15), "cut off: tensor w should end at byte"),
        (raw({"w": entry(offsets=(10**15, 10**15 + 16))}, b"0" * 16), "cut off: tensor w"),
        (raw({"w": entry(offsets=(0, 8, 16))}, b"0" * 16), "header is damaged"),
        (raw({"w": entry(shape=(2.0, 2))}, b"0" * 16), "header is damaged|tensor w"),
        (raw({"w": entry(offsets=(0.0, 16.0))}, b"0" * 16), "header is damaged|tensor w"),
        (raw(b"[" * 100_000), "header is damaged"),
        (raw(b'{"w": ' + b"9" * 5000 + b"}"), "header is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lying_files_are_named(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_file_cut_after_its_header_was_read(path):
    save_file({"w": np.zeros((4, 4), np.float32)}, path)
    ref = read_header(path)[0]["w"]
    os.truncate(path, ref.offset + 20)
    assert ref.rows(0, 1).read().shape == (1, 4)
    with pytest.raises(ValueError, match=f"{path}: w is cut off: .* ends after 20 of them"):
        ref.read()


def test_read_fully_past_the_end(path):
    path.write_bytes(b"1234")
    with path.open("rb") as file, pytest.raises(ValueError, match="block 7 is cut off"):
        read_fully(file.fileno(), memoryview(bytearray(2)), 100, path, "block 7")
