"""Compare: two of several runs side by side, chosen by hand.

    runs = fl.widgets.run_settings(engine, prompt, {"own K": {}, "K=4": {"num_experts_per_tok": 4}})
    fl.widgets.Compare(runs)

It runs no model; `side_by_side` does the same without widgets.
"""

from collections.abc import Mapping

import ipywidgets as w

from flashmoe_lab.widgets.compared import SettingRun, SideBySide, side_by_side
from flashmoe_lab.widgets.controls import HALF, NAMED, note
from flashmoe_lab.widgets.shown import Shown, display_with
from flashmoe_lab.widgets.worker import Worker


class Compare:
    """Two choices among runs, and what they differ in.

    Attributes:
        compared: what is shown, or None.

    Raises:
        ValueError: fewer than two runs.
    """

    def __init__(self, runs: Mapping[str, SettingRun]) -> None:
        if len(runs) < 2:
            raise ValueError(f"{len(runs)} runs; this compares two")
        self.runs, self.compared = dict(runs), None
        self._shown = Shown()
        self._worker = Worker("flashmoe-compare", self._failed)
        names = list(runs)
        self.left = w.Dropdown(options=names, value=names[0], description="Left")
        self.right = w.Dropdown(options=names, value=names[1], description="Right")
        for choice in (self.left, self.right):
            choice.style, choice.layout = NAMED, HALF
            choice.observe(lambda _: self._worker.do(self._show), names="value")
        self.status = w.HTML()
        row = w.Layout(flex_flow="row wrap", max_width="900px")
        self.widget = w.VBox([w.Box([self.left, self.right], layout=row), self.status])
        self._worker.do(self._show)

    def _ipython_display_(self) -> None:
        display_with(self.widget, self._shown)

    def wait(self) -> SideBySide | None:
        """Wait for what is under way; what is shown then. For cells."""
        self._worker.wait()
        return self.compared

    def _show(self) -> None:
        a, b = (self.runs[str(choice.value)] for choice in (self.left, self.right))
        self.compared = side_by_side(a, b)
        self._shown.show(self.compared)
        self.status.value = note(f"{a.name} and {b.name}: {self.compared.rows['divergence (KL)']}")

    def _failed(self, error: BaseException) -> None:
        self.status.value = note(f"{type(error).__name__}: {error}", failed=True)
