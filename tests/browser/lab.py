"""A JupyterLab for tests, and a notebook in it as a reader sees it: cells, outputs, menus."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

TOKEN = "for-tests"
_START_S, _RUN_S = 120, 240  # this may be a busy machine
_SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
    # Cells out of sight are cells all the same.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """A server that is running.

    Attributes:
        directory: the notebooks that it shows; tests may change them.
    """

    url: str
    directory: Path

    def edit(self, notebook: str, *changes: tuple[str, str], last: str = "") -> str:
        """A copy with text replaced in its cells and a code cell added; its name."""
        content = json.loads((self.directory / notebook).read_text("utf-8"))
        for old, new in changes:
            cells = [cell for cell in content["cells"] if old in "".join(cell["source"])]
            assert cells, f"{notebook} has no {old!r}"
            for cell in cells:
                cell["source"] = "".join(cell["source"]).replace(old, new)
        if last:
            cell = {"cell_type": "code", "id": "last", "metadata": {}, "source": last}
            content["cells"].append({**cell, "outputs": [], "execution_count": None})
        return self._write(notebook.replace(".ipynb", ""), content)

    def new(self, *sources: str) -> str:
        """A notebook of these code cells; its name."""
        cells = [
            {
                "cell_type": "code", "id": f"new-{number}", "metadata": {}, "source": source,
                "outputs": [], "execution_count": None,
            }
            for number, source in enumerate(sources)
        ]  # fmt: skip
        spec = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": spec}}
        return self._write("new", {**content, "cells": cells})

    def _write(self, stem: str, content: dict[str, Any]) -> str:
        name = f"{stem}_{time.monotonic_ns()}.ipynb"
        (self.directory / name).write_text(json.dumps(content), "utf-8")
        return name

    def end_kernels(self) -> None:
        """End every kernel: a test's own must not work beside the next one."""
        for kernel in self._kernels():
            with suppress(HTTPError):  # it may be ending by itself
                self._ask("DELETE", f"/api/kernels/{kernel['id']}")

    def _kernels(self) -> list[dict[str, Any]]:
        """Asked again where Jupyter stumbles (500) over one that ends while it lists them."""
        for pause_s in (0.5, 1, 2):
            with suppress(HTTPError):
                return json.loads(self._ask("GET", "/api/kernels"))
            time.sleep(pause_s)
        return json.loads(self._ask("GET", "/api/kernels"))

    def _ask(self, method: str, path: str) -> bytes:
        headers = {"Authorization": f"token {TOKEN}"}
        request = urllib.request.Request(self.url + path, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=_START_S) as answer:
            return answer.read()


