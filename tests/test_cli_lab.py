"""`flashmoe-lab lab`: what it starts, with which notebook and model."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashmoe_lab.cli import lab, main

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """(command, environment) of what the command would have become."""
    found: list[tuple[list[str], dict[str, str]]] = []

    def execve(program: str, command: list[str], environment: dict[str, str]) -> None:
        assert program == sys.executable
        found.append((command, environment))

    monkeypatch.setattr(os, "execve", execve)
    return found


def test_the_first_notebook_is_open_and_the_model_is_demo(started: Any) -> None:
    main(["lab"])
    ((command, environment),) = started
    first = "--LabApp.default_url=/lab/tree/01_quickstart.ipynb"
    assert command[1:] == ["-m", "jupyterlab", f"--ServerApp.root_dir={NOTEBOOKS}", first]
    assert environment["FLASHMOE_MODEL"] == "demo" and environment["PATH"] == os.environ["PATH"]


def test_a_model_is_named_so_that_a_notebook_finds_it(
    started: Any, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed("golden/hf", 4)
    monkeypatch.chdir(path.parent)
    main(["lab", path.name, "--", "--no-browser", "--port=9999"])
    main(["lab", "--", "--no-browser"])
    assert started[0][1]["FLASHMOE_MODEL"] == str(path)
    assert started[0][0][-2:] == ["--no-browser", "--port=9999"]
    assert started[1][1]["FLASHMOE_MODEL"] == "demo" and started[1][0][-1] == "--no-browser"


def test_root_is_told_what_jupyterlab_wants_of_it(
    started: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    main(["lab"])
    assert "lab -- --allow-root" in capsys.readouterr().err
    main(["lab", "--", "--allow-root"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    main(["lab"])
    assert not capsys.readouterr().err
    assert [("--allow-root" in command) for command, _ in started] == [False, True, False]


def test_a_wrong_model_is_found_out_first(started: Any, capsys: Any, tmp_path: Path) -> None:
    assert main(["lab", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err and not started


def test_an_installed_package_gives_copies_away_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    package = tmp_path / "site-packages" / "flashmoe_lab"
    (package / "notebooks").mkdir(parents=True)
    (package / "notebooks" / lab.FIRST).write_text("first")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(lab, "_PACKAGE", package)
    copies = lab.notebooks_directory()
    assert copies == tmp_path / "work" / "flashmoe_notebooks"
    (copies / lab.FIRST).write_text("changed by its reader")
    assert (lab.notebooks_directory() / lab.FIRST).read_text() == "changed by its reader"
    assert capsys.readouterr().err.count("were copied to") == 1
