"""Python functions as tools: the schema made from one, and what running it can give."""

import datetime
import enum
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from flashmoe_lab.chat.parser import ToolCall, parse
from flashmoe_lab.chat.template import ChatTemplate
from flashmoe_lab.chat.tools import Tool, Toolbox

ROOT = Path(__file__).parents[2]


class Place(BaseModel):
    title: str
    height: int = 0


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> dict[str, Any]:
    """The weather of a city.

    From a table.

    Args:
        city: its name,
            in any language.
        days (int): how many of them.

    Returns:
        What it will be.
    """
    return {"city": city, "days": days, "unit": unit}


def odd(
    schema: str,
    place: Place,
    unit: Unit = Unit.C,
    when: datetime.date | None = None,
    pair: tuple[int, int] = (1, 2),
    n: Annotated[int, Field(ge=3, description="at least three")] = 4,
    hidden: Any = print,
) -> str:
    return repr((schema, place, unit, when, pair, n, hidden is print))


def fail(what: str) -> None:
    raise KeyError(what)


def run(function: Any, **arguments: Any):
    return Toolbox(function).run(ToolCall(name=function.__name__, arguments=arguments))


def test_the_schema_is_what_templates_and_apis_take():
    assert Toolbox(weather).schemas == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather of a city.\n\nFrom a table.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"description": "its name, in any language.", "type": "string"},
                        "days": {
                            "default": 1,
                            "description": "how many of them.",
                            "type": "integer",
                        },
                        "unit": {"default": "C", "enum": ["C", "F"], "type": "string"},
                    },
                    "required": ["city"],
                },
            },
        }
    ]


def test_schemas_keep_properties_that_are_called_title():
    parameters = Tool(odd).schema["function"]["parameters"]
    assert set(parameters["properties"]) == {
        "schema", "place", "unit", "when", "pair", "n", "hidden",
    }  # fmt: skip
    assert parameters["$defs"]["Place"]["properties"] == {
        "title": {"type": "string"}, "height": {"default": 0, "type": "integer"},
    }  # fmt: skip
    assert parameters["properties"]["n"]["description"] == "at least three"
    assert "default" not in parameters["properties"]["hidden"]
    assert json.loads(json.dumps(parameters)) == parameters


def test_a_function_without_parameters():
    def now() -> str:
        return "late"

    schema = Tool(now).schema["function"]
    assert schema == {"name": "now", "description": "",
                      "parameters": {"type": "object", "properties": {}}}  # fmt: skip
    assert run(now).content == "late"


def test_runs_with_arguments_of_its_types():
    result = run(weather, city="Zürich", days=2)
    assert (result.content, result.failed) == ('{"city":"Zürich","days":2,"unit":"C"}', False)
    assert result.message() == {"role": "tool", "name": "weather", "content": result.content}
    result = run(
        odd, schema="x", place={"title": "t"}, unit="fahrenheit", when="2026-03-05", pair=[3, 4]
    )
    assert result.content == repr(
        ("x", Place(title="t"), Unit.F, datetime.date(2026, 3, 5), (3, 4), 4, True)
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "city: Field required"),
        ({"city": 5}, "city: Input should be a valid string"),
        ({"city": "x", "days": "2"}, "days: Input should be a valid integer"),
        ({"city": "x", "days": True}, "days: Input should be a valid integer"),
        ({"city": "x", "unit": "K"}, "unit: Input should be 'C' or 'F'"),
        ({"city": "x", "more": 1}, "more: Extra inputs are not permitted"),
        ({"city": "\ud800"}, "wrong arguments"),
        ({"city": object()}, "wrong arguments"),
    ],
)
def test_wrong_arguments_are_a_result(arguments, reason):
    result = run(weather, **arguments)
    assert result.failed and reason in result.content
    assert result.content.startswith("Error: wrong arguments for weather: ")


def test_what_a_tool_raises_is_a_result():
    result = run(fail, what="key")
    assert result.failed and result.content == "Error: KeyError: 'key'"

    def unwritable() -> object:
        return object()

    assert run(unwritable).failed

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted)


def test_only_what_is_in_the_box_runs():
    box = Toolbox(weather, Tool(fail, name="other"))
    for name in ("fail", "print", "__import__", ""):
        result = box.run(ToolCall(name=name, arguments={}))
        assert result.failed and "known are: weather, other" in result.content
    assert "known are: none" in Toolbox().run(ToolCall(name="x", arguments={})).content
    with pytest.raises(ValueError, match="two tools have the name weather"):
        Toolbox(weather, weather)


def test_what_has_no_schema_is_refused():
    def untyped(x):
        return x

    def many(*xs: int) -> None: ...

    def positional(x: int, /) -> None: ...

    def foreign(x: "nowhere") -> None: ...  # noqa: F821  # pyright: ignore

    def engine(x: pytest.Item) -> None: ...

    async def later() -> None: ...

    for function, reason in [
        (untyped, "parameter x has no type hint"), (many, "cannot be given by name"),
        (positional, "cannot be given by name"), (foreign, "cannot be read"),
        (engine, "no schema can be made"), (later, "coroutine"), (lambda: 1, "cannot be a tool's"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            Tool(function)


def test_a_call_goes_from_the_prompt_to_the_result():
    box = Toolbox(weather)
    template = ChatTemplate.read(ROOT / "data" / "demo_model")
    asked = {"role": "user", "content": "Zürich, two days?"}
    given = {"function": {"name": "weather", "arguments": {"city": "True", "days": 2}}}
    chat = [asked, {"role": "assistant", "content": "", "tool_calls": [given]}]
    prompt = template.render([asked], box.schemas, enable_thinking=False)
    whole = template.render(chat, box.schemas, add_generation_prompt=False)
    assert '"name": "weather"' in prompt
    written = whole.removeprefix(prompt).removesuffix("<|im_end|>\n")
    (call,) = parse(written, box.schemas)
    assert isinstance(call, ToolCall)
    result = box.run(call)
    assert result.content == '{"city":"True","days":2,"unit":"C"}'
    again = template.render([*chat, result.message()], box.schemas)
    assert f"<tool_response>\n{result.content}\n</tool_response>" in again
