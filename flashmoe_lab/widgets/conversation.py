"""A conversation and what its turns cost, as a notebook shows them: `converse(engine, [...])`.

It shows a session; chat/session.py is the one that talks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from flashmoe_lab.chat.parser import Text, Thinking, ToolCall
from flashmoe_lab.chat.session import Session
from flashmoe_lab.chat.turn import ChatEvent, Turn
from flashmoe_lab.engine import Engine
from flashmoe_lab.plots import Plot, expert_heatmap, io_timeline, layer_latency, token_strip
from flashmoe_lab.trace import Trace

_FIGURES = (token_strip, expert_heatmap, io_timeline, layer_latency)
_WRAP = "white-space:pre-wrap;max-width:75ch;margin:2px 0"
_SIDE = "border-left:3px solid var(--jp-brand-color1,#0072b2);padding-left:10px;margin:10px 0"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A session, to be shown as it is now."""

    session: Session

    def __repr__(self) -> str:
        return f"<Conversation: {len(self.session.turns)} turns>"

    def _repr_html_(self) -> str:
        return "".join(map(turn_html, self.session.turns))


@dataclass(frozen=True, kw_only=True)
class TurnFigures:
    """What one turn's record shows: a figure a theme, of each of its answers."""

    turn: Turn

    @property
    def traces(self) -> list[Trace]:
        """Of the turn's answers, as far as they were recorded."""
        return [run.trace for run in self.turn.runs if run.trace is not None]

    @property
    def plots(self) -> list[Plot]:
        """Words by latency, experts, reads and layers."""
        found = list[Plot]()
        for trace in self.traces:
            for draw in _FIGURES:
                try:
                    found.append(draw(trace))
                except ValueError:  # stopped before there was anything to draw
                    continue
        return found

    def __repr__(self) -> str:
        return f"<TurnFigures: {self.turn.question!r}>"

    def _repr_html_(self) -> str:
        if not self.traces:
            return "<p>This turn was not recorded; make the session with trace='flow'.</p>"
        words = "".join(f"<p>{escape(trace.summary())}</p>" for trace in self.traces)
        pictures = "".join(map(Plot.html, self.plots))
        return f"<p><b>{escape(self.turn.question)}</b></p>{words}{pictures}"


def converse(engine: Engine, questions: Sequence[str], **options: Any) -> Conversation:
    """Ask one question after another and show all; options are those of `Session`."""
    session = Session(engine, **{"trace": "flow", **options})
    for question in questions:
        for _ in session.send(question):
            pass
    return Conversation(session=session)


def turn_html(turn: Turn) -> str:
    """Question, answer and cost."""
    cost = f"{turn.figures()}; ended by {turn.finish_reason}" if turn.runs else ""
    return (
        f'<div style="{_SIDE}"><p style="{_WRAP}"><b>{escape(turn.question)}</b></p>'
        f"{events_html(turn.events)}"
        f'<p style="opacity:.75;font-size:90%;margin:2px 0">{escape(cost)}</p></div>'
    )


def events_html(events: Sequence[ChatEvent]) -> str:
    """What was answered: neighbours of one kind together."""
    parts = list[tuple[str, str]]()
    for event in events:
        kind, words = _told(event)
        if parts and parts[-1][0] == kind and kind in ("text", "thinking"):
            words = parts.pop()[1] + words
        parts.append((kind, words))
    return "".join(_part(kind, words) for kind, words in parts)


def _told(event: ChatEvent) -> tuple[str, str]:
    if isinstance(event, Text):
        return "text", event.text
    if isinstance(event, Thinking):
        return "thinking", event.text
    if isinstance(event, ToolCall):
        return "calls", str(event)
    return "was told", event.content


def _part(kind: str, words: str) -> str:
    if kind == "text":
        return f'<p style="{_WRAP}">{escape(words)}</p>'
    return f'<p style="{_WRAP};opacity:.85"><i>{kind}</i> {escape(words)}</p>'