@contextmanager
def running_lab(directory: Path, home: Path, environment: dict[str, str]) -> Iterator[Lab]:
    """Start JupyterLab, with nothing of the user's own, and end it and its kernels."""
    settings = home / "config" / "labconfig"
    settings.mkdir(parents=True)
    (settings / "default_setting_overrides.json").write_text(json.dumps(_SETTINGS))
    places = {
        "HOME": home,
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={directory}"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += ["--LabApp.extension_manager=readonly"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            command,
            env=environment | {name: str(place) for name, place in places.items()},
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_up(url, server, home / "log")
        yield Lab(url=url, directory=directory)
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_up(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api?token={TOKEN}", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()}")


class Notebook:
    """A notebook that is open in a page."""

    def __init__(self, page: "Page", url: str, name: str) -> None:
        self.page, self.name = page, name
        self._url = f"{url}/lab/workspaces/{name.split('.')[0]}/tree/{name}?token={TOKEN}&reset"
        page.goto(self._url)
        self.wait_for_kernel()

    def wait_for_kernel(self) -> None:
        """Until there is one and it has nothing to do: the notebook's own sign says so too soon."""
        status = self.page.locator("#jp-main-statusbar")
        status.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=_START_S * 1000)

    def cell(self, text: str) -> "Locator":
        """The code cell whose source has this text."""
        source = self.page.locator(".jp-InputArea-editor").filter(has_text=text)
        return self.page.locator(".jp-CodeCell").filter(has=source).first

    def use_kernel_of(self, other: str) -> None:
        """Work with the kernel of another notebook, as the Kernel menu offers it."""
        self.menu("Kernel", "Change Kernel…")
        dialog = self.page.locator(".jp-Dialog")
        kernel = dialog.locator(f"option[title*='Path: {other}']").get_attribute("value")
        dialog.locator("select").select_option(value=kernel)
        dialog.locator("button.jp-mod-accept").click()
        dialog.wait_for(state="detached")
        self.wait_for_kernel()

    def wait_until(self, condition: Callable[[], bool], told: Callable[[], str]) -> None:
        """Until something holds; AssertionError with what is told if it never does."""
        end = time.monotonic() + _START_S
        while not condition():
            assert time.monotonic() < end, told()
            self.page.wait_for_timeout(20)

    def outputs(self, cell: "Locator | None" = None) -> "Locator":
        """What cells put out; of all of them unless one is given."""
        return (cell or self.page).locator(".jp-OutputArea-output")

    def text(self, cell: "Locator | None" = None) -> str:
        """The outputs' text."""
        return "\n".join(self.outputs(cell).all_inner_texts())

    def results(self) -> str:
        """The text of the outputs that are to stay: all but the widgets themselves."""
        widget = "[data-mime-type='application/vnd.jupyter.widget-view+json']"
        lasting = self.page.locator(f".jp-OutputArea-output:not({widget})")
        return "\n".join(lasting.all_inner_texts())

    def menu(self, *path: str) -> None:
        """Choose an entry of the menu bar."""
        self.page.get_by_role("menuitem", name=path[0], exact=True).first.click()
        for name in path[1:]:
            label = self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{name}$"))
            label.first.click()

    def start_all(self) -> None:
        """Run every cell, not waiting."""
        self.menu("Run", "Run All Cells")

    def run_all(self) -> None:
        """Run every cell to its end, and none of them to an error."""
        self.start_all()
        self.wait_until_done()
        wrong = self.page.locator(".jp-OutputArea-output[data-mime-type*='error']")
        assert wrong.count() == 0, wrong.all_inner_texts()

    def wait_until_done(self) -> None:
        """Until every code cell that holds anything bears a number."""
        self.page.wait_for_function(
            """() => [...document.querySelectorAll('.jp-CodeCell')]
                .filter(cell => cell.querySelector('.cm-content').innerText.trim())
                .every(cell => /^\\[\\d+\\]:$/.test(
                    cell.querySelector('.jp-InputArea-prompt').innerText.trim()))""",
            timeout=_RUN_S * 1000,
        )
        self.wait_for_kernel()

    def run(self, cell: "Locator") -> None:
        """Run one cell, not waiting."""
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")

    def interrupt(self) -> None:
        """The square button."""
        self.page.locator("[data-command='notebook:interrupt-kernel']").first.click()

    def save(self) -> None:
        """Save, and wait until it has."""
        with self.page.expect_response(
            lambda answer: answer.request.method == "PUT" and "/api/contents/" in answer.url
        ):
            self.page.keyboard.press("Control+s")

    def reload_without_kernel(self) -> None:
        """What is left when the notebook is opened again and its kernel is gone."""
        self.save()
        outputs = self.outputs().count()
        self.menu("Kernel", "Shut Down Kernel")
        self.page.locator("#jp-main-statusbar").get_by_text("No Kernel").wait_for()
        self.page.goto(self._url)
        self.wait_until(
            lambda: self.outputs().count() >= outputs, lambda: f"not all of {outputs} outputs"
        )


def chromium_options(executable: str) -> dict[str, Any]:
    """For Playwright: headless, and as root too."""
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    return {"executable_path": executable, "headless": True, "args": arguments}
