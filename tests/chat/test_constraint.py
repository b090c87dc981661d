"""Constrained text: what may come, what may not, and what is refused when it is made."""

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from flashmoe_lab.chat.constraint import Form, Grammars
from flashmoe_lab.chat.parser import ToolCall, parse
from flashmoe_lab.sampling import Constraint
from flashmoe_lab.tokenizer import Tokenizer

END = 257  # <|end|> of the tokenizer of bytes
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "maximum": 9},
                "units": {"enum": ["C", "F"]},
                "sure": {"type": "boolean"},
                "where": {"$ref": "#/$defs/place"},
            },
            "required": ["city"],
            "$defs": {"place": {"type": "array", "items": {"type": "number"}}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[[Path], None]):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture
def grammars(folder: Path) -> Grammars:
    return Grammars(folder, [END])


@pytest.fixture
def accepts(folder: Path) -> Callable[[Constraint, str], bool]:
    """Whether a constraint lets a whole text come, and an end after it."""
    tokenizer = Tokenizer(folder)

    def check(constraint: Constraint, text: str) -> bool:
        for token in [*tokenizer.encode(text), END]:
            if not constraint.allowed()[token]:
                return False
            constraint.take(token)
        return True

    return check


def wander(constraint: Constraint, rng: np.random.Generator, longest: int = 3000) -> list[int]:
    """Tokens drawn among those that are allowed; the end as soon as it is."""
    tokens: list[int] = []
    while len(tokens) < longest:
        allowed = np.flatnonzero(constraint.allowed())
        if END in allowed:
            return tokens
        tokens.append(int(rng.choice(allowed)))
        constraint.take(tokens[-1])
    raise AssertionError("no end")


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"name": "he", "n": -3}', True),
        ('{"name":"he"}', False),  # one form only
        ('{\n  "name": "he"}', False),
        ('{"name": "he", "n": 1.5}', False),
        ('{"name": "hehehe"}', False),
        ('{"n": 3}', False),
        ('{"name": "he", "more": 1}', False),
        ('{"name": "he"', False),
        ('{"name": "he"} ', False),
        ("{'name': 'he'}", False),
        (' {"name": "he"}', False),
    ],
)
def test_json_of_a_schema(grammars, accepts, text, valid):
    assert accepts(grammars.json(SCHEMA, 9999), text) == valid


def test_any_allowed_tokens_make_valid_json(grammars, folder, rng):
    tokenizer = Tokenizer(folder)
    for _ in range(20):
        value = json.loads(tokenizer.decode(wander(grammars.json(SCHEMA, 9999), rng)))
        assert value.keys() <= {"name", "n"} and len(value["name"]) <= 5


def test_special_tokens_never_come_within_text(grammars):
    constraint = grammars.json({"type": "string"}, 9999)
    constraint.take(ord('"') - 33)  # bytes are tokens in the order of their letters
    assert not constraint.allowed()[END]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"not": {}},
        {"enum": []},
        {"$ref": "http://127.0.0.1/x"},
        {"$ref": "file:///etc/hostname"},
        {"type": "string", "pattern": "("},
        {"type": "integer", "minimum": 10**40},
        {"allOf": [{"type": "string", "pattern": f"a{{{n}}}"} for n in range(40)]},
        {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(800)}},
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(grammars, schema):
    with pytest.raises(ValueError, match="the JSON schema (cannot be used|took too much work): "):
        grammars.json(schema, 9999)


def call(name: str, **values: str) -> str:
    lines = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (call("get_weather", city="Paris"), True),
        (call("get_weather", city="a\n<b>, </param\n\nc"), True),
        (call("get_weather", city=""), True),
        (
            call("get_weather", city="Oslo", days="3", units="F", sure="True", where="[1, 2.5]"),
            True,
        ),
        (call("now") + "\n" + call("get_weather", city="Paris"), True),
        (call("get_weather"), False),
        (call("get_weather", days="3"), False),
        (call("get_weather", city="Oslo", days="12"), False),
        (call("get_weather", city="Oslo", units="K"), False),
        (call("get_weather", city="Oslo", sure="maybe"), False),
        (call("get_weather", city="Oslo", where='["a"]'), False),
        (call("get_weather", city="Oslo\n<function=now>"), False),
        (call("other"), False),
        ("Hello", False),
        (call("now") + " and more", False),
    ],
)
def test_calls_of_tools(grammars, accepts, text, valid):
    """And what may come is a call for the parser too."""
    assert accepts(grammars.calls([WEATHER, NOW], 9999), text) == valid
    if valid:
        assert all(isinstance(event, ToolCall) for event in parse(text, [WEATHER, NOW]))


def test_one_call_only(grammars, accepts):
    assert accepts(grammars.calls([NOW], 9999, several=False), call("now"))
    assert not accepts(grammars.calls([NOW], 9999, several=False), call("now") + "\n" + call("now"))


