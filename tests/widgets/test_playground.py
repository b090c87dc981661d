"""The Playground without a browser: its traits, its thread, its result."""

import gc
import threading
import time
from collections import Counter

import pytest

from flashmoe_lab.trace import Trace
from flashmoe_lab.widgets import Played, Playground, play
from flashmoe_lab.widgets import played as played_module
from flashmoe_lab.widgets.forms import forms_of


@pytest.fixture
def playground(engine):
    found = Playground(engine, "hello <b>you</b>")
    found.controls.max_tokens.value = 12
    yield found
    found.stop()
    if found._thread is not None:
        found._thread.join()


def test_controls_say_the_setting(engine, playground):
    controls = playground.controls
    assert controls.k.value == engine.num_experts_per_tok and controls.k.max == 8
    assert controls.setting().bank_gb is None
    controls.k.value, controls.temperature.value = 2, 0.5
    controls.bits.value = forms_of(engine.checkpoint)[1].label
    controls.bank.value, controls.page_cache.value = 0.0, "cold"
    setting = controls.setting()
    assert (setting.num_experts_per_tok, setting.temperature) == (2, 0.5)
    assert setting.bits.startswith("8 bits") and setting.bank_gb == 0.0
    assert setting.page_cache == "cold" and setting.max_tokens == 12


def test_a_run_gives_what_generate_gives(engine, playground):
    playground.controls.k.value = 2
    playground.start()
    played = playground.wait()
    expected = engine.generate("hello <b>you</b>", 12, num_experts_per_tok=2)
    assert played.text == expected.text and playground.last is played
    assert played.trace.facts["num_experts_per_tok"] == 2
    assert played.conditions["K"] == "2 of 8 (K=2 of the model's 3)"
    assert "12 tokens at" in playground.status.value and "K=2" in playground.status.value
    assert playground._shown.content is played
    assert bytes(playground.image.value).startswith(b"\x89PNG")


def test_what_is_shown_is_escaped(playground):
    playground.start()
    html = playground.wait()._repr_html_()
    assert "hello &lt;b&gt;you" in html and "<b>you" not in html
    assert html.count("<img alt=") == 3


def test_buttons_follow_the_run(playground):
    assert playground.stop_button.disabled and playground.export_button.disabled
    playground.controls.max_tokens.value = 900
    playground.run_button.click()
    assert playground.run_button.disabled and not playground.stop_button.disabled
    first = playground._thread
    playground.start()  # a second press while one is under way
    assert playground._thread is first
    playground.stop_button.click()
    played = playground.wait()
    assert not playground.run_button.disabled and playground.stop_button.disabled
    assert not playground.export_button.disabled
    assert played.conditions["ended by"] == "cancelled"


def test_who_reads_that_a_run_is_over_can_press_the_next_button(playground):
    said = list[tuple[str, bool]]()
    playground.status.observe(
        lambda change: said.append((change["new"], playground.run_button.disabled)), "value"
    )
    playground.start()
    playground.wait()
    assert [disabled for words, disabled in said if "The result is below" in words] == [False]


def test_stop_ends_within_a_token(engine, playground):
    playground.controls.max_tokens.value = 900
    playground.start()
    end = time.monotonic() + 30
    while not (playground._run and len(playground._run.tokens) > 3) and time.monotonic() < end:
        time.sleep(0.001)
    run = playground._run
    playground.stop()
    made = run.stats.decode.tokens
    playground.wait()
    assert run.stats.decode.tokens <= made + 1


def test_stop_before_there_is_a_run(playground, monkeypatch):
    from flashmoe_lab.widgets import playground as module

    waiting, go = threading.Event(), threading.Event()

    def slow(engine, setting):
        waiting.set()
        go.wait(30)

    monkeypatch.setattr(module, "prepare", slow)
    playground.controls.max_tokens.value = 900
    playground.start()
    waiting.wait(30)
    playground.stop()
    go.set()
    assert len(playground.wait().trace.tokens) < 20


def test_an_error_is_told_and_the_next_run_is_well(playground, monkeypatch):
    from flashmoe_lab.widgets import playground as module

    real = module.prepare
    monkeypatch.setattr(module, "prepare", lambda *_: (_ for _ in ()).throw(OSError("no <disk>")))
    playground.start()
    with pytest.raises(OSError, match="no <disk>"):
        playground.wait()
    assert "OSError: no &lt;disk&gt;" in playground.status.value
    monkeypatch.setattr(module, "prepare", real)
    playground.start()
    assert len(playground.wait().trace.tokens) == 12 + len("hello <b>you</b>") - 1


def test_runs_leave_no_thread_behind(playground, monkeypatch):
    monkeypatch.setattr(Played, "_repr_html_", lambda self: "")  # drawing is slow
    labels = list(playground.controls.bits.options)
    for label in reversed(labels):  # the threads that open and draw begin with the first of each
        playground.controls.bits.value = label
        playground.start()
        playground.wait()
    threads = set(threading.enumerate())
    for turn in range(4):
        playground.controls.bits.value = labels[turn % 2]
        playground.controls.k.value = 1 + turn
        playground.start()
        playground.wait()
    playground.controls.bits.value = labels[0]
    playground.start()
    playground.wait()
    assert set(threading.enumerate()) == threads


def test_runs_leave_nothing_alive_but_the_last(playground):
    labels = list(playground.controls.bits.options)
    alive = list[Counter[str]]()
    for turn in range(6):
        playground.controls.bits.value = labels[turn % 2]
        playground.controls.k.value = 1 + turn
        playground.start()
        playground.wait()
        gc.collect()
        alive.append(Counter(type(thing).__name__ for thing in gc.get_objects()))
    for name in ("Engine", "ExpertBank", "Run", "Played", "Trace", "LiveFigure", "Live", "Figure"):
        counts = [count[name] for count in alive[2:]]
        assert counts[2:] == counts[:2], name
    assert alive[-1]["Played"] - alive[0]["Played"] == 0


def test_export(playground, tmp_path, monkeypatch):
    monkeypatch.setattr(played_module, "EXPORTED", ("io_timeline",))
    with pytest.raises(ValueError, match="nothing to export yet"):
        playground.export()
    playground.start()
    played = playground.wait()
    playground.out.value = str(tmp_path / "out")
    playground.export_button.click()
    playground._thread.join()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"io_timeline.svg", "io_timeline.png", "trace_for_perfetto.json.gz"} <= names
    assert len(Trace.read(tmp_path / "out" / "trace").tokens) == len(played.trace.tokens)
    assert "files are in" in playground.status.value


def test_play_is_the_same_without_widgets(engine):
    played = play(engine, "hello", max_tokens=5, num_experts_per_tok=1, page_cache="warm")
    assert played.text == engine.generate("hello", 5, num_experts_per_tok=1).text
    assert played.setting.num_experts_per_tok == 1 and "files in the page cache" in repr(played)
    assert set(played.plots) == {"experts", "reads", "layers"}


def test_a_run_that_was_too_short_shows_what_there_is(engine):
    played = play(engine, "hello", max_tokens=1)
    assert set(played.plots) == {"experts"} and "1 tokens at" in played.conditions["generated"]
