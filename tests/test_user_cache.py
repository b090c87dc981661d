"""Where the user's cache is, and locks among processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe_lab.user_cache import locked, make_directory, user_cache_directory


def _place(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Path:
    for name in ("FLASHMOE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return user_cache_directory()


def test_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert _place(monkeypatch, HOME="/h") == Path("/h/.cache/flashmoe_lab")
    assert _place(monkeypatch, HOME="/h", FLASHMOE_CACHE="") == Path("/h/.cache/flashmoe_lab")
    assert _place(monkeypatch, XDG_CACHE_HOME="/x") == Path("/x/flashmoe_lab")
    assert _place(monkeypatch, HOME="/h", XDG_CACHE_HOME="x") == Path("/h/.cache/flashmoe_lab")
    assert _place(monkeypatch, XDG_CACHE_HOME="/x", FLASHMOE_CACHE="/f") == Path("/f")
    monkeypatch.chdir(tmp_path)
    assert _place(monkeypatch, FLASHMOE_CACHE="here") == tmp_path / "here"
    assert _place(monkeypatch, HOME="/h", FLASHMOE_CACHE="~/c") == Path("/h/c")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _place(monkeypatch, HOME="/h") == Path("/h/Library/Caches/flashmoe_lab")


def test_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="FLASHMOE_CACHE names another place") as caught:
        make_directory(tmp_path / "file" / "packed")
    assert str(tmp_path / "file" / "packed") in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_place_without_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot be used as a cache"):
        make_directory(tmp_path)


def test_lock_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from flashmoe_lab.user_cache import locked\n"
        "with locked(Path(sys.argv[1]), lambda: print('waiting', flush=True)): print('held')"
    )
    with locked(file):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        assert other.stdout.readline() == "waiting\n"
    assert other.communicate(timeout=60)[0] == "held\n"
    with locked(file, lambda: pytest.fail("nobody holds it")):
        pass


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from flashmoe_lab.user_cache import locked\n"
        "with locked(Path(sys.argv[1])): os._exit(9)"
    )
    file = tmp_path / "lock"
    assert subprocess.run([sys.executable, "-c", code, str(file)], check=False).returncode == 9
    with locked(file, lambda: pytest.fail("nobody holds it")):
        pass