def test_any_allowed_tokens_make_calls(grammars, folder, rng):
    """Without free text, which would go on for ever."""
    kept = {**WEATHER["function"]["parameters"], "required": ["days"]}
    kept["properties"] = {k: v for k, v in kept["properties"].items() if k != "city"}
    tools = [{"name": "typed", "parameters": kept}, NOW]
    tokenizer, found = Tokenizer(folder), set[str]()
    for _ in range(20):
        events = parse(tokenizer.decode(wander(grammars.calls(tools, 9999), rng)), tools)
        calls = [event for event in events if isinstance(event, ToolCall)]
        assert len(calls) == len(events)
        found |= {key for call in calls for key in call.arguments}
    assert found == {"days", "units", "sure", "where"}


def test_tools_that_the_format_cannot_write(grammars):
    strange = {"name": "f", "parameters": {"properties": {"a b": {}}}}
    with pytest.raises(ValueError, match="'a b' cannot be a name"):
        grammars.calls([strange], 9999)
    with pytest.raises(ValueError, match="tool f: x is required but not described"):
        grammars.calls([{"name": "f", "parameters": {"required": ["x"]}}], 9999)


@pytest.mark.parametrize(
    "wrong",
    [
        {"properties": ["x"]},
        {"required": 5},
        {"required": [{}]},
        {"properties": {"a": {"enum": 5}}},
        {"properties": {"a": {"type": [["x"]]}}},
        {"properties": {"a": {"type": "string", "enum": 5}}},
        {"properties": {"a": {"type": "string", "enum": [1]}}},
    ],
)
def test_tools_whose_schemas_are_none(grammars, wrong):
    with pytest.raises(ValueError):
        grammars.calls([{"name": "f", "parameters": wrong}], 9999)


LONG = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 3},
        "kind": {"enum": ["first", "second", "third"]},
        "size": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        "inner": {
            "type": "object",
            "properties": {"deep": {"type": "object", "properties": {"x": {"type": "boolean"}}}},
            "required": ["deep"],
        },
        "more": {"type": "object", "additionalProperties": {"type": "integer"}},
    },
    "required": ["title", "kind", "size", "tags", "inner"],
}


def bounded(constraint: Form, rng: np.random.Generator, max_tokens: int) -> list[int]:
    """Tokens as a sampler draws them that never wants to end, up to the limit."""
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        allowed = np.flatnonzero(constraint.allowed())
        token = int(rng.choice(allowed[allowed != END])) if len(allowed) > 1 else int(allowed[0])
        if not constraint.take(token):
            continue
        if token == END:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("max_tokens", [110, 117, 130, 200, 600])
def test_json_is_complete_within_its_tokens(grammars, folder, rng, max_tokens):
    """The model would write for ever; the shortest object of this schema has some 100 bytes."""
    tokenizer, hurried = Tokenizer(folder), False
    for _ in range(3):
        constraint = grammars.json(LONG, max_tokens)
        value = json.loads(tokenizer.decode(bounded(constraint, rng, max_tokens)))
        jsonschema.validate(value, LONG)
        hurried |= constraint.hurried
    assert hurried


@pytest.mark.parametrize("max_tokens", [100, 300])
def test_calls_are_complete_within_their_tokens(grammars, folder, rng, max_tokens):
    tokenizer = Tokenizer(folder)
    for _ in range(4):
        tokens = bounded(grammars.calls([WEATHER], max_tokens), rng, max_tokens)
        events = parse(tokenizer.decode(tokens), [WEATHER])
        assert events and all(isinstance(event, ToolCall) for event in events)


def test_without_room_for_any_json_nothing_is_forced(grammars, folder, rng):
    tokens = bounded(grammars.json(LONG, 30), rng, 30)
    assert Tokenizer(folder).decode(tokens).startswith('{"title": "')


def test_thinking_leaves_room(grammars, folder, rng):
    """Here "z" stands for </think>, which random tokens may give, but need not."""
    for _ in range(5):
        constraint = grammars.after("z", grammars.json(SCHEMA, 150))
        text = Tokenizer(folder).decode(bounded(constraint, rng, 150))
        json.loads(text[text.index("z") + 1 :])


def test_begins_after_a_token(grammars, accepts):
    """Here "z" stands for </think>."""
    assert accepts(grammars.after("z", grammars.json(SCHEMA, 9999)), 'I think.z{"name": "x"}')
    assert not accepts(grammars.after("z", grammars.json(SCHEMA, 9999)), "I think.zmm")
    with pytest.raises(ValueError, match="hello is not one token"):
        grammars.after("hello", grammars.json(SCHEMA, 9999))


def test_bytes_of_tokens(grammars):
    assert grammars.token_bytes(256) == b"he"
    assert grammars.token_bytes(END) == b"<|end|>"
    assert grammars.token_bytes(9999) == b""
