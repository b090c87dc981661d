"""The parts of the training set, how long their rows are, and how much each counts.

A part is a set of rows of one length. Its share is of all tokens, and moves in a straight line
from the training's start to its end: prose first, exact skills last. `weight` multiplies the
loss of its tokens, because a row of sums has fewer trained tokens than a page of a novel.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from .arithmetic import sum_chat
from .chat_format import Chat, Segment, render
from .draw import Draw
from .json_tasks import json_chat
from .lists import list_chat
from .memory import memory_chat, unknown_fact_chat
from .stories import story_chat, story_text
from .talk import SYSTEM, fact_chat, long_chat, talk_chat
from .tool_chats import asked_back, chained_calls, one_call, parallel_calls, without_call

SHORT, LONG = 256, 1024
"""Tokens of a row. Short tasks stand in short rows, so that many begin where a prompt would."""

THINKING = 0.3


@dataclass(frozen=True, slots=True)
class Document:
    """What one row may hold several of: text in segments, and the chat that it came from."""

    segments: list[Segment]
    chat: Chat | None = field(default=None)

    @property
    def text(self) -> str:
        """All segments joined."""
        return "".join(text for text, _ in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of the training set.

    Attributes:
        row: tokens of a row, `SHORT` or `LONG`.
        start: share of all tokens at the first step.
        end: share of all tokens at the last step.
        weight: factor on the loss of its tokens.
        make: what makes a document; None for a part that corpus.py prepares.
    """

    row: int
    start: float
    end: float
    weight: float = 1.0
    make: Callable[[Draw], Document] | None = None

    def share(self, progress: float) -> float:
        """Share of the tokens when this part of the training is over, 0 to 1."""
        return self.start + (self.end - self.start) * progress


def filler(draw: Draw) -> Chat:
    """A short exchange between two others."""
    return draw.pick(fact_chat, talk_chat, sum_chat, list_chat)(draw)


def memory_any(draw: Draw) -> Chat:
    """A memory chat; now and then one in which nothing was told."""
    return unknown_fact_chat(draw) if draw.chance(0.1) else memory_chat(draw, filler)


def tool_any(draw: Draw) -> Chat:
    """Any chat with tools in its prompt."""
    share = draw.rng.random()
    if share < 0.62:
        return one_call(draw)
    if share < 0.72:
        return parallel_calls(draw)
    if share < 0.88:
        return chained_calls(draw)
    if share < 0.91:
        return asked_back(draw)
    inner = draw.pick(talk_chat, fact_chat, memory_any, list_chat, story_chat, sum_chat)(draw)
    if inner.messages[0]["role"] == "system":
        inner.messages = inner.messages[1:]
    return without_call(draw, inner)


def mixed_turns(draw: Draw) -> Chat:
    """Several tasks in one chat, one after another."""
    tasks = draw.rng.choices(
        [sum_chat, list_chat, json_chat, talk_chat, fact_chat], k=draw.number(2, 4)
    )
    messages = [m for task in tasks for m in task(draw).messages if m["role"] != "system"]
    return Chat(kind="mixed", messages=messages)


def finish(draw: Draw, chat: Chat) -> Document:
    """A chat as text; system message and thinking are settled here."""
    if chat.messages[0]["role"] != "system" and draw.chance(0.08):
        chat.with_system(draw.pick(*SYSTEM))
    chat.thinking = chat.has_reasoning() and draw.chance(THINKING)
    return Document(render(chat), chat)


def _tale(draw: Draw) -> Document:
    return Document([(story_text(draw), True)])


def _chats(make: Callable[[Draw], Chat]) -> Callable[[Draw], Document]:
    return lambda draw: finish(draw, make(draw))


PARTS: dict[str, Part] = {
    "children": Part(row=LONG, start=0.10, end=0.02, weight=0.5),
    "novels": Part(row=LONG, start=0.10, end=0.01, weight=0.5),
    "reading": Part(row=LONG, start=0.03, end=0.01),
    "tales": Part(row=LONG, start=0.04, end=0.03, weight=0.5, make=_tale),
    "stories": Part(row=LONG, start=0.05, end=0.09, weight=0.7, make=_chats(story_chat)),
    "tools": Part(row=LONG, start=0.16, end=0.27, weight=1.5, make=_chats(tool_any)),
    "mixed": Part(row=LONG, start=0.01, end=0.05, weight=1.5, make=_chats(mixed_turns)),
    "long": Part(row=LONG, start=0.01, end=0.02, make=_chats(long_chat)),
    "sums_in_prose": Part(row=SHORT, start=0.015, end=0.005, weight=0.5),
    "dictionary": Part(row=SHORT, start=0.015, end=0.005, weight=0.5),
    "arithmetic": Part(row=SHORT, start=0.14, end=0.15, weight=2.0, make=_chats(sum_chat)),
    "lists": Part(row=SHORT, start=0.12, end=0.13, weight=2.0, make=_chats(list_chat)),
    "json": Part(row=SHORT, start=0.11, end=0.12, weight=1.5, make=_chats(json_chat)),
    "memory": Part(row=SHORT, start=0.05, end=0.05, weight=1.5, make=_chats(memory_any)),
    "talk": Part(row=SHORT, start=0.05, end=0.04, make=_chats(talk_chat)),
}
"""Half of the tokens stand in short rows and half in long ones, at every time of the training."""


def mean_share(part: Part) -> float:
    """Share of all tokens of the training."""
    return (part.start + part.end) / 2
