"""The playground as a reader has it: keys, mouse, streaming, Stop, export, and what stays."""

import re

import pytest

from tests.browser.lab import Notebook

PLAYGROUND = "09_playground.ipynb"
MANY = ("max_tokens.value = MAX_TOKENS", "max_tokens.value = 2000")
_OPEN = "engine = fl.load(MODEL, bank_gb=BANK_GB)"
SLOW = (  # a story is soon over: take time for each token, and go on after its end
    _OPEN,
    f"{_OPEN}\nimport time\nfrom dataclasses import replace\n"
    "engine.config = replace(engine.config, eos_token_ids=())\n"
    "slow = engine.intercept('lm_head', lambda *_: time.sleep(0.05))\nslow.__enter__()",
)


@pytest.fixture
def opened(lab, open_notebook):
    """The notebook with its controls there, no run made yet, and long runs to stop."""
    name = lab.edit(PLAYGROUND, MANY, SLOW, last="print(1 + 1, playground.controls.setting())")
    notebook = open_notebook(name)
    for text in ("MODEL =", "fl.load(", "fl.widgets.Playground("):
        notebook.run(notebook.cell(text))
    button(notebook.page, "Run").wait_for()
    return notebook


def button(page, words):
    return page.locator("button.widget-button", has_text=words).first


def status(page):
    return page.locator(".widget-html [role=status]").first


def slider(page, name):
    return page.locator(".widget-slider", has_text=name).first


def tokens(page):
    found = re.match(r"([\d,]+) tokens", status(page).inner_text())
    return int(found[1].replace(",", "")) if found else 0


def wait_for_tokens(notebook, more_than):
    page = notebook.page
    notebook.wait_until(lambda: tokens(page) > more_than, lambda: status(page).inner_text())
    return tokens(page)


def readout(page, name):
    return int(slider(page, name).locator(".widget-readout").inner_text())


def press(notebook, name, key, value):
    """A key on a slider, until it shows the value."""
    page = notebook.page
    slider(page, name).locator(".noUi-handle").focus()
    page.keyboard.press(key)
    notebook.wait_until(
        lambda: readout(page, name) == value, lambda: f"{name} is {readout(page, name)}"
    )


def test_it_runs_from_top_to_bottom_and_its_results_stay(open_notebook):
    notebook = open_notebook(PLAYGROUND)
    notebook.run_all()
    cell = notebook.cell("fl.widgets.Playground(")
    figures = cell.locator(".jp-OutputArea-output img[alt]")
    figures.nth(2).wait_for()
    assert "generated" in notebook.text(cell)
    assert "trace_for_perfetto.json.gz" in notebook.text(notebook.cell("playground.export()"))
    notebook.reload_without_kernel()
    cell = notebook.cell("fl.widgets.Playground(")
    cell.locator(".jp-OutputArea-output img[alt]").nth(2).wait_for()
    result = notebook.outputs(cell).last
    assert "generated" in result.inner_text() and "model not found" not in result.inner_text()
    other = notebook.text(notebook.cell("fl.widgets.play("))
    assert "generated" in other and "model not found" not in other


def test_sliders_move_by_key_mouse_and_typing(opened):
    page = opened.page
    before = readout(page, "K (own")
    press(opened, "K (own", "ArrowRight", before + 1)
    press(opened, "K (own", "ArrowRight", before + 2)
    slider(page, "K (own").locator(".widget-readout").fill("3")
    page.keyboard.press("Enter")
    box = slider(page, "Temperature").locator(".noUi-target").bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    cell = opened.cell("print(1 + 1")
    opened.run(cell)
    told = cell.locator(".jp-OutputArea-output", has_text="Setting(")
    told.wait_for()
    text = told.inner_text()
    assert "num_experts_per_tok=3" in text
    temperature = re.findall(r"temperature=([\d.]+)", text)
    assert 0.5 < float(temperature[0]) < 1.5


def test_a_run_streams_answers_other_cells_and_stops(opened):
    page = opened.page
    button(page, "Run").click()
    first = wait_for_tokens(opened, 0)
    page.locator(".widget-image").first.wait_for()
    second = wait_for_tokens(opened, first)
    assert 0 < first < second < 2000  # one after another, not all at once
    press(opened, "K (own", "ArrowLeft", readout(page, "K (own") - 1)  # sliders move meanwhile
    cell = opened.cell("print(1 + 1")
    opened.run(cell)
    cell.locator(".jp-OutputArea-output", has_text="2 Setting(").wait_for()
    assert button(page, "Stop").is_enabled()  # still under way
    stop(opened)
    button(page, "Export").click()
    status(page).get_by_text("files are in").wait_for()


def test_a_second_notebook_of_the_same_kernel_is_answered_during_a_run(opened, lab):
    name = lab.new("1 + 1", "playground.controls.k.value")
    second = Notebook(opened.page.context.new_page(), lab.url, name)
    second.use_kernel_of(opened.name)
    page = opened.page
    page.bring_to_front()
    button(page, "Run").click()
    first = wait_for_tokens(opened, 0)
    k = readout(page, "K (own") - 1
    press(opened, "K (own", "ArrowLeft", k)
    second.page.bring_to_front()
    for source, answer in (("1 + 1", 2), ("playground.controls.k.value", k)):
        cell = second.cell(source)
        second.run(cell)
        second.outputs(cell).get_by_text(str(answer), exact=True).wait_for()
    page.bring_to_front()
    wait_for_tokens(opened, first)
    assert button(page, "Stop").is_enabled()  # still under way
    stop(opened)


def stop(notebook):
    page = notebook.page
    button(page, "Stop").click()
    status(page).get_by_text("ended by cancelled").wait_for()
    assert tokens(page) < 2000
    assert button(page, "Run").is_enabled()
