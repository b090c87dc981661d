"""One tool call, read from its opening tag to its closing one while it is being written.

A machine that knows how far the text is certain and what must follow there, so that nothing is read
twice and the same text gives the same call however it arrives. parser.py says what the forms are
and what becomes of the text around a call.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from flashmoe_lab.chat.arguments import DEEPEST, properties_of, read_json_text, typed

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NAME = re.compile(r"[^\s<>]{1,256}")
_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_TAGS = (OPEN, CLOSE, _FUNCTION, _END_FUNCTION, _PARAMETER, _END_PARAMETER)
_NO_SPACE = re.compile(r"[^ \t\r\n]")
_BRACKETS = re.compile(r'["\\{}\[\]]')
_JSON_KEYS = {"name", "arguments"}


class Malformed(Exception):
    """It is no call, and why; `place` is how far it was read."""


class MoreNeeded(Exception):
    """What follows will decide."""


class CallReader:
    """Reads one call of a text that grows.

    Args:
        parameters: the schema of each function's parameters.

    Attributes:
        place: up to where the text is read; in the end, where the call ends.
    """

    def __init__(self, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        self.place = 0
        self._parameters = parameters
        self._step: Callable[[str], None] | None = self._opening
        self._name = self._key = ""
        self._start = self._end = 0  # of the value, or the JSON, that is being read
        self._values: dict[str, str] = {}
        self._json: Any = None
        self._depth, self._quoted = 0, False

    def read(self, text: str) -> tuple[str, dict[str, Any]]:
        """The call's name and arguments.

        Args:
            text: white space, the opening tag and what there is of the rest; each time the same
                text, or more of it.

        Raises:
            MoreNeeded, Malformed: see there.
        """
        while self._step is not None:
            self._step(text)
        try:
            return self._from_json() if self._json is not None else self._from_values()
        except ValueError as error:
            self.place -= len(CLOSE)
            raise Malformed(str(error)) from None

    def _opening(self, text: str) -> None:
        self.place = text.index(OPEN) + len(OPEN)
        self._step = self._body

    def _body(self, text: str) -> None:
        if self._next(text) == "{":
            self._start, self._step = self.place, self._object
        else:
            self._take(text, _FUNCTION)
            self._step = self._function

    def _function(self, text: str) -> None:
        self._name = self._word(text)
        self._step = self._between

    def _between(self, text: str) -> None:
        more = self._take(text, _PARAMETER, _END_FUNCTION) == _PARAMETER
        self._step = self._parameter if more else self._closing

    def _parameter(self, text: str) -> None:
        self._key = self._word(text)
        if self._key in self._values:
            raise Malformed(f"parameter {self._key} stands twice")
        self._start, self._step = self.place, self._value

    def _value(self, text: str) -> None:
        found = text.find("<", self.place)
        self.place = len(text) if found < 0 else found
        tag = self._tag(text, _TAGS)
        if tag == _END_PARAMETER:
            self._end, self._step = found, self._after_value
        elif tag and text[found - 1] == "\n":
            raise Malformed(f"{tag} begins a line within parameter {self._key}")
        self.place += len(tag or "<")

    def _after_value(self, text: str) -> None:
        """Whether the tag that was read ends the value, or is part of it."""
        self._next(text)
        if self._tag(text, (_PARAMETER, _END_FUNCTION)):
            value = text[self._start : self._end]
            self._values[self._key] = value.removeprefix("\n").removesuffix("\n")
            self._step = self._between
        elif text[self._end - 1] == "\n":
            raise Malformed(f"{_END_PARAMETER} of {self._key} is followed by something else")
        else:
            self.place, self._step = self._end + 1, self._value

    def _object(self, text: str) -> None:
        found = _BRACKETS.search(text, self.place)
        self.place = found.start() if found else len(text)
        if not found or found[0] == "\\" and found.end() == len(text):
            raise MoreNeeded
        self.place += 2 if found[0] == "\\" else 1
        if found[0] == '"':
            self._quoted = not self._quoted
        elif found[0] != "\\" and not self._quoted:
            self._depth += 1 if found[0] in "{[" else -1
            if self._depth > DEEPEST + 2:
                raise Malformed(f"its JSON is nested too deeply; {DEEPEST} levels are allowed")
            if not self._depth:
                try:
                    self._json = read_json_text(text[self._start : self.place])
                except ValueError as error:
                    raise Malformed(str(error)) from None
                self._step = self._closing

    def _closing(self, text: str) -> None:
        self._take(text, CLOSE)
        self._step = None

    def _next(self, text: str) -> str:
        """The next character that is no white space."""
        found = _NO_SPACE.search(text, self.place)
        self.place = found.start() if found else len(text)
        if not found:
            raise MoreNeeded
        return found[0]

    def _tag(self, text: str, tags: tuple[str, ...]) -> str | None:
        """Which of the tags stands here, if any."""
        here = text[self.place : self.place + max(map(len, tags))]
        for tag in tags:
            if here.startswith(tag):
                return tag
        if any(tag.startswith(here) for tag in tags):
            raise MoreNeeded
        return None

    def _take(self, text: str, *tags: str) -> str:
        self._next(text)
        tag = self._tag(text, tags)
        if tag is None:
            raise Malformed(
                f"it has {self._wrong(text, tags)!r} where {' or '.join(tags)} should be"
            )
        self.place += len(tag)
        return tag

    def _wrong(self, text: str, tags: tuple[str, ...]) -> str:
        """What stands here, up to the first character that fits no tag."""
        end = self.place + 1
        while any(tag.startswith(text[self.place : end]) for tag in tags):
            end += 1
        return text[self.place : end]

    def _word(self, text: str) -> str:
        found = NAME.match(text, self.place)
        end = found.end() if found else self.place
        if end == len(text):
            raise MoreNeeded
        if not found or text[end] != ">":
            raise Malformed(f"a name cannot be {text[self.place : end + 1]!r:.60}")
        self.place = end + 1
        return found[0]

    def _from_values(self) -> tuple[str, dict[str, Any]]:
        schema = self._parameters.get(self._name) or {}
        properties = properties_of(schema)
        other = schema.get("additionalProperties")
        arguments = {}
        for key, text in self._values.items():
            try:
                arguments[key] = typed(text, properties.get(key, other), schema)
            except ValueError as error:
                raise ValueError(f"parameter {key}: {error}") from None
        return self._name, arguments

    def _from_json(self) -> tuple[str, dict[str, Any]]:
        given = self._json
        if not isinstance(given, dict) or given.keys() != _JSON_KEYS:
            raise ValueError("its JSON should have the keys name and arguments, and no others")
        name, arguments = given["name"], given["arguments"]
        if isinstance(arguments, str):  # JSON text, as OpenAI's API has it
            arguments = read_json_text(arguments)
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            raise ValueError("its name should be text and its arguments an object")
        return name, arguments
