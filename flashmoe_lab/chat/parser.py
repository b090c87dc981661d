"""What a model writes, read while it is written: text, thinking and tool calls as they become
certain.

Two forms of calls are known: the family's,

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

and the older JSON one, {"name": ..., "arguments": {...}} between the same tags. The format escapes
nothing, so a value ends at the first </parameter> after which the next parameter or the function's
end follows, and one of the format's tags that begins a line within a value makes the call
malformed: nobody could say what was meant. A malformed or cut-off call comes out as the text it
was, up to its </tool_call> if there is one, with a warning; nothing within it counts as a call.

The events of a whole answer are the same however it is cut into pieces, adjacent texts taken
together (`merged`). This module runs no tool; tools.py does.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashmoe_lab.chat.arguments import parameters_of
from flashmoe_lab.chat.call_reader import CLOSE, OPEN, CallReader, Malformed, MoreNeeded

THINK, THOUGHT = "<think>", "</think>"
_SPACE = " \t\r\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Text of the answer. With a warning, it is what stands where a call should be."""

    text: str
    warning: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thinking:
    """Text of the reasoning."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A complete call; `text` is what the model wrote for it."""

    name: str
    arguments: dict[str, Any]
    text: str = field(compare=False, default="")

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({given})"


Event = Text | Thinking | ToolCall


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends within a think block, so that what is written next is thinking."""
    return prompt.rstrip().endswith(THINK)


def parse(
    answer: str, tools: Sequence[Mapping[str, Any]] = (), *, thinking: bool = False
) -> list[Event]:
    """The events of a whole answer."""
    parser = OutputParser(tools, thinking=thinking)
    return merged([*parser.feed(answer), *parser.finish()])


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events with adjacent texts, and adjacent thinking, as one. A text with a warning
    stays by itself."""
    made: list[Event] = []
    for event in events:
        last = made[-1] if made else None
        if isinstance(event, Text) and isinstance(last, Text) and not event.warning + last.warning:
            made[-1] = Text(text=last.text + event.text)
        elif isinstance(event, Thinking) and isinstance(last, Thinking):
            made[-1] = Thinking(text=last.text + event.text)
        else:
            made.append(event)
    return made


class OutputParser:
    """Reads one answer.

    Args:
        tools: the function schemas that the model was given; they name the types of arguments.
        thinking: whether the prompt ended within a think block. If it did not, a think block is one
            only at the very beginning. What looks like a call within it is thinking.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = (), *, thinking: bool = False) -> None:
        self._parameters = parameters_of(tools)
        self._rest = ""  # not yet certain
        self._read = self._start
        self._thinking = thinking
        self._skipping = True  # white space that belongs to the format
        self._call = CallReader(self._parameters)
        self._warning = ""

    def feed(self, piece: str) -> list[Event]:
        """What has become certain with the next piece of the answer."""
        self._rest += piece
        events: list[Event] = []
        while self._rest and (found := self._read()) is not None:
            events += found
        return merged(events)

    def finish(self) -> list[Event]:
        """What is left when the answer is over; the parser is used up then."""
        rest, self._rest = self._rest, ""
        if self._thinking:
            rest = rest.strip(_SPACE)
        if not rest:
            return []
        if self._read == self._in_call:
            return [Text(text=rest, warning="a tool call is cut off")]
        if self._read == self._in_malformed:
            return [Text(text=rest, warning=self._warning)]
        return [Thinking(text=rest) if self._thinking else Text(text=rest)]

    # Each of these takes from the rest what is certain, or returns None if more is needed.

    def _start(self) -> list[Event] | None:
        bare = self._rest.lstrip(_SPACE)
        if bare.startswith(THINK):
            self._thinking = True
            self._rest = bare[len(THINK) :]
        elif THINK.startswith(bare):
            return None
        self._read = self._in_thinking if self._thinking else self._in_text
        self._skipping = self._thinking
        return []

    def _in_thinking(self) -> list[Event] | None:
        if self._skip():
            return None
        end = self._rest.find(THOUGHT)
        if end < 0:
            return self._release(_certain(self._rest, THOUGHT))
        thought, self._rest = self._rest[:end].rstrip(_SPACE), self._rest[end + len(THOUGHT) :]
        self._thinking, self._skipping, self._read = False, True, self._in_text
        return [Thinking(text=thought)] if thought else []

    def _in_text(self) -> list[Event] | None:
        if self._skip():
            return None
        start = self._rest.find(OPEN)
        if start < 0:
            return self._release(_certain(self._rest, OPEN))
        # White space before a call stays with it: it is text only if the call turns out to be.
        start = len(self._rest[:start].rstrip(_SPACE))
        text, self._rest = self._rest[:start], self._rest[start:]
        self._call, self._read = CallReader(self._parameters), self._in_call
        return [Text(text=text)] if text else []

    def _in_call(self) -> list[Event] | None:
        try:
            name, arguments = self._call.read(self._rest)
        except MoreNeeded:
            return None
        except Malformed as error:
            self._read, self._warning = self._in_malformed, f"not a tool call: {error}"
            return []
        text, self._rest = self._rest[: self._call.place], self._rest[self._call.place :]
        self._skipping, self._read = True, self._in_text
        return [ToolCall(name=name, arguments=arguments, text=text.lstrip(_SPACE))]

    def _in_malformed(self) -> list[Event] | None:
        end = self._rest.find(CLOSE, self._call.place)
        if end < 0:
            self._call.place = max(self._call.place, len(self._rest) - len(CLOSE) + 1)
            return None
        end += len(CLOSE)
        text, self._rest, self._read = self._rest[:end], self._rest[end:], self._in_text
        return [Text(text=text, warning=self._warning)]

    def _skip(self) -> bool:
        """Drops white space that the format puts between its parts; whether nothing is left."""
        if self._skipping:
            self._rest = self._rest.lstrip(_SPACE)
            self._skipping = not self._rest
        return self._skipping

    def _release(self, count: int) -> list[Event] | None:
        text, self._rest = self._rest[:count], self._rest[count:]
        if not text:
            return None
        return [Thinking(text=text) if self._thinking else Text(text=text)]


def _certain(text: str, tag: str) -> int:
    """How much of a text without the tag cannot belong to it, or be white space before it."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-length:]):
            return len(text[:-length].rstrip(_SPACE))
    return len(text.rstrip(_SPACE))
