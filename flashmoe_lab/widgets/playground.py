"""Playground: a prompt, its controls, and a run that is watched while it streams.

Callbacks set flags and start a thread; that thread consumes the run and updates the live view, and
MLX is at work in the engine's thread alone. The result is a plain output under the controls, so it
stays in the notebook. `play` does the same without widgets.
"""

import gc
import threading
from html import escape
from time import perf_counter
from typing import Any

import ipywidgets as w

from flashmoe_lab.engine import Engine
from flashmoe_lab.run import Run
from flashmoe_lab.units import format_nbytes
from flashmoe_lab.widgets.controls import RunControls, button, note
from flashmoe_lab.widgets.engines import engine_for, prepare
from flashmoe_lab.widgets.give_back import give_back
from flashmoe_lab.widgets.live import Live
from flashmoe_lab.widgets.live_figure import HEIGHT, WIDTH, LiveFigure
from flashmoe_lab.widgets.one_thread import in_one_thread
from flashmoe_lab.widgets.pace import Pace
from flashmoe_lab.widgets.played import Played, begin, played
from flashmoe_lab.widgets.setting import Setting
from flashmoe_lab.widgets.shown import Shown, display_with

_SHOWN_TEXT = 6000  # characters of a text under way
# Of one height, so that the picture under it stays in place; reversed, so that its end is seen.
_BOX = (
    "white-space:pre-wrap;max-width:75ch;line-height:1.4;height:7em;overflow-y:auto;"
    "display:flex;flex-direction:column-reverse"
)
PROMPT = "Tell me a story about a fox named Fina."


