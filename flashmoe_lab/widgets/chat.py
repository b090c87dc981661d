"""Chat: a conversation with a model, each turn's record one click away.

The answer streams in the widget; the conversation is a plain output under it, and so are a turn's
figures. `converse` does the same without widgets.
"""

import threading
from typing import Any

import ipywidgets as w

from flashmoe_lab.chat.session import Session
from flashmoe_lab.chat.turn import ChatEvent
from flashmoe_lab.engine import Engine
from flashmoe_lab.widgets.controls import HALF, NAMED, WIDE, button, note
from flashmoe_lab.widgets.conversation import Conversation, TurnFigures, events_html
from flashmoe_lab.widgets.pace import Pace
from flashmoe_lab.widgets.shown import Shown, display_with
from flashmoe_lab.widgets.worker import Worker


class Chat:
    """Question, answer, and what each turn cost.

    Attributes:
        session: the conversation; options that it is made with are those of `Session`.
        error: what ended the last turn, or None.
    """

    def __init__(self, engine: Engine, session: Session | None = None, **options: Any) -> None:
        self.session = session or Session(engine, **{"trace": "flow", **options})
        self.error: BaseException | None = None
        self._conversation, self._figures = Shown(), Shown()
        # Two: figures that are wanted must not take an answer's turn.
        self._worker = Worker("flashmoe-chat", self._failed)
        self._drawer = Worker("flashmoe-chat-figures", self._failed)
        self._busy = threading.Event()
        self._build(engine)
        if self.session.turns:
            self._worker.do(self._show)

    def _build(self, engine: Engine) -> None:
        own = self.session.num_experts_per_tok or engine.num_experts_per_tok
        self.question = w.Textarea(
            description="You", rows=2, style=NAMED, layout=WIDE, placeholder="Ask something"
        )
        self.k = w.IntSlider(own, 1, engine.config.num_experts, description="K")
        self.k.style, self.k.layout, self.k.continuous_update = NAMED, HALF, False
        self.send_button = button("Send", "Ask this", "success", "paper-plane")
        self.stop_button = button("Stop", "End the answer at its next token", "danger", "stop")
        self.stop_button.disabled = True
        self.turn = w.Dropdown(
            options=[("none", -1)], description="Record of", style=NAMED, layout=HALF
        )
        self.status, self.answer = w.HTML(), w.HTML()
        row = w.Layout(flex_flow="row wrap", align_items="center", margin="4px 0 0 110px")
        settings = w.Layout(flex_flow="row wrap", max_width="900px")
        self.widget = w.VBox(
            [
                self.question,
                w.Box([self.send_button, self.stop_button], layout=row),
                w.Box([self.k, self.turn], layout=settings),
                self.status,
                self.answer,
            ]
        )
        self.send_button.on_click(lambda _: self.send())
        self.stop_button.on_click(lambda _: self.session.stop())
        self.turn.observe(lambda _: self._drawer.do(self._show_figures), names="value")

    def _ipython_display_(self) -> None:
        display_with(self.widget, self._conversation)
        self._figures.display()

    # From callbacks and cells

    def send(self, text: str | None = None) -> None:
        """Ask what stands in the box, or this; does nothing while an answer is under way."""
        asked = (self.question.value if text is None else text).strip()
        if not asked or self._busy.is_set():
            return
        self._busy.set()
        self.error = None
        self.send_button.disabled, self.stop_button.disabled = True, False
        self.session.num_experts_per_tok = self.k.value
        self._worker.do(lambda: self._answer(asked))

    def wait(self) -> Session:
        """Wait for the answer under way; the session. For cells: a callback must not wait."""
        self._worker.wait()
        self._drawer.wait()
        if self.error is not None:
            raise self.error
        return self.session

    # In the worker's thread

    def _answer(self, asked: str) -> None:
        pace, said = Pace(), list[ChatEvent]()
        self._say("reading the conversation")
        try:
            for event in self.session.send(asked):
                said.append(event)
                if pace.due:
                    with pace:
                        self.answer.value = events_html(said)
                        self._say("answering")
            self.question.value = ""
        finally:
            self.answer.value = ""
            self._busy.clear()
            self.send_button.disabled, self.stop_button.disabled = False, True
        self._show()

    def _show(self) -> None:
        turns = self.session.turns
        self._conversation.show(Conversation(session=self.session))
        named = [(f"{n + 1}: {turn.question[:40]}", n) for n, turn in enumerate(turns)]
        chosen = self.turn.value
        self.turn.options = [("none", -1), *named]
        self.turn.value = chosen if isinstance(chosen, int) and chosen < len(turns) else -1
        self._say(turns[-1].figures() if turns else "")

    def _show_figures(self) -> None:
        chosen = self.turn.value
        if isinstance(chosen, int) and 0 <= chosen < len(self.session.turns):
            self._figures.show(TurnFigures(turn=self.session.turns[chosen]))
        else:
            self._figures.clear()

    def _say(self, words: str) -> None:
        self.status.value = note(words)

    def _failed(self, error: BaseException) -> None:
        self.error = error
        self.status.value = note(f"{type(error).__name__}: {error}", failed=True)
