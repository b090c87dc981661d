"""Packing keeps or quantises exactly, and ends with the same bytes however often it is killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import xxhash
from safetensors import safe_open

from flashmoe_lab.checkpoint import pack as pack_module
from flashmoe_lab.checkpoint.pack import PackPlan, PackSettings, pack
from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.checkpoint.quantize import from_mlx, to_mlx
from flashmoe_lab.checkpoint.resident_file import split_files
from flashmoe_lab.checkpoint.source import Source
from flashmoe_lab.checkpoint.tensor_file import read_header
from flashmoe_lab.config import PROJECTIONS, Quantization, is_gate, is_matrix

KEEP, FOUR = PackSettings.of(None), PackSettings.of(4)
HF = ["golden/hf", "rect", "gqa8", "layer_types", "split", "sharded", "bf16", "next"]
MLX = ["golden/mlx4", "next_mlx4"]
PARTS = ("weight", "scales", "biases")


def packed(source, destination, settings, **options):
    pack(PackPlan.make(Source(source), destination, settings), **options)
    return PackedCheckpoint(destination)


def files(directory):
    """Content of every file below a directory."""
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def load(file) -> dict[str, mx.array]:
    return mx.load(str(file))  # pyright: ignore


def assert_same(directory, reference):
    found = files(directory)
    assert sorted(found) == sorted(reference)
    different = [name for name, content in found.items() if content != reference[name]]
    assert not different


def assert_nothing_looks_whole(directory, reference):
    """An interrupted packing: it does not open, and what is there under its final name is whole."""
    found = files(directory)
    assert "packed.json" not in found
    with pytest.raises(FileNotFoundError, match="packing was not finished|not a packed"):
        PackedCheckpoint(directory)
    for name, content in found.items():
        assert name.endswith(".partial") or content == reference[name], name


# What is packed


def expected_block(source, layer, expert, quantization=None):
    """Bytes of one expert from the source's matrices, put together here."""
    content = b""
    for matrix in source.expert(layer, expert).values():
        if quantization:
            parts = mx.quantize(
                to_mlx(matrix["weight"]),
                bits=quantization.bits,
                group_size=quantization.group_size,
            )
            matrix = dict(zip(PARTS, map(from_mlx, parts), strict=True))
        content += b"".join(bytes(matrix[part].bytes_view()) for part in PARTS if part in matrix)
    return content


def assert_blocks(checkpoint, source, quantization):
    for layer in checkpoint.layers:
        for expert in range(layer.num_experts):
            expected = expected_block(source, layer.layer, expert, quantization)
            block = layer.read_block(expert).tobytes()
            assert block[: len(expected)] == expected
            assert not any(block[len(expected) :]) and len(block) - len(expected) < 16384


def source_tensor(source, name):
    slices = list(source.resident_slices(name, 1 << 30))
    assert len(slices) == 1
    return slices[0]


@pytest.mark.parametrize("name", HF + MLX)
def test_kept_bit_for_bit(data, tmp_path, name):
    source = Source(data(name))
    checkpoint = packed(data(name), tmp_path / "packed", KEEP)
    assert_blocks(checkpoint, source, None)
    stored = set()
    for tensor in source.config.resident_shapes():
        parts = source_tensor(source, tensor)
        base = tensor.removesuffix(".weight")
        for part, expected in parts.items():
            full = f"{base}.{part}" if len(parts) > 1 else tensor
            found = checkpoint.resident[full].read()
            assert found.dtype == expected.dtype
            assert np.array_equal(found.data, expected.data)
            stored.add(full)
    assert stored == set(checkpoint.resident)
    assert checkpoint.config == source.config
    assert list(checkpoint.verify()) == []


