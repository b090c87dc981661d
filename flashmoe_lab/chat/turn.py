"""Turn: one question and all that followed from it, with what it cost."""

from dataclasses import dataclass, field
from typing import Any

from flashmoe_lab.cards import card
from flashmoe_lab.chat.parser import Event, Text, Thinking, ToolCall
from flashmoe_lab.chat.tools import ToolResult
from flashmoe_lab.generation import PhaseStats
from flashmoe_lab.run import Run
from flashmoe_lab.units import format_nbytes

ChatEvent = Event | ToolResult


@dataclass(kw_only=True, slots=True)
class Turn:
    """What a question brought about.

    Attributes:
        messages: what the conversation grew by: the question, answers, results of tools.
        events: of all answers, in order.
        runs: one for each answer: the first, and one after each round of tools. Each has its
            tokens, figures and, if asked for, its trace. Empty after loading.
        finish_reason: of the last answer: "stop" (an end token), "stop_sequence", "length" or
            "cancelled"; "rounds" if a call was left because there had been too many rounds.
    """

    messages: list[dict[str, Any]]
    events: list[ChatEvent] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    finish_reason: str | None = None

    @classmethod
    def of(cls, messages: list[dict[str, Any]], finish_reason: str | None) -> "Turn":
        """A turn of which only the messages are known."""
        events = [event for message in messages[1:] for event in _events(message)]
        return cls(messages=messages, events=events, finish_reason=finish_reason)

    @property
    def question(self) -> str:
        """What was asked."""
        return self.messages[0]["content"]

    @property
    def text(self) -> str:
        """What was answered in words."""
        return "".join(event.text for event in self.events if isinstance(event, Text))

    @property
    def thinking(self) -> str:
        """What was thought."""
        return "".join(event.text for event in self.events if isinstance(event, Thinking))

    @property
    def tokens(self) -> int:
        """Tokens that were generated."""
        return sum(len(run.tokens) for run in self.runs)

    @property
    def cached_tokens(self) -> int:
        """Tokens of prompts that were known."""
        return sum(run.cached_tokens for run in self.runs)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts, those that were known with them."""
        return sum(run.prompt_tokens for run in self.runs)

    @property
    def read_nbytes(self) -> int:
        """Bytes of experts that were read."""
        return sum(phase.read_nbytes for phase in self._phases())

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were in the bank."""
        hits = sum(phase.hits for phase in self._phases())
        total = hits + sum(phase.misses for phase in self._phases())
        return hits / total if total else 0.0

    @property
    def dur_ns(self) -> int:
        """Time that the engine worked for it."""
        return sum(phase.dur_ns for phase in self._phases())

    def _phases(self) -> list[PhaseStats]:
        return [phase for run in self.runs for phase in (run.stats.prefill, run.stats.decode)]

    def figures(self) -> str:
        """What it cost, in a line."""
        if not self.runs:
            return "from a file; what it took is not kept"
        return (
            f"prompt {self.prompt_tokens} tokens, {self.cached_tokens} of them known; "
            f"answer {self.tokens} tokens; {self.dur_ns / 1e9:.2f} s; "
            f"read {format_nbytes(self.read_nbytes)}; bank hits {self.hit_rate:.1%}"
        )

    def __repr__(self) -> str:
        return f"Turn({self.question!r:.60} -> {self.text!r:.60}; {self.figures()})"

    def _repr_html_(self) -> str:
        shown: dict[str, object] = {"question": self.question}
        for number, event in enumerate(self.events):
            shown[f"{number} {_kind(event)}"] = _words(event)
        shown |= {"ended by": self.finish_reason, "cost": self.figures()}
        return card("Turn", shown)


def _events(message: dict[str, Any]) -> list[ChatEvent]:
    if message["role"] == "tool":
        return [ToolResult(name=message["name"], content=message["content"])]
    made: list[ChatEvent] = []
    if thought := message.get("reasoning_content"):
        made.append(Thinking(text=thought))
    if message["content"]:
        made.append(Text(text=message["content"]))
    for call in message.get("tool_calls", ()):
        made.append(ToolCall(**call["function"]))
    return made


def _kind(event: ChatEvent) -> str:
    kinds = {Text: "text", Thinking: "thinking", ToolCall: "call", ToolResult: "result"}
    return kinds[type(event)]


def _words(event: ChatEvent) -> str:
    if isinstance(event, ToolCall):
        return str(event)
    return event.content if isinstance(event, ToolResult) else event.text
