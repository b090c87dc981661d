"""The playground as a reader has it: keys, mouse, streaming, Stop, export, and what stays."""

import re
import time

import pytest

PLAYGROUND = "09_playground.ipynb"
MANY = ("max_tokens.value = MAX_TOKENS", "max_tokens.value = 2000")
_OPEN = "engine = fl.load(MODEL, bank_gb=BANK_GB)"
SLOW = (  # a story is soon over
    _OPEN,
    f"{_OPEN}\nimport time\n"
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


def wait_for_tokens(page, more_than):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (now := tokens(page)) > more_than:
            return now
        page.wait_for_timeout(20)
    raise AssertionError(f"no more than {more_than} tokens: {status(page).inner_text()}")


def test_it_runs_from_top_to_bottom_and_its_results_stay(open_notebook):
    notebook = open_notebook(PLAYGROUND)
    notebook.run_all()
    cell = notebook.cell("fl.widgets.Playground(")
    figures = cell.locator(".jp-OutputArea-output img[alt]")
    assert figures.count() >= 3 and "generated" in notebook.text(cell)
    assert "trace_for_perfetto.json.gz" in notebook.text(notebook.cell("playground.export()"))
    notebook.reload_without_kernel()
    cell = notebook.cell("fl.widgets.Playground(")
    assert cell.locator(".jp-OutputArea-output img[alt]").count() >= 3
    result = notebook.outputs(cell).last
    assert "generated" in result.inner_text() and "model not found" not in result.inner_text()
    other = notebook.text(notebook.cell("fl.widgets.play("))
    assert "generated" in other and "model not found" not in other


def test_sliders_move_by_key_mouse_and_typing(opened):
    page = opened.page
    k = slider(page, "K (own")
    before = int(k.locator(".widget-readout").inner_text())
    k.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert int(k.locator(".widget-readout").inner_text()) == before + 2
    k.locator(".widget-readout").fill("3")
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
    slider(page, "Temperature").locator(".widget-readout").fill("1")
    page.keyboard.press("Enter")
    button(page, "Run").click()
    first = wait_for_tokens(page, 0)
    page.locator(".widget-image").first.wait_for()
    second = wait_for_tokens(page, first)
    assert 0 < first < second < 2000  # one after another, not all at once
    handle = slider(page, "K (own").locator(".noUi-handle")
    handle.focus()
    page.keyboard.press("ArrowLeft")  # sliders move meanwhile
    cell = opened.cell("print(1 + 1")
    opened.run(cell)
    cell.locator(".jp-OutputArea-output", has_text="2 Setting(").wait_for()
    assert button(page, "Stop").is_enabled()  # still under way
    button(page, "Stop").click()
    status(page).get_by_text("ended by cancelled").wait_for()
    assert tokens(page) < 2000
    assert button(page, "Run").is_enabled()
    button(page, "Export").click()
    status(page).get_by_text("files are in").wait_for()
