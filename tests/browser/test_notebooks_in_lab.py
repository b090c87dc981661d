"""The first notebooks in a real JupyterLab: run, exported, opened again, interrupted."""

from collections.abc import Callable
from typing import Any

from tests.browser.lab import Lab, Notebook

Open = Callable[[str], Notebook]
# Each token takes so long that there is time to press a button.
SLOW = """

import time

slowly = engine.intercept("layers.0.router", lambda routing, path: time.sleep(0.2))
slowly.__enter__()
"""


def test_quickstart_runs_and_is_still_there_after_its_kernel(open_notebook: Open, lab: Lab) -> None:
    notebook = open_notebook(lab.edit("01_quickstart.ipynb"))
    notebook.run_all()
    pictures = notebook.page.locator(".jp-OutputArea-output img")
    assert pictures.count() == 3
    assert "K=8 (the model's own)" in notebook.text(notebook.cell("engine.summary(run)"))
    exported = lab.directory / "out" / "01_quickstart"
    for name in ("experts", "reads", "latency"):
        assert (exported / f"{name}.svg").read_text().startswith("<?xml")
        assert (exported / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (exported / "trace" / "reads.parquet").exists()
    before = notebook.text()
    notebook.reload_without_kernel()
    assert notebook.text() == before and pictures.count() == 3
    assert "model not found" not in notebook.text()


def test_tokens_come_one_after_another_and_the_square_button_frees_the_engine(
    open_notebook: Open, lab: Lab
) -> None:
    again = "print('again:', len(engine.generate('Once', 2).tokens))"
    opening = "fl.load(MODEL, bank_gb=BANK_GB)"
    name = lab.edit("01_quickstart.ipynb", (opening, opening + SLOW), last=again)
    notebook = open_notebook(name)
    notebook.start_all()
    streaming = notebook.cell("for step in run:")
    outputs = notebook.outputs(streaming)
    outputs.first.wait_for()
    seen = {len(notebook.text(streaming))}
    notebook.page.wait_for_timeout(1000)
    seen.add(len(notebook.text(streaming)))
    notebook.page.wait_for_timeout(1000)
    seen.add(len(notebook.text(streaming)))
    assert len(seen) == 3, "the text did not grow while it was looked at"
    notebook.interrupt()
    streaming.get_by_text("KeyboardInterrupt").first.wait_for()
    notebook.wait_for_kernel()
    last = notebook.cell("print('again:'")
    notebook.run(last)
    notebook.outputs(last).get_by_text("again: 2").wait_for()


def test_one_token_shows_the_stages_of_a_layer(open_notebook: Open, lab: Lab) -> None:
    notebook = open_notebook(lab.edit("02_one_token.ipynb"))
    notebook.run_all()
    cards = notebook.cell("step.path.startswith")
    captions = cards.locator("caption").all_inner_texts()
    stages = ("input_norm", "mixer", "post_norm", "router", "shared_expert", "fetch", "experts")
    assert captions == [f"layers.3.{stage}" for stage in stages]
    assert (lab.directory / "out" / "02_one_token" / "one_token.svg").exists()
    before = _words(notebook)
    notebook.reload_without_kernel()
    assert _words(notebook) == before
    assert "model not found" not in notebook.text()


def _words(notebook: Notebook) -> list[Any]:
    return notebook.page.locator(".jp-OutputArea-output caption").all_inner_texts()
