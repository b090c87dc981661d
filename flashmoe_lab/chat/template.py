"""A checkpoint's chat template: messages and tools in, the text of a prompt out.

Templates are downloaded programs. They run in Jinja's immutable sandbox, see plain data only, and
are stopped when they build more than a chat can need or take longer than a deadline; sandbox.py and
deadline.py say what is bounded and what is not. What a template raises, and what it is stopped for,
is a ValueError of one line. This module renders; it keeps no chat and parses no answer.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jinja2 import TemplateError

from flashmoe_lab.chat.deadline import within
from flashmoe_lab.chat.sandbox import Environment
from flashmoe_lab.config import read_json

Message = Mapping[str, Any]
T = TypeVar("T")

DEADLINE_S = 10.0
LONGEST_TEMPLATE = 1 << 20
_ERROR_LENGTH = 300
# What templates know a turn's reasoning by; the first is the name that most of them use.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                   "mask_token")  # fmt: skip


class ChatTemplate:
    """The template of a checkpoint's chat format.

    Args:
        text: Jinja, as in chat_template.jinja.
        name: where it comes from, for errors.
        special_tokens: the tokenizer's, by the names that templates use, such as bos_token.
        deadline_s: how long a render may take.
        now: the clock behind strftime_now.
    """

    def __init__(
        self,
        text: str,
        name: str = "chat template",
        *,
        special_tokens: Mapping[str, str] | None = None,
        deadline_s: float = DEADLINE_S,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        if len(text) > LONGEST_TEMPLATE:
            raise ValueError(
                f"{name}: not a template ({len(text)} characters; at most {LONGEST_TEMPLATE})"
            )
        environment = Environment()
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: _strftime(now(), format)
        self.name = name
        self._deadline_s = deadline_s
        self._special_tokens = dict(special_tokens or {})
        self._environment = environment
        self._template = self._bounded(lambda: environment.from_string(text), "not a template")

    @classmethod
    def read(cls, path: str | Path) -> "ChatTemplate":
        """The template of a checkpoint's directory: chat_template.jinja, or the entry of
        tokenizer_config.json, with that file's special tokens.

        Raises:
            FileNotFoundError: it has none.
        """
        file, settings_file = (
            Path(path) / "chat_template.jinja",
            Path(path) / "tokenizer_config.json",
        )
        settings = read_json(settings_file) if settings_file.exists() else {}
        tokens = _special_tokens(settings)
        if file.exists():
            return cls(file.read_text("utf-8"), str(file), special_tokens=tokens)
        text = settings.get("chat_template")
        if not isinstance(text, str):
            raise FileNotFoundError(f"{file}: no such file; this checkpoint has no chat format")
        return cls(text, str(settings_file), special_tokens=tokens)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a chat.

        Args:
            messages: {"role": ..., "content": ...}, as OpenAI's API has them; arguments of tool
                calls may be JSON text, which is parsed first. Entries that are None are left out.
            tools: function schemas, {"type": "function", "function": {...}}.
            add_generation_prompt: end where the assistant's turn begins.
            variables: more that the template knows, such as enable_thinking.

        Raises:
            ValueError: what the template or the sandbox objects to, or what is no plain data.
        """
        given = _plain(
            {
                **self._special_tokens,
                "documents": None,
                **variables,
                "messages": [_prepared(message) for message in messages],
                "tools": list(tools) or None,
                "add_generation_prompt": add_generation_prompt,
            }
        )

        def work() -> str:
            self._environment.budget(given)
            context = self._template.new_context(given)
            return self._environment.joined(self._template.root_render_func(context))

        return self._bounded(work)

    def _bounded(self, work: Callable[[], T], about: str = "") -> T:
        try:
            return within(self._deadline_s, work)
        except TimeoutError:
            reason = f"it takes longer than {self._deadline_s:g} s and was stopped"
        except RecursionError:
            reason = "it is nested, or calls itself, too deeply"
        except Exception as error:  # a foreign program may raise anything
            reason = " ".join(str(error).split())[:_ERROR_LENGTH] or type(error).__name__
        raise ValueError(f"{self.name}: {about} ({reason})" if about else f"{self.name}: {reason}")


def _prepared(message: Message) -> dict[str, Any]:
    """A message as templates expect it."""
    if not isinstance(message, Mapping):
        raise ValueError(f"a message should be a dictionary with a role; it is {message!r:.100}")
    made = {key: value for key, value in message.items() if value is not None}
    if made.get("tool_calls"):
        made["tool_calls"] = [_parsed_call(call) for call in made["tool_calls"]]
    thought = next((made[name] for name in _REASONING if name in made), None)
    return made if thought is None else {"thinking": thought, **made, _REASONING[0]: thought}


def _parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        about = f"arguments of the call of {function.get('name')}"
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise ValueError(f"{about} are not JSON: {arguments!r:.200}") from None
        if not isinstance(function["arguments"], dict):
            raise ValueError(f"{about} should be a JSON object; they are {arguments!r:.200}")
    return {**call, "function": function} if "function" in call else function


def _plain(value: Any) -> Any:
    """A copy made of plain data alone, so that a template meets no method of ours."""
    try:
        return _plain_copy(value)
    except RecursionError:
        raise ValueError("messages, tools or variables are nested too deeply") from None


def _plain_copy(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain_copy(key): _plain_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_copy(item) for item in value]
    raise ValueError(
        "messages, tools and variables should hold text, numbers, booleans, None, lists and "
        f"dictionaries; one is a {type(value).__name__}"
    )


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """A tokenizer's special tokens; each is text, or an object that has it as its content."""
    found = {name: settings.get(name) for name in _SPECIAL_TOKENS}
    texts = {n: t.get("content") if isinstance(t, Mapping) else t for n, t in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _strftime(now: datetime, format: str) -> str:
    if len(format) > _ERROR_LENGTH or re.search(r"%[^a-zA-Z%]*\d{3}", format):
        raise ValueError(f"strftime_now has the format {format!r:.60}; widths go up to 99")
    return now.strftime(format)


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))
