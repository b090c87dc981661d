"""A JupyterLab on copies of the notebooks, and pages of a real Chromium that may ask
nobody else.

All of it is skipped, and says so, where there is no Chromium or no Playwright.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.browser.lab import Lab, Notebook, chromium_options, running_lab

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "data" / "demo_model" / "model.safetensors.index.json"
# What JupyterLab itself logs: no fault of a notebook.
_HARMLESS = (
    "favicon",
    "ResizeObserver loop",
    "/lab/api/workspaces",
    "WebSocket connection",
    "Could not restore the debugger state",  # of the kernel that a notebook left for another
)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's program."""
    pytest.importorskip("playwright.sync_api", reason="browser tests want playwright")
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium here: browser tests are not run (apt-get install chromium)")
    return found


@pytest.fixture(scope="session")
def lab(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A server whose directory holds copies of all notebooks."""
    if not WEIGHTS.exists():
        pytest.skip("the weights of the demo model are not in this copy")
    directory = tmp_path_factory.mktemp("notebooks")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, directory)
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "FLASHMOE_CACHE": str(home / "cache")}
    with running_lab(directory, home, environment) as running:
        yield running


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """One Chromium for a file's tests. Playwright keeps an event loop running in this thread, in
    which later tests could not start theirs, so it ends with them."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**chromium_options(chromium))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, lab: Lab) -> Iterator[Any]:
    """A page that sees the server and nothing else; `page.context` may open more of them.

    At the end nothing may have been asked of another machine, and no error have been logged.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 1400})
    strangers, errors = list[str](), list[str]()

    def guard(route: Any) -> None:
        if urlsplit(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            strangers.append(route.request.url)
            route.abort()

    def heard(message: Any) -> None:
        words = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and not any(part in words for part in _HARMLESS):
            errors.append(words)

    def opened(page: Any) -> None:
        page.on("websocket", lambda socket: _check_socket(socket.url, strangers))

    context.route("**/*", guard)
    context.on("page", opened)
    context.on("console", heard)
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.set_default_timeout(60_000)
    yield context.new_page()
    context.close()
    assert not strangers, f"asked of another machine: {strangers}"
    assert not errors, f"errors in the browser's console: {errors}"


def _check_socket(url: str, strangers: list[str]) -> None:
    if urlsplit(url).hostname != "127.0.0.1":
        strangers.append(url)


@pytest.fixture
def open_notebook(page: Any, lab: Lab) -> Iterator[Callable[[str], Notebook]]:
    """`open_notebook("01_quickstart.ipynb")`: open in the page, its kernel idle; ended after the
    test."""
    yield lambda name: Notebook(page, lab.url, name)
    for one in page.context.pages:
        one.goto("about:blank")  # a page whose kernel ends would complain
    lab.end_kernels()
