"""Chats as messages and as text: what chat_template.jinja renders, in parts with and without loss.

The text of a chat is a list of segments `(text, trained)`; joined, they are what the template gives
(a test compares the two). No token of one segment can merge with the next: a segment ends at a
special token, or with a newline before a letter.
"""

import json
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]
Segment = tuple[str, bool]

_TOOLS_HEAD = (
    "<|im_start|>system\n# Tools\n\nThese functions can be called:\n\n<tools>{tools}\n</tools>"
    "\n\nWrite a call like this, one block for each call and no text after it:\n\n"
    "<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>"
    "\n\nIf no function fits, answer in words."
)


@dataclass(slots=True, kw_only=True)
class Chat:
    """One training sample, and perhaps an evaluation prompt.

    Attributes:
        kind: what is practised; for a sample with a check, the kind the evaluation counts it under.
        messages: the turns; the last is the assistant's.
        tools: function schemas without the `{"type": "function"}` around them.
        check: what a correct answer holds, as `scorer.judge` reads it; None where many are right.
        prompt_length: how many messages the evaluation prompt has; None for all but the last.
        thinking: whether the assistant's reasoning is rendered.
    """

    kind: str
    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    check: dict[str, Any] | None = None
    prompt_length: int | None = None
    thinking: bool = False

    def prompt(self) -> list[Message]:
        """The messages before the answer that the check judges."""
        if self.prompt_length is None:
            return self.messages[:-1]
        return self.messages[: self.prompt_length]

    def has_reasoning(self) -> bool:
        """Whether every answer after the last question comes with reasoning."""
        answers = self.messages[_last_question(self.messages) + 1 :]
        return all("reasoning_content" in m for m in answers if m["role"] == "assistant")

    def with_system(self, text: str) -> "Chat":
        """The same chat with a system message put first."""
        self.messages = [{"role": "system", "content": text}, *self.messages]
        if self.prompt_length is not None:
            self.prompt_length += 1
        return self


def user(text: str) -> Message:
    """A question."""
    return {"role": "user", "content": text}


def assistant(text: str, thought: str | None = None) -> Message:
    """An answer, with the reasoning that thinking mode shows."""
    message: Message = {"role": "assistant", "content": text}
    if thought is not None:
        message["reasoning_content"] = thought
    return message


def calls(*functions: tuple[str, dict[str, Any]], text: str = "", thought: str) -> Message:
    """An assistant's tool calls."""
    listed = [{"function": {"name": name, "arguments": given}} for name, given in functions]
    return assistant(text, thought) | {"tool_calls": listed}


def tool_result(result: object) -> Message:
    """What a tool gave back."""
    return {"role": "tool", "content": result if isinstance(result, str) else to_json(result)}


def to_json(value: object) -> str:
    """JSON on one line, as the template's `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)


def value_text(value: object) -> str:
    """A tool argument as it stands in a call: text as it is, dicts and lists as JSON, and other
    values as Python writes them (`True`), which is what the family's template does."""
    return to_json(value) if isinstance(value, dict | list) else str(value)


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """One `<tool_call>` block."""
    parts = [f"<tool_call>\n<function={name}>\n"]
    parts += [f"<parameter={k}>\n{value_text(v)}\n</parameter>\n" for k, v in arguments.items()]
    return "".join([*parts, "</function>\n</tool_call>"])


def schema(tool: Tool) -> dict[str, Any]:
    """A tool as the chat template wants it."""
    return {"type": "function", "function": tool}


def render(chat: Chat) -> list[Segment]:
    """The segments of a whole chat; trained are the assistant's words and each answer's end."""
    segments = _system(chat.messages, chat.tools)
    question = _last_question(chat.messages)
    for place, message in enumerate(chat.messages):
        role = message["role"]
        if role == "user":
            segments.append((f"<|im_start|>user\n{message['content']}<|im_end|>\n", False))
        elif role == "tool":
            segments.append((_tool_turn(chat.messages, place), False))
        elif role == "assistant":
            thought = message.get("reasoning_content", "") if chat.thinking else ""
            segments += _answer(message, thought, place > question)
    return segments


def render_prompt(messages: list[Message], tools: list[Tool], thinking: bool = False) -> str:
    """A prompt that ends where the assistant's turn begins."""
    text = "".join(part for part, _ in render(Chat(kind="", messages=messages, tools=tools)))
    return text + "<|im_start|>assistant\n<think>\n" + ("" if thinking else "\n</think>\n\n")


def _last_question(messages: list[Message]) -> int:
    return max(place for place, message in enumerate(messages) if message["role"] == "user")


def _system(messages: list[Message], tools: list[Tool]) -> list[Segment]:
    text = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if tools:
        listed = "".join(f"\n{to_json(schema(tool))}" for tool in tools)
        head = _TOOLS_HEAD.replace("{tools}", listed) + (f"\n\n{text}" if text else "")
        return [(f"{head}<|im_end|>\n", False)]
    return [(f"<|im_start|>system\n{text}<|im_end|>\n", False)] if text else []


def _answer(message: Message, thought: str, after_question: bool) -> list[Segment]:
    body = message["content"]
    for number, call in enumerate(message.get("tool_calls", [])):
        body += "\n" if number else "\n\n" if body else ""
        body += call_text(call["function"]["name"], call["function"]["arguments"])
    head = "<|im_start|>assistant\n"
    if not after_question:
        segments = [(head, False)]
    elif thought:
        segments = [(f"{head}<think>\n", False), (f"{thought}\n</think>\n\n", True)]
    else:
        segments = [(f"{head}<think>\n\n</think>\n\n", False)]
    return [*segments, (f"{body}<|im_end|>", True), ("\n", False)]


def _tool_turn(messages: list[Message], place: int) -> str:
    first = messages[place - 1]["role"] != "tool"
    last = place + 1 == len(messages) or messages[place + 1]["role"] != "tool"
    head, tail = "<|im_start|>user" if first else "", "<|im_end|>\n" if last else ""
    return f"{head}\n<tool_response>\n{messages[place]['content']}\n</tool_response>{tail}"
