"""A checkpoint's chat template: messages and tools in, the text of a prompt out.

Templates are downloaded text, so they render in Jinja's immutable sandbox, which lets them reach
nothing but the variables they are given. This module renders; it keeps no chat and parses no
answer.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flashmoe_lab.config import read_json

Message = Mapping[str, Any]


class ChatTemplate:
    """The template of a checkpoint's chat format.

    Args:
        text: Jinja, as in chat_template.jinja.
        name: where it comes from, for errors.
    """

    def __init__(self, text: str, name: str = "chat template") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        self.name = name
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise ValueError(f"{name}: not a template ({error})") from None

    @classmethod
    def read(cls, path: str | Path) -> "ChatTemplate":
        """The template of a checkpoint's directory: chat_template.jinja, or the entry of
        tokenizer_config.json.

        Raises:
            FileNotFoundError: it has none.
        """
        file, settings = Path(path) / "chat_template.jinja", Path(path) / "tokenizer_config.json"
        if file.exists():
            return cls(file.read_text("utf-8"), str(file))
        text = read_json(settings).get("chat_template") if settings.exists() else None
        if not isinstance(text, str):
            raise FileNotFoundError(f"{file}: no such file; this checkpoint has no chat format")
        return cls(text, str(settings))

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
                calls may be JSON text, which is parsed first.
            tools: function schemas, {"type": "function", "function": {...}}.
            add_generation_prompt: end where the assistant's turn begins.
            variables: more that the template knows, such as enable_thinking.

        Raises:
            ValueError: what the template or the sandbox objects to.
        """
        try:
            return self._template.render(
                messages=[_with_parsed_arguments(message) for message in messages],
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"{self.name}: {error}") from None


def _with_parsed_arguments(message: Message) -> dict[str, Any]:
    parsed = dict(message)
    if message.get("tool_calls"):
        parsed["tool_calls"] = [_parsed_call(call) for call in message["tool_calls"]]
    return parsed


def _parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise ValueError(
                f"arguments of the call of {function.get('name')} are not JSON: {arguments!r}"
            ) from None
    return {**call, "function": function}


def _to_json(value: object, indent: int | None = None) -> str:
    """As transformers renders it: letters as they are, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