class Playground:
    """Controls, live view and result of runs of one engine.

    Attributes:
        controls: what the next run will be.
        last: what the last run gave, or None.
        error: what ended the last run, or None.
    """

    def __init__(self, engine: Engine, prompt: str = PROMPT, out: str = "out/playground") -> None:
        self.engine, self.controls = engine, RunControls(engine, prompt)
        self.last: Played | None = None
        self.error: BaseException | None = None
        self._shown = Shown()
        self._thread: threading.Thread | None = None
        self._run: Run | None = None
        self._figure: tuple[tuple[int, ...], LiveFigure] | None = None
        self._stopped = False
        self._lock = threading.Lock()
        self._build(out)

    def _build(self, out: str) -> None:
        self.run_button = button("Run", "Generate with these settings", "success", "play")
        self.stop_button = button("Stop", "End the run at its next token", "danger", "stop")
        self.export_button = button("Export", "Write figures and trace", "", "download")
        self.out = w.Text(out, description="into", layout=w.Layout(width="300px"))
        self.status, self.text, self.figures = w.HTML(), w.HTML(), w.HTML()
        self.image = w.Image(format="png", width=WIDTH, height=HEIGHT)
        self.image.layout = w.Layout(width=f"{WIDTH}px", height=f"{HEIGHT}px", max_width="100%")
        self._live = w.Accordion(
            [w.VBox([self.text, self.image, self.figures])],
            titles=("Live view",),
            selected_index=None,
        )
        self.run_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.export_button.on_click(lambda _: self._export_clicked())
        row = w.Layout(flex_flow="row wrap", align_items="center", margin="6px 0 0 0")
        actions = [self.run_button, self.stop_button, self.export_button, self.out]
        self.widget = w.VBox(
            [self.controls.widget, w.Box(actions, layout=row), self.status, self._live]
        )
        self._enable(running=False)

    def _ipython_display_(self) -> None:
        display_with(self.widget, self._shown)

    # From callbacks and cells

    def start(self) -> None:
        """Begin a run with the controls' values; does nothing while one is under way."""
        setting, prompt = self.controls.setting(), self.controls.prompt
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._stopped, self.error = False, None
            self._thread = threading.Thread(
                target=self._play, args=(prompt, setting), name="flashmoe-playground", daemon=True
            )
            self._enable(running=True)
            self._thread.start()

    def stop(self) -> None:
        """Ask the run to end; it does within one token."""
        self._stopped = True
        if (run := self._run) is not None:
            run.stop()

    def wait(self) -> Played | None:
        """Wait for the run under way; what it gave. For cells: a callback must not wait."""
        thread = self._thread
        try:
            while thread is not None and thread.is_alive():
                thread.join(0.1)  # an interrupt comes between two of these
        except KeyboardInterrupt:
            self.stop()
            raise
        if self.error is not None:
            raise self.error
        return self.last

    def export(self, directory: str | None = None) -> list[Any]:
        """Write the last run's figures and trace; the files.

        Raises:
            ValueError: nothing has been run yet.
        """
        if self.last is None:
            raise ValueError("there is nothing to export yet; run something first")
        return self.last.export(directory or self.out.value)

    def _export_clicked(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._export, name="flashmoe-export")
                self._thread.start()

    # In a thread of its own

    def _play(self, prompt: str, setting: Setting) -> None:
        failed = False
        try:
            self._say("opening the model")
            self._live.selected_index = 0
            with engine_for(self.engine, setting) as engine:
                self._say("preparing the page cache")
                prepare(engine, setting)
                self.last = self._follow(engine, prompt, setting)
            self._say("drawing the figures")
            self._shown.show(self.last)
            self._live.selected_index = None
            words = self._ended(self.last)
        except BaseException as error:  # a thread's error would be lost
            self.error, failed = error, True
            words = f"{type(error).__name__}: {error}"
        self._run = None
        give_back()
        self._enable(running=False)
        self._say(words, failed)  # last: who reads that it is over can press the next button

    def _follow(self, engine: Engine, prompt: str, setting: Setting) -> Played:
        live, figure = Live(len(engine.layers)), self._figure_for(engine)
        told = lambda done, of: self._say(f"prompt: {done} of {of} tokens")  # noqa: E731
        self._run = run = begin(engine, prompt, setting, live, told)
        if self._stopped:  # before there was a run to tell
            run.stop()
        # Words cost little: no picture holds them up.
        begun, words, pace = perf_counter(), Pace(), Pace()
        for _ in run:
            if words.due:
                with words:
                    self._tell(run, begun)
            if pace.due and len(run.tokens) > 1:  # of the prompt there are no reads and times
                with pace:
                    self._draw(figure, live)
        self._tell(run, begun)
        self._draw(figure, live)
        return played(engine, run, prompt, setting)

    def _tell(self, run: Run, begun: float) -> None:
        decode, tail, made = run.stats.decode, run.text[-_SHOWN_TEXT:], len(run.tokens)
        end = '<div style="margin-bottom:auto">'  # a short text stands at the top
        self.text.value = f'<div aria-live="off" style="{_BOX}">{end}{escape(tail)}</div></div>'
        self._say(
            f"{made} {'token' if made == 1 else 'tokens'}, "
            f"{decode.tokens_per_second:,.1f} a second, "
            f"{format_nbytes(decode.read_nbytes_per_token)} a token, "
            f"{decode.hit_rate:.0%} found in the bank, {perf_counter() - begun:.1f} s"
        )

    def _figure_for(self, engine: Engine) -> LiveFigure:
        """Made once, for making one takes as long as a hundred tokens."""
        sizes = len(engine.layers), engine.config.num_experts, engine.reader.threads
        if self._figure is None or self._figure[0] != sizes:
            self._figure = sizes, in_one_thread(lambda: LiveFigure(*sizes))
            gc.collect()  # now: so many new objects would have it done in the midst of a run
        self._figure[1].clear()
        return self._figure[1]

    def _draw(self, figure: LiveFigure, live: Live) -> None:
        figure.add(live.taken(), live.last)
        self.image.value = in_one_thread(figure.png)
        self.figures.value = note(figure.words, status=False)

    def _export(self) -> None:
        try:
            self._say("writing figures and trace")
            files = in_one_thread(self.export)
            self._say(f"{len(files)} files are in {self.out.value}")
        except Exception as error:  # a thread's error would be lost
            self._say(f"{type(error).__name__}: {error}", failed=True)

    def _ended(self, done: Played) -> str:
        say = done.conditions
        return (
            f"{say['generated']}, {say['read']}; K={say['K']}, {say['experts']}, "
            f"{say['at the start']}; ended by {say['ended by']}. The result is below."
        )

    def _say(self, words: str, failed: bool = False) -> None:
        self.status.value = note(words, failed)

    def _enable(self, running: bool) -> None:
        self.run_button.disabled, self.stop_button.disabled = running, not running
        self.export_button.disabled = running or self.last is None