@pytest.mark.parametrize("name", MLX)
def test_mlx_is_repacked_from_the_raw_slabs(data, tmp_path, name):
    """The same against the file itself, without our reader of sources."""
    checkpoint = packed(data(name), tmp_path / "packed", PackSettings.of(4))
    raw = {
        tensor.removeprefix("language_model."): array
        for tensor, array in load(data(name) / "model.safetensors").items()
    }
    for layer in checkpoint.layers:
        for expert in range(layer.num_experts):
            content = b"".join(
                bytes(
                    from_mlx(
                        raw[f"model.layers.{layer.layer}.mlp.switch_mlp.{p}.{part}"][expert]
                    ).bytes_view()
                )
                for p in PROJECTIONS
                for part in PARTS
            )
            assert layer.read_block(expert)[: len(content)].tobytes() == content
    loaded = load(tmp_path / "packed/resident.safetensors")
    for tensor, array in loaded.items():
        if tensor in raw:
            assert array.dtype == raw[tensor].dtype
            assert mx.array_equal(array, raw[tensor])
    assert sum(tensor in raw for tensor in loaded) > 100


ALL = [(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]


@pytest.mark.parametrize("bits, group_size", ALL)
def test_quantised_as_mlx_does(make_source, tmp_path, bits, group_size):
    path = make_source()
    source = Source(path)
    checkpoint = packed(path, tmp_path / "packed", PackSettings.of(bits, group_size))
    experts = Quantization(bits=bits, group_size=group_size)
    resident = Quantization(bits=max(bits, 4), group_size=group_size)
    gates = Quantization(bits=8, group_size=group_size)
    assert {layer.layout.quantization for layer in checkpoint.layers} == {experts}
    assert checkpoint.label == f"{bits} bits, group {group_size}"
    assert_blocks(checkpoint, source, experts)
    noted = checkpoint.manifest.resident_quantization
    for name, shape in source.config.resident_shapes().items():
        whole, base = source_tensor(source, name)["weight"], name.removesuffix(".weight")
        if not is_matrix(name) or shape[1] % group_size:
            assert base not in noted
            assert np.array_equal(checkpoint.resident[name].read().data, whole.data)
            continue
        form = gates if is_gate(name) else resident
        assert noted[base] == form
        parts = mx.quantize(to_mlx(whole), bits=form.bits, group_size=form.group_size)
        for part, expected in zip(PARTS, map(from_mlx, parts), strict=True):
            found = checkpoint.resident[f"{base}.{part}"].read()
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert np.array_equal(found.data, expected.data)


@pytest.mark.parametrize("name", ["golden/hf", "next", "split"])
def test_every_layout_is_quantised_alike(data, tmp_path, name):
    checkpoint = packed(data(name), tmp_path / "packed", FOUR)
    assert_blocks(checkpoint, Source(data(name)), Quantization(bits=4))


@pytest.mark.parametrize(
    "arguments, experts, resident, router",
    [
        ((), (4, 64), (4, 64), (8, 64)),
        ((2,), (2, 64), (4, 64), (8, 64)),
        ((8, 32), (8, 32), (8, 32), (8, 32)),
        ((3, 128, None), (3, 128), (4, 128), None),
        ((4, 64, 4, 6), (4, 64), (6, 64), (4, 64)),
        ((None,), None, None, None),
    ],
)
def test_settings(arguments, experts, resident, router):
    expected = [
        Quantization(bits=pair[0], group_size=pair[1]) if pair else None
        for pair in (experts, resident, router)
    ]
    settings = PackSettings.of(*arguments)
    assert [settings.experts, settings.resident, settings.router] == expected


def test_router_may_stay_unquantised(data, tmp_path):
    checkpoint = packed(data("bf16"), tmp_path / "packed", PackSettings.of(4, router_bits=None))
    noted = checkpoint.manifest.resident_quantization
    assert "model.layers.0.mlp.gate" not in noted and "lm_head" in noted
    assert checkpoint.resident["model.layers.0.mlp.gate.weight"].dtype == "BF16"


@pytest.mark.parametrize("settings", [KEEP, FOUR], ids=["kept", "4 bits"])
def test_files_are_standard_and_aligned(data, tmp_path, settings):
    checkpoint = packed(data("golden/hf"), tmp_path / "packed", settings)
    assert len(checkpoint.layers) == 4
    for layer in checkpoint.layers:
        assert layer.layout.block_nbytes % 16384 == 0
        assert all(layer.offset(expert) % 16384 == 0 for expert in range(8))
        with safe_open(layer.path, "np") as file:
            assert set(file.keys()) == {"experts", "checksums"}
            blocks, checksums = file.get_tensor("experts"), file.get_tensor("checksums")
        assert blocks.shape == (8, layer.layout.block_nbytes)
        assert read_header(layer.path)[0]["experts"].offset == layer.offset(0)
        for block, checksum in zip(blocks, checksums, strict=True):
            assert xxhash.xxh3_64_intdigest(block.tobytes()) == checksum
    with safe_open(tmp_path / "packed/resident.safetensors", "np") as file:
        assert set(file.keys()) == set(checkpoint.resident)


def test_small_files_go_along(make_source, tmp_path):
    path = make_source()
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "packed.json").write_text("{}")
    packed(path, tmp_path / "packed", FOUR)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "packed" / name).read_bytes() == (path / name).read_bytes()
    manifest = json.loads((tmp_path / "packed/packed.json").read_text())
    assert manifest["source"]["name"] == "source"
    assert manifest["source"]["identity"] == Source(path).identity


