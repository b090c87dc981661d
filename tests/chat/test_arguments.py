"""Values of parameters: which type their text gets, and what is refused."""

import pytest

from flashmoe_lab.chat.arguments import DEEPEST, parameters_of, read_json_text, typed
from flashmoe_lab.study.scorer import same_json

ROOT = {
    "$defs": {"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}, "a/b": {"type": "null"}}
}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("null", {"type": "string"}, "null"),
        (" x\n", {"type": "string"}, " x\n"),
        ("5", {}, "5"),
        ("5", None, "5"),
        ("5", {"description": "no type"}, "5"),
        ("5", {"type": "integer"}, 5),
        (" -7 ", {"type": "integer"}, -7),
        ("3.0", {"type": "integer"}, 3),
        ("12345678901234567890", {"type": "integer"}, 12345678901234567890),
        ("5", {"type": "number"}, 5),
        ("5.0", {"type": "number"}, 5.0),
        ("-2.5e-3", {"type": "number"}, -0.0025),
        ("1e+20", {"type": "number"}, 1e20),
        ("True", {"type": "boolean"}, True),
        ("false", {"type": "boolean"}, False),
        ("None", {"type": "null"}, None),
        ("null", {"type": "integer"}, None),
        ("None", {"type": ["string", "null"]}, None),
        ("null", {"type": "string", "nullable": True}, None),
        ("5", {"type": ["integer", "string"]}, 5),
        ("5a", {"type": ["integer", "string"]}, "5a"),
        ("[1", {"type": ["array", "string"]}, "[1"),
        ("True", {"anyOf": [{"type": "boolean"}, {"type": "string"}]}, True),
        ("7", {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}, 7),
        ("null", {"$ref": "#/$defs/a~1b"}, None),
        ("5", {"$ref": "#/$defs/loop"}, "5"),
        ("5", {"$ref": "#/$defs/none"}, "5"),
        ("5", {"anyOf": [{"type": "integer"}, {}]}, "5"),
        ("2", {"enum": [1, 2]}, 2),
        ("b", {"enum": ["a", "b"]}, "b"),
        ("1", {"const": 1}, 1),
        ('[1, "é", null]', {"type": "array"}, [1, "é", None]),
        ('\n{"a": {"b": true}}\n', {"type": "object"}, {"a": {"b": True}}),
    ],
)
def test_values_are_of_the_type_that_the_schema_names(text, schema, value):
    assert same_json(typed(text, schema, ROOT), value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("five", "integer"), ("5.5", "integer"), ("1_000", "integer"), ("0x1", "integer"),
        ("", "integer"), ("١", "integer"), ("inf", "number"), ("NaN", "number"),
        ("1e999", "number"), ("9" * 5000, "integer"), ("yes", "boolean"), ("1", "boolean"),
        ("TRUE", "boolean"),
        ("['a']", "array"), ("{}", "array"), ("[]", "object"), ("x", "object"), ("x", "null"),
        ('["\\ud83d"]', "array"), ('{"\\udc00": 1}', "object"),
        ('{"a": 1, "a": 2}', "object"), ('{"a": NaN}', "object"), ("[" * 9999, "array"),
        ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "array"), ("5", "made up"),
    ],
)  # fmt: skip
def test_what_is_not_of_its_type_is_refused(text, kind):
    with pytest.raises(ValueError) as caught:
        typed(text, {"type": kind})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("schema", [{"type": [{}]}, {"type": [["integer"]]}, {"enum": 5}])
def test_what_is_no_schema_is_refused(schema):
    with pytest.raises(ValueError, match="is not of type|enum is 5; it should be a list"):
        typed("5", schema)


def test_json_may_be_as_deep_as_is_said():
    assert read_json_text("[" * DEEPEST + "]" * DEEPEST)
    assert read_json_text('["\\ud83d\\ude00"]') == ["😀"]
    assert read_json_text('{"a": [1.5, "x", true]}') == {"a": [1.5, "x", True]}


def test_schemas_come_with_and_without_their_wrapping():
    inner = {"name": "f", "parameters": {"type": "object"}}
    assert parameters_of([inner]) == parameters_of([{"type": "function", "function": inner}])
    assert parameters_of([{"name": "g"}]) == {"g": {}}
