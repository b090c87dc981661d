"""Stepper: one token on its way through the model, stage by stage, each with its card.

The token goes through once, in the engine's thread, and what every stage gave is kept; sliders only
choose what is shown. `step_token` does the same without widgets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import ipywidgets as w
import numpy as np

from flashmoe_lab.config import check_num_experts_per_tok
from flashmoe_lab.engine import Engine
from flashmoe_lab.generation import prefill
from flashmoe_lab.state import SequenceState
from flashmoe_lab.stepping import Step, walk
from flashmoe_lab.widgets.controls import HALF, NAMED, WIDE, button, note
from flashmoe_lab.widgets.shown import Shown, display_with
from flashmoe_lab.widgets.worker import Worker

_INNER = ("input_norm", "mixer", "post_norm", "router", "shared_expert", "fetch", "experts")
_OUTER = ("embed", "norm", "lm_head")


@dataclass(frozen=True, kw_only=True)
class SteppedToken:
    """What every stage gave for one token.

    Attributes:
        ids: the sequence, this token last.
        text: the token's own.
        steps: path -> result with its time, in the order in which they ran.
        cards: path -> the stage's card.
        next_id: the token that the model finds most probable after it.
    """

    ids: Sequence[int]
    text: str
    steps: Mapping[str, Step]
    cards: "Cards"
    next_id: int

    @property
    def title(self) -> str:
        """Which token, and how long it took."""
        ms = sum(step.dur_ns for step in self.steps.values()) / 1e6
        longest = max(self.steps.values(), key=lambda step: step.dur_ns)
        return (
            f"token {len(self.ids) - 1} {self.text!r}: {len(self.steps)} stages in {ms:.2f} ms, "
            f"the longest {longest.path} with {longest.dur_ns / 1e6:.2f} ms"
        )

    def _repr_html_(self) -> str:
        return _titled(self) + "".join(self.cards[path] for path in ("embed", "lm_head"))


class Cards:
    """Stages' cards, drawn in the engine's thread when they are first looked at."""

    def __init__(self, engine: Engine, steps: Mapping[str, Step]) -> None:
        self._engine, self._steps = engine, steps
        self._drawn: dict[str, str] = {}

    def __getitem__(self, path: str) -> str:
        if path not in self._drawn:
            self._drawn[path] = self._engine.call(self._steps[path]._repr_html_)
        return self._drawn[path]


@dataclass(frozen=True, kw_only=True)
class _Card:
    """One stage's card under its token's title."""

    token: SteppedToken
    path: str

    def __repr__(self) -> str:
        return f"<{self.path} of {self.token.title}>"

    def _repr_html_(self) -> str:
        return _titled(self.token) + self.token.cards[self.path]


class Walk:
    """A sequence that goes through the model one token after another.

    Raises:
        ValueError: the prompt is empty, or K out of range.
    """

    def __init__(
        self, engine: Engine, prompt: str | Sequence[int], num_experts_per_tok: int | None = None
    ) -> None:
        self._engine, self._ids = engine, list(engine.encode(prompt))
        if not self._ids:
            raise ValueError("the prompt is empty; it needs at least one token")
        k = engine.num_experts_per_tok if num_experts_per_tok is None else num_experts_per_tok
        self._k = check_num_experts_per_tok(k, engine.config.num_experts)
        self._state: SequenceState | None = None  # made in the engine's thread
        self._read = 0

    def step(self) -> SteppedToken:
        """The next token of the prompt's end, or of the model's choice, through every stage."""
        return self._engine.call(self._step)

    def _step(self) -> SteppedToken:
        model, last = self._engine.model, len(self._ids) - 1
        self._state = state = self._state or model.empty_state()
        if self._read < last:
            prefill(model, self._ids[self._read : last], state, self._k)
        found = walk(model.step(self._ids[last:], state, self._k), state, self._engine.tokenizer)
        steps = {step.path: step for step in found}
        ids, self._read = list(self._ids), last + 1
        tokenizer = self._engine.tokenizer
        real = tokenizer.size if tokenizer else None  # ids beyond are padding
        next_id = int(np.array(steps["lm_head"].result)[-1][:real].argmax())
        self._ids.append(next_id)
        return SteppedToken(
            ids=ids,
            text=tokenizer.decode(ids[last:]) if tokenizer else str(ids[last]),
            steps=steps,
            cards=Cards(self._engine, steps),
            next_id=next_id,
        )


def step_token(
    engine: Engine, prompt: str | Sequence[int], num_experts_per_tok: int | None = None
) -> SteppedToken:
    """The prompt's last token through every stage: `step_token(engine, "Once").steps["embed"]`."""
    return Walk(engine, prompt, num_experts_per_tok).step()