def test_resident_files_of_a_bounded_size(data, tmp_path, monkeypatch):
    one = packed(data("golden/hf"), tmp_path / "one", FOUR)
    monkeypatch.setattr(pack_module, "split_files", partial(split_files, max_nbytes=100_000))
    many = packed(data("golden/hf"), tmp_path / "many", FOUR)
    assert len(many.manifest.resident_files) > 2
    assert set(many.resident) == set(one.resident)
    for name, ref in one.resident.items():
        assert np.array_equal(many.resident[name].read().data, ref.read().data)
    assert many.manifest.resident_checksums == one.manifest.resident_checksums
    assert list(many.verify()) == []


def test_workers_and_slices_do_not_change_a_byte(data, tmp_path, monkeypatch):
    packed(data("golden/hf"), tmp_path / "a", FOUR, workers=1)
    monkeypatch.setattr(pack_module, "_SLICE_NBYTES", 1000)
    packed(data("golden/hf"), tmp_path / "b", FOUR, workers=7)
    assert_same(tmp_path / "b", files(tmp_path / "a"))


@pytest.mark.parametrize("name, settings", [("bf16", FOUR), ("golden/mlx4", KEEP)])
def test_progress_reaches_the_announced_bytes(data, tmp_path, name, settings):
    plan, told = PackPlan.make(Source(data(name)), tmp_path / "packed", settings), []
    pack(plan, told.append)
    assert sum(told) == plan.nbytes and min(told) >= 0
    again = []
    pack(plan, again.append)
    assert sum(again) == plan.nbytes


# Interrupted and gone on with


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def reference(data, tmp_path):
    """A fixture model's packing that nobody disturbed: how to plan it, and all its files."""
    plan = partial(PackPlan.make, Source(data("split")), settings=FOUR)
    pack(plan(destination=tmp_path / "reference"))
    return plan, files(tmp_path / "reference")


