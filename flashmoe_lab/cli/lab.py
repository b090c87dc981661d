"""The command lab: JupyterLab in the notebooks' directory, with the first one open.

The notebooks of a clone are opened where they lie. An installed package is no place to work in, so
its notebooks are copied to the current directory first; copies that are there already stay.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.cli.options import Commands
from flashmoe_lab.demo import NAME, is_demo

MODEL = "FLASHMOE_MODEL"  # the environment variable from which notebooks take their model
FIRST = "01_quickstart.ipynb"
_ADDRESS = f"/lab/tree/{FIRST}"
_PACKAGE = Path(__file__).parents[1]
_COPIES = "flashmoe_notebooks"
_ROOT = (  # no refusal: the user's own settings may allow it
    "as root, JupyterLab starts only if told that it may: "
    "flashmoe-lab lab -- --allow-root, or make lab OPTIONS=--allow-root"
)


def _add_lab(commands: Commands) -> None:
    command = commands.add_parser(
        "lab",
        help="start JupyterLab with the notebooks",
        epilog="What follows -- goes to JupyterLab: flashmoe-lab lab demo -- --no-browser",
    )
    command.add_argument(
        "model", nargs="?", default=NAME, help="a packed checkpoint, or demo (the default)"
    )
    command.add_argument("jupyter", nargs="*", metavar="-- OPTIONS", help="options of JupyterLab")
    command.set_defaults(run=_lab)


def _lab(options: argparse.Namespace) -> int:
    model, jupyter = options.model, options.jupyter
    if model.startswith("-"):  # only options were given
        model, jupyter = NAME, [model, *jupyter]
    if not is_demo(model):
        model = str(PackedCheckpoint(model).path.resolve())  # a wrong path is found out now
    if os.geteuid() == 0 and "--allow-root" not in jupyter:
        print(_ROOT, file=sys.stderr)
    # The address, not a file's name: it is then printed too, for who has the browser elsewhere.
    where = [f"--ServerApp.root_dir={notebooks_directory()}", f"--LabApp.default_url={_ADDRESS}"]
    command = [sys.executable, "-m", "jupyterlab", *where, *jupyter]
    os.execve(sys.executable, command, {**os.environ, MODEL: model})


def notebooks_directory() -> Path:
    """Where the notebooks can be worked with."""
    clone = _PACKAGE.parent
    if (clone / "pyproject.toml").exists() and (clone / "notebooks" / FIRST).exists():
        return clone / "notebooks"
    copies = Path(_COPIES).resolve()
    if not copies.exists():
        shutil.copytree(_PACKAGE / "notebooks", copies)
        print(f"the notebooks were copied to {copies}", file=sys.stderr)
    return copies


COMMANDS = (_add_lab,)
