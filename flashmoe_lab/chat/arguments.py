"""The values of a tool call: the text that a model wrote for a parameter, as the type its JSON
schema names.

The family's format writes text as it is and everything else as Python or JSON does, so only the
schema can tell the text 5 from the number. A value that is not of its type is an error, never a
guess.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

DEEPEST = 64
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)(\.0+)?")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_HALF = re.compile("[\\ud800-\\udfff]")
_NULLS = ("None", "null")
_BOOLEANS = {"True": True, "true": True, "False": False, "false": False}
_KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array",
          dict: "object", type(None): "null"}  # fmt: skip


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The schema of each function's parameters, by the function's name."""
    functions = [tool.get("function", tool) for tool in tools]
    return {function["name"]: function.get("parameters") or {} for function in functions}


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schemas of an object's entries; ValueError if there is something else."""
    found = schema.get("properties") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"a schema's properties are {found!r:.60}; they should be an object")
    return found


def listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    """The list under a key of a schema, perhaps none; ValueError if there is something else."""
    found = schema.get(key) or []
    if not isinstance(found, list):
        raise ValueError(f"a schema's {key} is {found!r:.60}; it should be a list")
    return found


def types_of(schema: Any, root: Any = None) -> set[str]:
    """The JSON types that a schema allows; empty if it does not say.

    Args:
        root: the one that "$ref" is looked up in.

    Raises:
        ValueError: its enum is no list.
    """
    return _kinds(schema, root, DEEPEST)


def typed(text: str, schema: Any, root: Any = None) -> Any:
    """What a parameter's text stands for.

    Text stays as it is where the schema says string or says nothing. Where it allows text and
    something else, it is the something else if it is written exactly as that.

    Args:
        schema: the parameter's.
        root: the one that "$ref" is looked up in.

    Raises:
        ValueError: it is of no type that the schema names.
    """
    kinds = types_of(schema, root)
    if not kinds or kinds == {"string"}:
        return text
    bare = text.strip()
    if "null" in kinds and bare in _NULLS:
        return None
    if "boolean" in kinds and bare in _BOOLEANS:
        return _BOOLEANS[bare]
    if "integer" in kinds and (found := _INTEGER.fullmatch(bare)):
        return int(bare.removesuffix(found[2] or ""))
    if "number" in kinds and _NUMBER.fullmatch(bare):
        return _number(bare)
    if bare[:1] in ("[", "{") and kinds & {"array", "object"}:
        try:
            value = read_json_text(bare)
        except ValueError:
            if "string" not in kinds:
                raise
        else:
            if _KINDS[type(value)] in kinds:
                return value
    if "string" in kinds:
        return text
    if bare in _NULLS:  # as a model says that it gives none
        return None
    raise ValueError(f"{_short(text)} is not of type {' or '.join(sorted(kinds))}")


def read_json_text(text: str) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is none, names a key twice, has NaN or Infinity or half of a surrogate pair,
            or is nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{_short(text)} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{_short(text)} is not JSON ({error})") from None
    if deeper(value, DEEPEST):
        raise ValueError(f"{_short(text)} is nested too deeply; {DEEPEST} levels are allowed")
    if "\\u" in text and _HALF.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"{_short(text)} has half of a surrogate pair")
    return value


def deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value has more lists and objects within each other than so many."""
    layer = [value]
    for _ in range(levels + 1):
        inner = [list(v.values()) if isinstance(v, dict) else v for v in layer]
        layer = [item for v in inner if isinstance(v, list) for item in v]
        if not layer:
            return False
    return True


def _kinds(schema: Any, root: Any, depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or not depth:
        return set()
    if isinstance(reference := schema.get("$ref"), str):
        return _kinds(_looked_up(reference, root), root, depth - 1)
    named = schema.get("type")
    if isinstance(named, str | list):
        kinds = set([named] if isinstance(named, str) else map(str, named))
        return kinds | ({"null"} if schema.get("nullable") is True else set())
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(choices := schema.get(key), list):
            found = [_kinds(choice, root, depth - 1) for choice in choices]
            return set().union(*found) if all(found) else set()
    values = listed(schema, "enum") or ([schema["const"]] if "const" in schema else [])
    return {_KINDS.get(type(value), "string") for value in values}


def _looked_up(reference: str, root: Any) -> Any:
    found = root
    for part in reference.removeprefix("#/").split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _number(text: str) -> int | float:
    if re.fullmatch(r"-?[0-9]+", text):
        return int(text)
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{_short(text)} is too large for a number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands twice")
    return made


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
