"""Every notebook runs from top to bottom as a reader would run it, and lies in git as it should.

They run in a directory of their own on the bundled model; where its weights are missing they are
skipped, and say so.
"""

import json
import os
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[01]*.ipynb"))
WEIGHTS = ROOT / "data" / "demo_model" / "model.safetensors.index.json"
_TIMEOUT_S = 300  # of a cell; only to end what hangs
_LARGEST_NBYTES = 60_000


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where notebooks run and export to."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the weights of the demo model are not here")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_leaves_what_it_exports(
    notebook: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLASHMOE_MODEL", raising=False)
    executed = _execute(nbformat.read(notebook, as_version=4), work)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    if "09" in notebook.stem:  # its figures come when Run is pressed
        return
    bundles = [output["data"] for output in outputs if "data" in output]
    assert any("image/png" in data for data in bundles) or notebook.stem.startswith(("10", "11"))
    assert all(len(data.get("text/plain", "")) < 4000 for data in bundles)
    folder = work / "out" / notebook.stem
    assert any(file.is_file() for file in folder.rglob("*")), f"nothing was exported to {folder}"


def test_a_copy_without_weights_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cell that opens the model stops with words, not with a riddle."""
    content = nbformat.read(ROOT / "notebooks" / "01_quickstart.ipynb", as_version=4)
    hide = "from flashmoe_lab import demo\ndemo.bundled = lambda name: demo.Path('/nowhere')"
    content.cells.insert(0, nbformat.v4.new_code_cell(hide))
    monkeypatch.delenv("FLASHMOE_MODEL", raising=False)
    with pytest.raises(Exception, match="weights of the demo model are not in this copy"):
        _execute(content, tmp_path)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_in_git(notebook: Path) -> None:
    """Small, without outputs, valid, with ids that stay; the parameters come first."""
    text = _committed(notebook)
    assert len(text.encode()) <= _LARGEST_NBYTES
    content = json.loads(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ids that are missing or double
        nbformat.validate(content)
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]]
    assert "widgets" not in content["metadata"]
    assert content["cells"][0]["cell_type"] == "markdown"
    assert "parameters" in code[0]["metadata"].get("tags", [])
    assert all(re.fullmatch(r"[a-z0-9-]+", cell["id"]) for cell in content["cells"])


def test_there_are_all_of_them() -> None:
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers == [f"{n:02d}" for n in range(1, len(numbers) + 1)]


def _execute(content: Any, directory: Path) -> Any:
    with warnings.catch_warnings():
        # Jupyter's own: sockets and event loops that its clients leave to the collector.
        warnings.simplefilter("ignore")
        client = NotebookClient(
            content,
            timeout=_TIMEOUT_S,
            kernel_name="python3",
            resources={"metadata": {"path": str(directory)}},
        )
        return client.execute(env=dict(os.environ))


def _committed(notebook: Path) -> str:
    """The notebook as it is in git's index: a reader's working copy may hold outputs."""
    name = f":notebooks/{notebook.name}"
    found = subprocess.run(["git", "show", name], cwd=ROOT, capture_output=True, check=False)
    return found.stdout.decode() if found.returncode == 0 else notebook.read_text("utf-8")
