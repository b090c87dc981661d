"""The first notebooks in a real JupyterLab: run, exported, opened again, interrupted."""

from collections.abc import Callable

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
    notebook.wait_until(lambda: pictures.count() == 3, lambda: f"{pictures.count()} pictures")
    assert "K=8 (the model's own)" in notebook.text(notebook.cell("engine.summary(run)"))
    exported = lab.directory / "out" / "01_quickstart"
    for name in ("experts", "reads", "latency"):
        assert (exported / f"{name}.svg").read_text().startswith("<?xml")
        assert (exported / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (exported / "trace" / "reads.parquet").exists()
    before = notebook.text()
    notebook.reload_without_kernel()
    notebook.wait_until(lambda: notebook.text() == before, notebook.text)
    assert pictures.count() == 3
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
    for _ in range(2):
        seen = notebook.text(streaming)
        notebook.wait_until(
            lambda seen=seen: len(notebook.text(streaming)) > len(seen),
            lambda: "the text did not grow while it was looked at",
        )
    notebook.interrupt()
    streaming.get_by_text("KeyboardInterrupt").first.wait_for()
    notebook.wait_for_kernel()
    last = notebook.cell("print('again:'")
    notebook.run(last)
    notebook.outputs(last).get_by_text("again: 2").wait_for()


def test_one_token_shows_the_stages_of_a_layer_and_follows_sliders(
    open_notebook: Open, lab: Lab
) -> None:
    notebook = open_notebook(lab.edit("02_one_token.ipynb"))
    notebook.run_all()
    stages = ("input_norm", "mixer", "post_norm", "router", "shared_expert", "fetch", "experts")
    cards = notebook.cell("step.path.startswith").locator("caption").all_inner_texts()
    assert cards == [f"layers.3.{stage}" for stage in stages]
    assert (lab.directory / "out" / "02_one_token" / "one_token.svg").exists()
    _move_sliders(notebook)
    before = notebook.page.locator(".jp-OutputArea-output caption").all_inner_texts()
    assert "layers.7.shared_expert" in before
    notebook.reload_without_kernel()
    captions = notebook.page.locator(".jp-OutputArea-output caption")
    notebook.wait_until(
        lambda: captions.all_inner_texts() == before,
        lambda: "what the widget showed last is not in the notebook",
    )
    assert "model not found" not in notebook.results()


def _move_sliders(notebook: Notebook) -> None:
    """The stepper's layer by an arrow key and by the mouse, its stage by a button."""
    stepper = notebook.cell("fl.widgets.Stepper")
    shown = stepper.locator("caption")
    shown.get_by_text("layers.0.router").wait_for()
    slider = stepper.locator(".widget-slider").filter(has_text="Layer")
    slider.locator(".noUi-handle").focus()
    notebook.page.keyboard.press("ArrowRight")
    shown.get_by_text("layers.1.router").wait_for()
    track = slider.locator(".noUi-target").bounding_box()
    handle = slider.locator(".noUi-handle").bounding_box()
    assert track and handle
    mouse = notebook.page.mouse
    mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    mouse.down()
    mouse.move(track["x"] + track["width"], track["y"] + track["height"] / 2, steps=8)
    mouse.up()
    shown.get_by_text("layers.7.router").wait_for()
    stepper.get_by_role("button", name="On").click()
    shown.get_by_text("layers.7.shared_expert").wait_for()
