"""Python functions as tools: their schemas for the prompt, and running what the model calls.

A schema is made from a function's type hints and docstring. A function runs only if the caller put
it into the toolbox, and only with arguments that are of its types. Whatever goes wrong is a result
that the model can read. This module neither prompts nor parses.
"""

import copy
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

import pydantic
import pydantic_core
from pydantic.json_schema import GenerateJsonSchema

from flashmoe_lab.chat.parser import ToolCall

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):\s*$")
_ENTRY = re.compile(r"^(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolResult:
    """What a call gave: text for the model. `failed` says that it is about an error."""

    name: str
    content: str
    failed: bool = False

    def message(self) -> dict[str, str]:
        """The message that tells the model."""
        return {"role": "tool", "name": self.name, "content": self.content}


class Tool:
    """A function that a model may call.

    Args:
        function: with a type hint for every parameter. The first part of its docstring describes
            it, the entries under Args its parameters.
        name: as the model knows it; the function's own if not given.

    Raises:
        ValueError: no schema can be made from it.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"{self.name!r} cannot be a tool's name; letters, digits, _ and - can, up to 64"
            )
        if inspect.iscoroutinefunction(function):
            raise ValueError(f"tool {self.name}: it is a coroutine; tools are plain functions")
        self.description, self._about = _read_docstring(inspect.getdoc(function) or "")
        self._names: dict[str, str] = {}
        self._model = self._make_model()

    @property
    def schema(self) -> dict[str, Any]:
        """{"type": "function", "function": {...}}, as templates and APIs take it."""
        made = copy.deepcopy(self._model.model_json_schema(schema_generator=_Schema))
        for key in ("title", "description", "additionalProperties"):
            made.pop(key, None)
        parameters = {"type": "object", "properties": {}, **_without_titles(made)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def run(self, arguments: dict[str, Any]) -> ToolResult:
        """Calls the function, if the arguments are of its types."""
        try:
            # As JSON, so that what JSON has no type for (dates, tuples) may come as text and lists.
            given = self._model.model_validate_json(json.dumps(arguments), strict=True)
        except pydantic.ValidationError as error:
            return self._failure(f"wrong arguments for {self.name}: {_faults(error)}")
        except (TypeError, ValueError, RecursionError) as error:
            return self._failure(f"wrong arguments for {self.name}: {error}")
        # Those that were not given are left to the function's own defaults.
        values = {self._names[f]: getattr(given, f) for f in given.model_fields_set}
        try:
            content = _as_text(self.function(**values))
        except Exception as error:  # whatever it is, the model is to hear of it
            return self._failure(f"{type(error).__name__}: {error}")
        return ToolResult(name=self.name, content=content)

    def _failure(self, reason: str) -> ToolResult:
        return ToolResult(name=self.name, content=f"Error: {reason}", failed=True)

    def _make_model(self) -> type[pydantic.BaseModel]:
        try:
            hints = get_type_hints(self.function, include_extras=True)
            parameters = inspect.signature(self.function).parameters.values()
        except (NameError, TypeError, ValueError) as error:
            raise ValueError(f"tool {self.name}: its signature cannot be read ({error})") from None
        fields: dict[str, Any] = {}
        for number, parameter in enumerate(parameters):
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(
                    f"tool {self.name}: {parameter} cannot be given by name; tools take parameters "
                    "that can"
                )
            if parameter.name not in hints:
                raise ValueError(f"tool {self.name}: parameter {parameter.name} has no type hint")
            required = parameter.default is parameter.empty
            # Fields have names of their own: pydantic keeps some, such as schema and json.
            field = f"argument_{number}"
            self._names[field] = parameter.name
            about = self._about.get(parameter.name)
            described: dict[str, Any] = {"description": about} if about else {}
            default = ... if required else parameter.default
            fields[field] = (
                hints[parameter.name],
                pydantic.Field(default, alias=parameter.name, **described),
            )
        config = pydantic.ConfigDict(extra="forbid")
        try:
            model = pydantic.create_model(self.name, __config__=config, **fields)
            model.model_json_schema(schema_generator=_Schema)
        except (pydantic.errors.PydanticUserError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"tool {self.name}: no schema can be made ({reason})") from None
        return model


class Toolbox:
    """The functions that a chat may call; nothing else is ever run.

    Args:
        functions: plain functions, or Tools.
    """

    def __init__(self, *functions: "Callable[..., Any] | Tool") -> None:
        self._tools: dict[str, Tool] = {}
        for function in functions:
            tool = function if isinstance(function, Tool) else Tool(function)
            if tool.name in self._tools:
                raise ValueError(f"two tools have the name {tool.name}")
            self._tools[tool.name] = tool

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """For the prompt and for the parser."""
        return [tool.schema for tool in self._tools.values()]

    def run(self, call: ToolCall) -> ToolResult:
        """The result of a call; that there is no such tool is one too."""
        if call.name not in self._tools:
            known = ", ".join(self._tools) or "none"
            content = f"Error: there is no tool {call.name}; known are: {known}"
            return ToolResult(name=call.name, content=content, failed=True)
        return self._tools[call.name].run(call.arguments)


class _Schema(GenerateJsonSchema):
    # A default that JSON cannot hold is left out, and there is nothing to warn of.
    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the first section, and the entries under Args."""
    about: list[str] = []
    entries: dict[str, str] = {}
    section, indent, entry = "", 0, ""
    for line in text.splitlines():
        if found := _SECTION.match(line):
            section, indent, entry = found[1], 0, ""
        elif not section:
            about.append(line)
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            depth = len(line) - len(line.lstrip())
            indent = indent or depth
            found = _ENTRY.match(line.strip())
            if found and depth <= indent:
                entry = found[1]
                entries[entry] = found[2]
            elif entry:
                entries[entry] = f"{entries[entry]} {line.strip()}".strip()
    return "\n".join(about).strip(), entries


def _without_titles(schema: Any) -> Any:
    """A schema without the titles that pydantic makes from names; properties keep theirs."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _without_titles(inner) for name, inner in value.items()}
        if key in ("properties", "$defs")
        else value
        if key in ("default", "const", "enum", "examples")
        else _without_titles(value)
        for key, value in schema.items()
        if key != "title"
    }


def _faults(error: pydantic.ValidationError) -> str:
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in faults)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else pydantic_core.to_json(value).decode()