def test_stopped_at_every_report(reference, tmp_path):
    plan, expected = reference
    calls = []
    pack(plan(destination=tmp_path / "count"), calls.append)
    assert len(calls) > 50
    for stop in range(len(calls)):
        directory, left = tmp_path / f"stop{stop}", [stop]

        def progress(nbytes, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Crash

        with pytest.raises(Crash):
            pack(plan(destination=directory), progress, workers=1 + stop % 2)
        assert_nothing_looks_whole(directory, expected)
        pack(plan(destination=directory))
        assert_same(directory, expected)


CALLS = [(os, "pwrite"), (os, "fsync"), (os, "ftruncate"), (Path, "rename"), (Path, "unlink")]


@pytest.mark.parametrize("torn", [False, True], ids=["before the call", "half of it done"])
def test_stopped_at_every_system_call(reference, tmp_path, monkeypatch, torn):
    plan, expected = reference
    count = 0

    def interrupt(stop):
        """Count the calls that change the disk; the process ends at number `stop`."""
        for owner, name in CALLS:
            real = getattr(owner, name)

            def call(*args, name=name, real=real, **kwargs):
                nonlocal count
                count += 1
                if count > stop:
                    if torn and name == "pwrite":
                        real(args[0], args[1][: len(args[1]) // 2], args[2])
                    elif torn:
                        real(*args, **kwargs)
                    raise Crash
                return real(*args, **kwargs)

            patch.setattr(owner, name, call)

    with monkeypatch.context() as patch:
        interrupt(10**9)
        pack(plan(destination=tmp_path / "count"))
    total = count
    assert total > 80
    for stop in range(total):
        count, directory = 0, tmp_path / f"stop{stop}"
        with monkeypatch.context() as patch:
            interrupt(stop)
            with pytest.raises(Crash):
                pack(plan(destination=directory))
        if not (directory / "packed.json").exists():
            assert_nothing_looks_whole(directory, expected)
        else:
            assert list(PackedCheckpoint(directory).verify()) == []
        pack(plan(destination=directory))
        assert_same(directory, expected)


def test_stopped_before_the_first_rename(data, tmp_path):
    """The very first file may be there under its temporary name only."""
    directory = tmp_path / "packed"
    directory.mkdir()
    (directory / "packed.json.partial.new.partial").write_bytes(b'{"sour')
    assert list(packed(data("split"), directory, FOUR).verify()) == []
    assert not [name for name in files(directory) if name.endswith(".partial")]


def test_finished_packing_is_left_alone_and_tidied(reference, tmp_path):
    plan, expected = reference
    directory = tmp_path / "reference"
    times = {file: file.stat().st_mtime_ns for file in directory.rglob("*")}
    (directory / "experts/layer_00.safetensors.journal.partial").write_bytes(b"left over")
    pack(plan(destination=directory))
    assert_same(directory, expected)
    assert {f: f.stat().st_mtime_ns for f in times if f.is_file()} == {
        f: t for f, t in times.items() if f.is_file()
    }


PROGRAM = """
import sys
from flashmoe_lab.checkpoint.pack import PackPlan, PackSettings, pack
from flashmoe_lab.checkpoint.source import Source
plan = PackPlan.make(Source(sys.argv[1]), sys.argv[2], PackSettings.of(4, 32))
print("ready", flush=True)
sys.stdin.readline()
pack(plan)
print("done", flush=True)
"""


def start(source, destination):
    """A process that is ready to pack and waits for a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, source, destination],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    return process


def go(process):
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_at_random_moments(make_source, tmp_path):
    source = make_source(hidden=256, inter=64, experts=64, layers=4)
    with start(source, tmp_path / "unkilled") as process:
        go(process)
        begin = time.perf_counter()
        assert process.stdout and process.stdout.readline() == "done\n"
        duration = time.perf_counter() - begin
    expected = files(tmp_path / "unkilled")
    assert len(expected) > 6
    rng, kills = random.Random(5), 20
    unfinished = 0
    following = start(source, tmp_path / "kill0")
    for i in range(kills):
        directory, process = tmp_path / f"kill{i}", following
        if i + 1 < kills:
            following = start(source, tmp_path / f"kill{i + 1}")
        with process:
            go(process)
            try:
                process.wait(duration * (i + rng.random()) / kills)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        if process.returncode == -signal.SIGKILL and not (directory / "packed.json").exists():
            unfinished += 1
            if directory.exists():
                assert_nothing_looks_whole(directory, expected)
        pack(PackPlan.make(Source(source), directory, PackSettings.of(4, 32)))
        assert_same(directory, expected)
        shutil.rmtree(directory)
    assert unfinished >= 3


# Refused


def test_other_bits_of_a_quantised_source_are_refused(data, tmp_path):
    for settings in (PackSettings.of(2), PackSettings.of(4, 32)):
        message = "mlx4: layer 0: its experts are already quantised to 4 bits, group 64"
        with pytest.raises(ValueError, match=message):
            PackPlan.make(Source(data("golden/mlx4")), tmp_path / "packed", settings)
    assert not (tmp_path / "packed").exists()


def test_groups_that_do_not_fit_are_refused(data, tmp_path):
    message = "layer 0: gate_proj: 64 columns are no whole number of groups of 128"
    with pytest.raises(ValueError, match=message):
        PackPlan.make(Source(data("bf16")), tmp_path, PackSettings.of(4, 128))


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize("other", ["bits", "group", "router", "source", "fine-tuned", "kept"])
def test_another_packing_in_the_directory_is_refused(make_source, tmp_path, finished, other):
    first, directory = make_source("first"), tmp_path / "packed"
    plan = PackPlan.make(Source(first), directory, FOUR)

    def stop(nbytes):
        raise Crash

    if finished:
        pack(plan)
    else:
        with pytest.raises(Crash):
            pack(plan, stop)
    before = files(directory)
    second = first
    if other == "source":
        second = make_source("second", experts=6)
    elif other == "fine-tuned":
        second = make_source("second", seed=1)
        assert (second / "config.json").read_bytes() == (first / "config.json").read_bytes()
    settings = {
        "bits": PackSettings.of(3),
        "group": PackSettings.of(4, 32),
        "router": PackSettings.of(4, router_bits=None),
        "kept": KEEP,
    }.get(other, FOUR)
    message = "holds another packed" if finished else "holds an unfinished packing of another"
    with pytest.raises(FileExistsError, match=f"{directory}: {message}"):
        pack(PackPlan.make(Source(second), directory, settings))
    assert files(directory) == before


@pytest.mark.parametrize("own", [False, True], ids=["foreign", "the source's own"])
def test_a_directory_with_other_things_is_refused(data, variant, tmp_path, own):
    source = variant("split")
    directory = source if own else tmp_path / "foreign"
    directory.mkdir(exist_ok=True)
    (directory / "thesis.txt").write_text("years of work")
    before = files(directory)
    with pytest.raises(FileExistsError, match=f"{directory}: is not empty and not a packing"):
        pack(PackPlan.make(Source(source), directory, FOUR))
    assert files(directory) == before


def test_an_empty_directory_is_taken(data, tmp_path):
    assert list(packed(data("split"), tmp_path, FOUR).verify()) == []


def free(monkeypatch, nbytes):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=nbytes))


def test_too_small_a_disk_is_refused_before_anything_is_written(data, tmp_path, monkeypatch):
    plan = PackPlan.make(Source(data("split")), tmp_path / "packed", FOUR)
    free(monkeypatch, plan.nbytes - 1)
    with pytest.raises(OSError, match=f"{tmp_path / 'packed'}: no room on the disk: 318 kB more"):
        pack(plan)
    assert files(tmp_path) == {}
    free(monkeypatch, plan.nbytes)
    pack(plan)
    PackedCheckpoint(plan.destination)


def test_what_is_done_needs_no_room_again(reference, tmp_path, monkeypatch):
    plan, expected = reference
    plan, told = plan(destination=tmp_path / "packed"), []

    def progress(nbytes):
        told.append(nbytes)
        if sum(told) > plan.nbytes // 2:
            raise Crash

    with pytest.raises(Crash):
        pack(plan, progress, workers=1)
    done = sum(len(content) for content in files(plan.destination).values())
    assert done > plan.nbytes // 4
    free(monkeypatch, plan.nbytes - done - 1)
    with pytest.raises(OSError, match="no room"):
        pack(plan)
    free(monkeypatch, plan.nbytes - done)
    pack(plan)
    assert_same(plan.destination, expected)


# A disk that is really full


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB of its own."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if result.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {result.stderr.strip()}")
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
@pytest.mark.parametrize("pages", [0, 1, 5, 20, 40, 60])
def test_disk_full_on_the_way(reference, small_disk, pages):
    """Another program fills the disk while we pack, all but some pages."""
    plan, expected = reference
    plan, other = plan(destination=small_disk / "packed"), small_disk / "other"

    def progress(nbytes):
        if not other.exists():
            room = shutil.disk_usage(small_disk).free - pages * 4096
            other.write_bytes(b"\1" * room)

    with pytest.raises(OSError, match="No space left on device|no room") as caught:
        pack(plan, progress, workers=1)
    assert str(plan.destination) in str(caught.value)
    assert_nothing_looks_whole(plan.destination, expected)
    other.unlink()
    pack(plan)
    assert_same(plan.destination, expected)
