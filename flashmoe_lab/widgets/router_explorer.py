"""RouterExplorer: text, layer, token and K to play with, over what RoutedText computed."""

import ipywidgets as w

from flashmoe_lab.engine import Engine
from flashmoe_lab.widgets.controls import HALF, NAMED, WIDE, note
from flashmoe_lab.widgets.routed_text import Choice, RoutedText
from flashmoe_lab.widgets.shown import Shown, display_with
from flashmoe_lab.widgets.worker import Worker


class RouterExplorer:
    """Text, layer, token and K to play with.

    Attributes:
        choice: what is shown, or None.
    """

    def __init__(self, engine: Engine, text: str = "Once upon a time, there was a fox") -> None:
        self.engine, self.choice = engine, None
        self._routed: RoutedText | None = None
        self._shown = Shown()
        self._worker = Worker("flashmoe-router", self._failed)
        self._build(text)
        self._worker.do(self._read, "read")

    def _build(self, text: str) -> None:
        k = self.engine.num_experts_per_tok
        self.text = w.Text(text, description="Text", style=NAMED, layout=WIDE)
        self.text.continuous_update = False
        self.layer = w.IntSlider(0, 0, len(self.engine.layers) - 1, description="Layer")
        self.token = w.SelectionSlider(options=[("", 0)], description="Token")
        self.k = w.IntSlider(k, 1, self.engine.config.num_experts, description="K")
        for slider in (self.layer, self.token, self.k):
            slider.style, slider.layout, slider.continuous_update = NAMED, HALF, False
            slider.observe(lambda _: self._worker.do(self._show), names="value")
        self.text.observe(lambda _: self._worker.do(self._read, "read"), names="value")
        self.status = w.HTML()
        row = w.Layout(flex_flow="row wrap", max_width="900px")
        sliders = w.Box([self.layer, self.k, self.token], layout=row)
        self.widget = w.VBox([self.text, sliders, self.status])

    def _ipython_display_(self) -> None:
        display_with(self.widget, self._shown)

    def wait(self) -> Choice | None:
        """Wait for what is under way; what is shown then. For cells."""
        self._worker.wait()
        return self.choice

    # In the worker's thread

    def _read(self) -> None:
        self._say("reading the text")
        routed = RoutedText(self.engine, self.text.value)
        self._routed = None  # the slider's new places must not be looked up in the old text
        options = [(f"{n} {text!r}", n) for n, text in enumerate(routed.texts)]
        self.token.options = options
        self.token.value = len(options) - 1
        self._routed = routed
        self._show()

    def _show(self) -> None:
        if self._routed is not None:
            self.choice = self._routed.choice(self.layer.value, self.token.value, self.k.value)
            self._shown.show(self.choice)
            self._say(f"K={self.k.value} keeps {self.choice.mass:.1%} of the probability")

    def _say(self, words: str) -> None:
        self.status.value = note(words)

    def _failed(self, error: BaseException) -> None:
        self.status.value = note(f"{type(error).__name__}: {error}", failed=True)