class Stepper:
    """A token's stages to go through with a slider.

    Attributes:
        token: what is looked at, or None.
    """

    def __init__(self, engine: Engine, prompt: str = "Once upon a time") -> None:
        self.engine, self.token = engine, None
        self._walk: Walk | None = None
        self._shown = Shown()
        self._worker = Worker("flashmoe-stepper", self._failed)
        self._build(prompt)
        self.read()

    def _build(self, prompt: str) -> None:
        layers, k = len(self.engine.layers), self.engine.num_experts_per_tok
        self.prompt = w.Text(prompt, description="Text", style=NAMED, layout=WIDE)
        self.prompt.continuous_update = False
        self.k = w.IntSlider(k, 1, self.engine.config.num_experts, description="K")
        self.layer = w.IntSlider(0, 0, layers - 1, description="Layer")
        for slider in (self.k, self.layer):
            slider.style, slider.layout, slider.continuous_update = NAMED, HALF, False
        self.stage = w.ToggleButtons(
            options=[_OUTER[0], *_INNER, *_OUTER[1:]],
            value="router",
            description="Stage",
            style=NAMED,
        )
        self.stage.style.button_width = "auto"
        self.back_button = button("Back", "The stage before", "", "arrow-left")
        self.on_button = button("On", "The stage after", "primary", "arrow-right")
        self.next_button = button(
            "Next token", "The most probable token goes through", "", "forward"
        )
        self.status = w.HTML()
        row = w.Layout(flex_flow="row wrap", align_items="center")
        actions = [self.back_button, self.on_button, self.next_button]
        self.widget = w.VBox(
            [
                self.prompt,
                w.Box([self.k, self.layer], layout=row),
                self.stage,
                w.Box(actions, layout=row),
                self.status,
            ]
        )
        self.prompt.observe(lambda _: self.read(), names="value")
        self.k.observe(lambda _: self.read(), names="value")
        for control in (self.layer, self.stage):
            control.observe(lambda _: self._worker.do(self._show), names="value")
        self.back_button.on_click(lambda _: self.move(-1))
        self.on_button.on_click(lambda _: self.move(1))
        self.next_button.on_click(lambda _: self._worker.do(self._step, "step"))

    def _ipython_display_(self) -> None:
        display_with(self.widget, self._shown)

    @property
    def path(self) -> str:
        """The stage that is chosen, like "layers.3.router"."""
        stage = str(self.stage.value)
        return stage if stage in _OUTER else f"layers.{self.layer.value}.{stage}"

    def read(self) -> None:
        """Read the text anew, and show its last token."""
        self._worker.do(self._read, "read")

    def move(self, by: int) -> None:
        """Go to the stage before (-1) or after (1)."""
        paths = self.engine.model.paths()
        place = min(max(paths.index(self.path) + by, 0), len(paths) - 1)
        *layer, stage = paths[place].split(".")
        if layer:
            self.layer.value = int(layer[1])
        self.stage.value = stage

    def wait(self) -> Any:
        """Wait for what is under way; what is shown then. For cells."""
        self._worker.wait()
        return self._shown.content

    # In the worker's thread

    def _read(self) -> None:
        self._walk = Walk(self.engine, self.prompt.value, self.k.value)
        self._step()

    def _step(self) -> None:
        if self._walk is not None:
            self.token = self._walk.step()
            self._show()

    def _show(self) -> None:
        if self.token is not None:
            self.layer.disabled = self.stage.value in _OUTER
            self._shown.show(_Card(token=self.token, path=self.path))
            self.status.value = note(f"{self.path} of {self.token.title}")

    def _failed(self, error: BaseException) -> None:
        self.status.value = note(f"{type(error).__name__}: {error}", failed=True)


def _titled(token: SteppedToken) -> str:
    return f"<p><b>{escape(token.title)}</b></p>"
