"""The command line, in process; one run as a real command."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe_lab.cli import main

GOLDEN = Path(__file__).parent / "data" / "golden"
TINY = Path(__file__).parents[1] / "data" / "tiny.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed synthetic model of 4 layers with a tokenizer."""
    path = tmp_path_factory.mktemp("cli") / "tiny"
    assert main(["synth", str(TINY), str(path), "--layers", "4", "--quiet"]) == 0
    return path


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("flashmoe-lab: error: ")
    return lines[0]


def test_pack_verify_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published, packed = tmp_path / "published", tmp_path / "packed"
    assert main(["synth", str(TINY), str(published), "--layers", "2", "--bits", "none"]) == 0
    assert main(["pack", str(published), str(packed), "--bits", "3"]) == 0
    assert main(["verify", str(packed)]) == 0
    assert "every checksum is right" in capsys.readouterr().err
    assert main(["generate", str(packed), "--prompt", "abc", "--max-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    for words in ("prefill 3 tokens", "decode 3", "read ", "bank hits", "K=8 (the model's own)"):
        assert words in captured.err
    assert "experts 3 bits" in captured.err
    assert "reader pread" in captured.err


def test_generate_names_what_is_lossy(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tiny), "--prompt", "a", "--max-tokens", "2", "-K", "4"]) == 0
    assert "K=4 [lossy: K=4 of the model's 8]" in capsys.readouterr().err


def test_stats_file(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    arguments = ["generate", str(tiny), "--prompt-ids", "5,6,7", "--max-tokens", "6"]
    assert main([*arguments, "--bank-gb", "0", "--stats", str(file)]) == 0
    stats = json.loads(file.read_text())
    block = 65536  # 3 * 128 * 256 weights at 4.5 bits, rounded up to 16 KiB
    assert stats["decode"]["tokens"] == 5
    assert stats["decode"]["read_nbytes"] == 5 * 4 * 8 * block
    assert stats["decode"]["hits"] == 0
    assert len(stats["tokens"]) == 6
    assert stats["peak_rss_nbytes"] > 0


def test_same_seed_same_text(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ["generate", str(tiny), "--prompt", "a", "--max-tokens", "12"]
        assert main([*arguments, "--temperature", "1", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_control_characters_do_not_reach_the_terminal(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(tiny), "--prompt", "a", "--max-tokens", "200"]
    assert main([*arguments, "--temperature", "100", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert "\N{REPLACEMENT CHARACTER}" in text
    assert all(c in "\t\n" or c.isprintable() or c.isspace() or ord(c) > 159 for c in text)
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-K", "0"], "between 1 and 64"),
        (["-K", "65"], "between 1 and 64"),
        (["--bank-gb", "-1"], "bank_gb is -1.0"),
        (["--threads", "0"], "threads"),
        (["--top-p", "2"], "top_p is 2.0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--stats", "/nowhere/x.json"], "no such directory for --stats"),
        (["--max-tokens", "5000"], "the model was made for 4096"),
        (["--resident", "--bank-gb", "1"], "leave bank_gb out"),
    ],
)
def test_bad_settings(
    tiny: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tiny), "--prompt", "a", *arguments]) == 2
    assert words in _error(capsys)


def test_token_id_out_of_range(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tiny), "--prompt-ids", "512"]) == 2
    assert "token id 512: ids are 0 to 511" in _error(capsys)


def test_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "no"), "--prompt", "a"]) == 2
    assert "no such directory" in _error(capsys)
    assert main(["generate", str(GOLDEN / "hf"), "--prompt", "a"]) == 2
    assert "not a packed checkpoint" in _error(capsys)


def test_without_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "packed"
    assert main(["pack", str(GOLDEN / "mlx4"), str(packed), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["generate", str(packed), "--prompt", "a"]) == 2
    assert "give the prompt as token ids" in capsys.readouterr().err
    assert main(["generate", str(packed), "--prompt-ids", "1,2", "--max-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.split()) == 3


def test_flipped_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "packed"
    assert main(["pack", str(GOLDEN / "mlx4"), str(packed), "--quiet"]) == 0
    file = packed / "experts" / "layer_02.safetensors"
    content = bytearray(file.read_bytes())
    content[16384 + 5 * 16384 + 77] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert main(["verify", str(packed), "--quiet"]) == 2
    error = _error(capsys)
    assert "layer_02.safetensors: layer 2, expert 5: checksum" in error
    prompt = ",".join(map(str, range(3, 60)))
    assert main(["generate", str(packed), "--prompt-ids", prompt, "--verify"]) == 2
    assert "layer 2, expert 5: checksum" in capsys.readouterr().err


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "397b", "-K", "4"]) == 0
    out = capsys.readouterr().out
    assert "7,077,888" in out
    assert "1,698,693,120" in out
    assert main(["inspect", "nothing"]) == 2
    assert "known names are 397b" in _error(capsys)


def test_interrupt_during_generation(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flashmoe_lab.run import Run

    taken = Run._take
    count = 0

    def interrupted(run: Run) -> object:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return taken(run)

    monkeypatch.setattr(Run, "_take", interrupted)
    assert main(["generate", str(tiny), "--prompt", "a", "--max-tokens", "500"]) == 130
    assert "decode" in capsys.readouterr().err


def test_closed_pipe(tiny: Path) -> None:
    command = f"{sys.executable} -m flashmoe_lab generate {tiny} --prompt a --max-tokens 300"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (141, "")


def test_as_a_real_command(tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flashmoe_lab", "generate", str(tiny), "--prompt", "-"],
        input="hello",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "prefill 5 tokens" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A packed copy of the golden model, to be damaged."""
    packed = tmp_path / "packed"
    assert main(["pack", str(GOLDEN / "mlx4"), str(packed), "--quiet"]) == 0
    capsys.readouterr()
    return packed


def _truncate(packed: Path) -> str:
    file = packed / "experts" / "layer_01.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(16384 * (1 + 3) + 5000)
    return "layer_01.safetensors: layer 1: cut off: 70536 of 147520 bytes; expert 3 is the first"


def _remove(packed: Path) -> str:
    (packed / "experts" / "layer_03.safetensors").unlink()
    return "layer_03.safetensors: layer 3: the file is missing"


def _lie(packed: Path) -> str:
    file = packed / "experts" / "layer_02.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[8,16384]', b'"shape":[9,16384]', 1))
    return "layer_02.safetensors: layer 2: its header is not the one that packed.json implies"


def _lie_about_resident(packed: Path) -> str:
    file = packed / "resident.safetensors"
    content = file.read_bytes()
    file.write_bytes(b"\xff" * 8 + content[8:])
    return "resident.safetensors: not a safetensors file, or cut off"


def _other_architecture(packed: Path) -> str:
    file = packed / "config.json"
    file.write_text(file.read_text().replace('"qwen3_5_moe', '"llama5'))
    return "config.json: model_type is 'llama5_text'; supported are qwen3_5_moe"


@pytest.mark.parametrize(
    "damage", [_truncate, _remove, _lie, _lie_about_resident, _other_architecture]
)
def test_damage_is_named_in_one_line(
    damaged: Path, damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = damage(damaged)
    for command in (["verify"], ["inspect"], ["generate", "--prompt-ids", "1"]):
        assert main([command[0], str(damaged), *command[1:]]) == 2
        assert words in _error(capsys)


def test_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flashmoe_lab", "pack", str(GOLDEN / "hf"), str(small / "p")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert "no room on the disk: " in done.stderr
        assert not (small / "p" / "packed.json").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)
