"""The name `demo`: packing to the cache, finding again, and what it is not confused with.

All but the last test use a tiny checkpoint of random weights in the place of the bundled one.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import flashmoe_lab as fl
from flashmoe_lab import bundled, demo
from flashmoe_lab.checkpoint.pack import PackPlan
from flashmoe_lab.checkpoint.source import Source
from flashmoe_lab.cli import main

TINY = Path(__file__).parents[1] / "data" / "tiny.json"
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published checkpoint of two layers, sharded as the bundled one is."""
    path = tmp_path_factory.mktemp("published") / "weights"
    arguments = ["synth", str(TINY), str(path), "--layers", "2", "--bits", "none", "--quiet"]
    assert main(arguments) == 0
    index = path / "model.safetensors.index.json"
    if not index.exists():
        index.write_text("{}")
    return path


@pytest.fixture
def cache(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, the tiny checkpoint in the place of the bundled one, and a clean directory
    to be in."""
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "bundled", lambda name: published)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "cache" / "packed"


def _packs(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def _logits(**options: object) -> np.ndarray:
    with fl.load("demo", **options) as engine:  # pyright: ignore[reportArgumentType]
        return engine.logits(PROMPT)


def test_is_packed_once_and_as_by_hand(
    cache: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _logits()
    assert capsys.readouterr().err.startswith("pack demo, 4bit 100%")
    (pack,) = _packs(cache)
    stamp = (pack / "packed.json").stat()
    second = _logits()
    assert capsys.readouterr().err == ""
    assert (pack / "packed.json").stat().st_ino == stamp.st_ino
    assert main(["pack", str(published), str(tmp_path / "by_hand"), "--bits", "4", "--quiet"]) == 0
    with fl.load(tmp_path / "by_hand") as engine:
        assert np.array_equal(engine.logits(PROMPT), first)
        assert engine.checkpoint.manifest.resident_quantization["model.layers.0.mlp.gate"].bits == 8
    assert np.array_equal(first, second)


def test_bits_are_kept_apart(cache: Path) -> None:
    for bits, label in ((2, "2 bits"), (8, "8 bits"), ("none", "BF16")):
        with fl.load("demo", bits) as engine:
            assert engine.checkpoint.label.startswith(label)
    assert len(_packs(cache)) == 3


@pytest.mark.parametrize("changed", ["weights", "tokenizer.json", "chat_template.jinja"])
def test_another_version_is_packed_anew(
    cache: Path, published: Path, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = demo.open_checkpoint("demo", quiet=True).path
    copy = shutil.copytree(published, tmp_path / "newer")
    if changed == "weights":
        ref = Source(copy).refs["model.norm.weight"]
        with ref.file.open("r+b") as stream:
            stream.seek(ref.offset)
            stream.write(b"\x99")
    else:
        with (copy / changed).open("a") as stream:
            stream.write("\n")
    monkeypatch.setattr(demo, "bundled", lambda name: copy)
    new = demo.open_checkpoint("demo", quiet=True).path
    assert new != old
    assert _packs(cache) == sorted([old, new])


def test_another_format_is_packed_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashmoe_lab.checkpoint import pack_cache

    source, settings = Source(demo.demo_directory()), fl.PackSettings.of(4)
    now = pack_cache.pack_key(source, settings)
    monkeypatch.setattr(pack_cache, "FORMAT_VERSION", pack_cache.FORMAT_VERSION + 1)
    assert pack_cache.pack_key(source, settings) != now


def test_interrupted_packing_is_gone_on_with(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(line: object, nbytes: int) -> None:
        if list(cache.glob("*/experts/layer_00.safetensors")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo.ProgressLine, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.open_checkpoint("demo", quiet=True)
    (pack,) = _packs(cache)
    assert not (pack / "packed.json").exists()
    first_layer = (pack / "experts" / "layer_00.safetensors").stat()
    opened = demo.open_checkpoint("demo", quiet=True)
    assert opened.path == pack
    assert (pack / "experts" / "layer_00.safetensors").stat().st_ino == first_layer.st_ino
    assert list(opened.verify()) == []


def test_lost_file_is_made_again(cache: Path) -> None:
    opened = demo.open_checkpoint("demo", quiet=True)
    opened.layers[1].path.unlink()
    assert list(demo.open_checkpoint("demo", quiet=True).verify()) == []


def test_several_processes_at_once(cache: Path, published: Path) -> None:
    code = (
        "import sys; from flashmoe_lab.demo import packed_at\n"
        "from flashmoe_lab.checkpoint.source import Source\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "opened = packed_at(Source(sys.argv[1]), 'demo', 3)\n"
        "assert list(opened.verify()) == []; print(opened.path)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(published)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, answers
    assert len({out for out, _ in answers}) == 1
    assert sum("pack demo, 3bit 100%" in err for _, err in answers) == 1


def test_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "bundled", lambda name: tmp_path / name)
    for command in (["generate", "demo", "--prompt", "a"], ["inspect", "demo"], ["verify", "demo"]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "the weights of the demo model are not in this copy of flashmoe-lab" in line


def test_directory_of_that_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "demo", "demo", "--bits", "8", "--quiet"]) == 0
    capsys.readouterr()
    for other in ("./demo", Path("demo"), Path("demo").absolute()):
        with fl.load(other) as engine:
            assert engine.checkpoint.label.startswith("8 bits")
    with pytest.warns(UserWarning, match=r"demo is the bundled model; the directory .* is ./demo"):
        engine = fl.load("demo")
    assert engine.checkpoint.label.startswith("4 bits")
    engine.close()


@pytest.mark.parametrize("bits", [0, 7, "4", "all", True])
def test_bits_that_do_not_exist(cache: Path, bits: int | str) -> None:
    with pytest.raises(ValueError, match='bits is .*; allowed are 2, 3, 4, 5, 6, 8 and "none"'):
        fl.load("demo", bits)
    assert not cache.exists()


def test_bits_of_a_packed_directory(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = demo.open_checkpoint("demo", quiet=True).path
    with pytest.raises(ValueError, match="bits is 2: only demo is packed as it is opened"):
        fl.load(path, 2)
    assert main(["generate", str(path), "--bits", "none", "--prompt", "a"]) == 2
    assert "bits is none: only demo" in capsys.readouterr().err


def test_wrong_setting_packs_nothing(cache: Path) -> None:
    with pytest.raises(TypeError):
        fl.load("demo", no_such_setting=1)
    assert not cache.exists()


def test_commands(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "demo", "--bits", "2", "--prompt", "a", "--max-tokens", "3"]
    assert main(arguments) == 0
    assert "experts 2 bits" in capsys.readouterr().err
    assert main(["verify", "demo", "--bits", "2", "--quiet"]) == 0
    assert capsys.readouterr().err == "demo: every checksum is right\n"
    assert main(["inspect", "demo"]) == 0
    assert "(published checkpoint)" in capsys.readouterr().out
    assert len(_packs(cache)) == 1


def test_damaged_pack_says_what_to_do(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = demo.open_checkpoint("demo", quiet=True)
    with opened.layers[0].path.open("r+b") as stream:
        stream.seek(20_000)
        stream.write(b"\xff" * 8)
    assert main(["verify", "demo", "--quiet"]) == 2
    assert f"remove {opened.path} and it is packed anew" in capsys.readouterr().err


def test_place_of_bundled_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "flashmoe_lab"
    (package.parent / "data").mkdir(parents=True)  # of somebody else
    monkeypatch.setattr(bundled, "_PACKAGE", package)
    assert bundled.bundled("prompts") == package / "data" / "prompts"
    (package.parent / "pyproject.toml").touch()  # a clone
    assert bundled.bundled("prompts") == package.parent / "data" / "prompts"


def test_the_bundled_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = bundled.bundled("demo_model")
    if not (weights / "model.safetensors.index.json").exists():
        pytest.skip(f"the weights are not in {weights}")
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path))
    plan = PackPlan.make(Source(weights), tmp_path / "plan", fl.PackSettings.of(4))
    assert plan.nbytes < 40e6
    with fl.load("demo") as engine:
        text = engine.generate("Once upon a time, there was", 24).text
        assert engine.config.num_experts >= 64
    assert text.isprintable() and len(text.split()) > 10
