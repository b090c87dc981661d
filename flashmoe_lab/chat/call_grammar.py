"""The grammar of a tool call in the family's format (see parser.py), from the tools' schemas.

Values are written as the parser reads them: text as it is, truth values as Python has them,
everything else as JSON of the parameter's schema. Parameters stand in the schema's order, those
that are not required may be left out, and others do not occur.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flashmoe_lab.chat.arguments import listed, parameters_of, properties_of, types_of
from flashmoe_lab.chat.call_reader import CLOSE, NAME, OPEN

_END = "\n</parameter>\n"
# A line of a value that began with one of the format's tags would make the call malformed.
_RAW = r"/(?s:.*)/ & ~/(?s:(.*\n)?<\/?(tool_call|function|parameter)(.*))/"
_DEFINITIONS = ("$defs", "definitions")


def call_grammar(
    tools: Sequence[Mapping[str, Any]], tag: Callable[[str], str], several: bool
) -> str:
    """A Lark grammar, in llguidance's dialect, of one call or several.

    Args:
        tag: how the grammar names <tool_call> and </tool_call>.

    Raises:
        ValueError: a name that the format cannot write, or a schema that is none.
    """
    functions = list(parameters_of(tools).items())
    choice = " | ".join(f"f{number}" for number in range(len(functions)))
    rules = [
        'start: call ("\\n" call)*' if several else "start: call",
        f'call: {tag(OPEN)} "\\n<function=" ({choice}) "</function>\\n" {tag(CLOSE)}',
        f"raw[suffix={quoted(_END)}]: RAW",
        f"RAW: {_RAW}",
    ]
    for number, (name, schema) in enumerate(functions):
        rules += _function(f"f{number}", name, schema)
    return "\n".join(rules)


def quoted(text: str) -> str:
    """A text in a grammar."""
    return json.dumps(text, ensure_ascii=False)


def _function(rule: str, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    properties = properties_of(schema)
    required = set(map(str, listed(schema, "required")))
    if unknown := sorted(required - set(properties)):
        raise ValueError(f"tool {name}: {', '.join(unknown)} is required but not described")
    parts = [quoted(f"{_word(name)}>\n")]
    for number, (key, inner) in enumerate(properties.items()):
        part = f"{rule}p{number}"
        parts.append(part if key in required else f"{part}?")
        yield f"{part}: {quoted(f'<parameter={_word(key)}>' + chr(10))} {_value(inner, schema)}"
    yield f"{rule}: {' '.join(parts)}"


def _value(schema: Any, root: Mapping[str, Any]) -> str:
    kinds = types_of(schema, root)
    if kinds == {"string"} and isinstance(schema, Mapping) and (given := listed(schema, "enum")):
        if not (texts := [text for text in given if isinstance(text, str)]):
            raise ValueError(f"none of {given!r:.60} is a string, which a schema wants")
        return f"({' | '.join(quoted(text + _END) for text in texts)})"
    if not kinds or "string" in kinds:
        return "raw"
    if kinds == {"boolean"}:
        return f'("True" | "False") {quoted(_END)}'
    shared = {key: root[key] for key in _DEFINITIONS if key in root}
    return f"%json {json.dumps({**shared, **schema})} {quoted(_END)}"


def _word(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError(f"{text!r:.80} cannot be a name in a tool call; no spaces, < or >")
    return text
