"""Resident tensors: files of a bounded size, written slice by slice, whole or not at all."""

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file

from flashmoe_lab.checkpoint.resident_file import ResidentTensor, split_files, write_resident
from flashmoe_lab.checkpoint.tensor_file import Tensor

ROWS = np.arange(40, dtype=np.float32).reshape(10, 4)


def tensor(name, rows=ROWS, step=3, stop=None):
    """A tensor given in slices of `step` rows."""
    cuts = range(0, stop or len(rows), step)
    slices = [{"weight": Tensor(dtype="F32", data=rows[i : i + step])} for i in cuts]
    return ResidentTensor(name=name, parts={"weight": ("F32", rows.shape)}, slices=lambda: slices)


def quantised(name):
    kinds = {"weight": ("U32", "<u4"), "scales": ("F16", "<f2"), "biases": ("F16", "<f2")}
    data = {part: np.arange(8).reshape(4, 2).astype(kind) for part, (_, kind) in kinds.items()}
    slices = [
        {p: Tensor(dtype=kinds[p][0], data=d[i : i + 2]) for p, d in data.items()} for i in (0, 2)
    ]
    parts = {part: (kind, (4, 2)) for part, (kind, _) in kinds.items()}
    return ResidentTensor(name=name, parts=parts, slices=lambda: slices)


def test_names_and_sizes():
    matrix = quantised("a.q_proj.weight")
    assert list(matrix.stored()) == ["a.q_proj.weight", "a.q_proj.scales", "a.q_proj.biases"]
    assert matrix.nbytes == 8 * 4 + 2 * 8 * 2
    assert list(tensor("a.A_log").stored()) == ["a.A_log"]
    assert list(tensor("a.norm.weight").stored()) == ["a.norm.weight"]


@pytest.mark.parametrize("step", [1, 3, 10])
def test_slices_make_a_standard_file(tmp_path, step):
    file, told = tmp_path / "resident.safetensors", []
    tensors = [tensor("a.A_log", step=step), quantised("b.weight"), tensor("c.weight", ROWS[:1])]
    checksums = write_resident(file, tensors, told.append)
    found = load_file(file)
    assert np.array_equal(found["a.A_log"], ROWS) and np.array_equal(found["c.weight"], ROWS[:1])
    assert found["b.scales"].dtype == np.float16 and found["b.weight"].tolist()[3] == [6, 7]
    assert checksums == {
        k: f"{xxhash.xxh3_64_intdigest(v.tobytes()):016x}" for k, v in found.items()
    }
    assert sum(told) == sum(t.nbytes for t in tensors)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_a_file_that_is_there_is_left_alone(tmp_path):
    file, told = tmp_path / "resident.safetensors", []
    first = write_resident(file, [tensor("a.weight")], told.append)
    again = write_resident(file, [tensor("a.weight", ROWS + 1)], told.append)
    assert first == again and told[-1] == ROWS.nbytes
    assert np.array_equal(load_file(file)["a.weight"], ROWS)


def test_a_cut_off_file_is_written_again(tmp_path):
    file = tmp_path / "resident.safetensors"
    (tmp_path / "resident.safetensors.partial").write_bytes(b"x" * 10_000)
    write_resident(file, [tensor("a.weight")], lambda nbytes: None)
    assert np.array_equal(load_file(file)["a.weight"], ROWS)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_slices_that_are_too_few_are_refused(tmp_path):
    file = tmp_path / "resident.safetensors"
    with pytest.raises(ValueError, match=f"{file}: a.weight: wrote 96 bytes of 160"):
        write_resident(file, [tensor("a.weight", stop=6)], lambda nbytes: None)
    assert not file.exists()


@pytest.mark.parametrize(
    "limit, groups",
    [(10**9, [3]), (480, [3]), (479, [2, 1]), (320, [2, 1]), (319, [1, 1, 1]), (1, [1, 1, 1])],
)
def test_files_stay_under_the_limit(limit, groups):
    tensors = [tensor(name) for name in "abc"]
    files = split_files(tensors, limit)
    assert [len(group) for group in files.values()] == groups
    assert [t for group in files.values() for t in group] == tensors
    n = len(groups)
    names = [f"resident-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    assert list(files) == (names if n > 1 else ["resident.safetensors"])
