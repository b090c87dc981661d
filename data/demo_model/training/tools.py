"""Tools that a chat can offer, and one use of each: schema, question, arguments, result, answer.

A family is one purpose under several names and parameter names, so that the schema has to be read.
The tools here find something out; those in actions.py do something.
"""

from dataclasses import dataclass
from typing import Any

from .arithmetic import result
from .chat_format import Tool
from .draw import Draw
from .words import (
    WORDS,
    city,
    file_name,
    first_name,
    folder,
    full_name,
    made_up,
    noun,
    plural,
    thing,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """One question that a tool answers.

    Attributes:
        ask: the question with the first letter as in a sentence.
        result: what the tool gives back.
        answer: what the assistant says then.
    """

    tool: Tool
    ask: str
    arguments: dict[str, Any]
    result: object
    answer: str

    @property
    def name(self) -> str:
        """The function's name."""
        return self.tool["name"]


def tool_schema(name: str, description: str, properties: dict[str, dict[str, Any]]) -> Tool:
    """A function schema; every property is required unless its value has `optional`."""
    required = [key for key, value in properties.items() if not value.pop("optional", False)]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"name": name, "description": description, "parameters": parameters}


def string(description: str, **more: Any) -> dict[str, Any]:
    """A parameter that is text."""
    return {"type": "string", "description": description, **more}


def integer(description: str, **more: Any) -> dict[str, Any]:
    """A parameter that is a whole number."""
    return {"type": "integer", "description": description, **more}


def weather(draw: Draw) -> ToolUse:
    """The weather of a city, at times in a given unit."""
    name = draw.pick("get_weather", "weather", "current_weather", "weather_lookup", "fetch_weather")
    key, place = draw.pick("city", "location", "place", "city_name"), city(draw)
    sky = draw.pick("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear")
    degrees, scale = draw.number(-10, 38), "degrees"
    ask = draw.pick(
        f"What is the weather in {place}?", f"What's the weather like in {place}?",
        f"How is the weather in {place} today?", f"Tell me the weather in {place}.",
        f"Weather in {place}?", f"Do I need a coat in {place} today?", f"Is it raining in {place}?",
    )  # fmt: skip
    arguments: dict[str, Any] = {key: place}
    properties = {key: string(draw.pick("The city name", "Name of the city", "City to look up"))}
    if draw.chance(0.4):
        unit = draw.pick("celsius", "fahrenheit")
        units = ["celsius", "fahrenheit"]
        properties["unit"] = string("Temperature unit", enum=units, optional=True)
        if draw.chance(0.75):
            ask = f"{ask} {draw.pick('Use', 'Answer in', 'Give it in')} {unit}."
            arguments["unit"], scale = unit, f"degrees {unit.capitalize()}"
            degrees = round(degrees * 9 / 5 + 32) if unit == "fahrenheit" else degrees
    answer = draw.pick(
        f"It is {sky} in {place}, and it is {degrees} {scale}.",
        f"The weather in {place} is {sky} with {degrees} {scale}.",
    )
    given = {"temperature": degrees, "condition": sky}
    if draw.chance(0.4):
        given = {"city": place, **given}
    about = draw.pick("Get the current weather for a city", "Look up the weather in a place")
    tool = tool_schema(name, about, properties)
    return ToolUse(tool=tool, ask=ask, arguments=arguments, result=given, answer=answer)


def calculator(draw: Draw) -> ToolUse:
    """One operation on larger numbers, as an expression or as two numbers."""
    op = draw.pick("+", "-", "*")
    a, b = draw.number(2, 9999), draw.number(2, 999)
    if op == "*":
        a, b = draw.number(2, 999), draw.number(2, 99)
    word = {"+": "plus", "-": "minus", "*": "times"}[op]
    value = result(a, op, b)
    ask = draw.pick(
        f"What is {a} {word} {b}?", f"Calculate {a} {op} {b}.", f"How much is {a} {op} {b}?",
        f"Compute {a} {word} {b}.", f"What is {a} {op} {b}?",
    )  # fmt: skip
    if draw.chance(0.5):
        key = draw.pick("expression", "expr", "formula")
        name = draw.pick("calculator", "calculate", "evaluate", "math")
        tool = tool_schema(name, "Work out an arithmetic expression", {key: string("Like 2 + 3")})
        arguments: dict[str, Any] = {key: f"{a} {op} {b}"}
    else:
        x, y = draw.pick(("a", "b"), ("x", "y"), ("first", "second"))
        key = draw.pick("operation", "op")
        properties = {
            x: integer("First number"),
            key: string("What to do", enum=["add", "subtract", "multiply"]),
            y: integer("Second number"),
        }
        tool = tool_schema(
            draw.pick("arithmetic", "compute"), "Calculate with two numbers", properties
        )
        arguments = {x: a, key: {"+": "add", "-": "subtract", "*": "multiply"}[op], y: b}
    answer = draw.pick(f"{a} {op} {b} = {value}.", f"The result is {value}.")
    given = draw.pick({"result": value}, {"value": value})
    return ToolUse(tool=tool, ask=ask, arguments=arguments, result=given, answer=answer)


def clock(draw: Draw) -> ToolUse:
    """The time in a city."""
    place, key = city(draw), draw.pick("city", "location", "place")
    time = f"{draw.number(0, 23):02d}:{draw.number(0, 59):02d}"
    ask = draw.pick(
        f"What time is it in {place}?", f"Tell me the time in {place}.",
        f"What is the current time in {place}?", f"Is it late in {place}?",
    )  # fmt: skip
    tool = tool_schema(
        draw.pick("get_time", "current_time", "time_in", "clock"),
        draw.pick("Get the local time in a city", "Tell the time in a place"),
        {key: string("City name")},
    )
    answer = draw.pick(f"It is {time} in {place}.", f"The time in {place} is {time}.")
    given = draw.pick({"time": time}, {"city": place, "time": time})
    return ToolUse(tool=tool, ask=ask, arguments={key: place}, result=given, answer=answer)


def units(draw: Draw) -> ToolUse:
    """A conversion between two units."""
    source, target, factor = draw.pick(
        ("kilometers", "miles", 0.621), ("miles", "kilometers", 1.609), ("meters", "feet", 3.281),
        ("kilograms", "pounds", 2.205), ("pounds", "kilograms", 0.454), ("hours", "minutes", 60),
        ("liters", "gallons", 0.264), ("inches", "centimeters", 2.54), ("days", "hours", 24),
    )  # fmt: skip
    amount = draw.number(1, 500)
    value = round(amount * factor, 1)
    keys = draw.pick(("value", "from_unit", "to_unit"), ("amount", "source", "target"))
    about = ("The number to convert", "Unit it is in", "Unit to convert to")
    properties = {keys[0]: {"type": "number", "description": about[0]}}
    properties |= {key: string(text) for key, text in zip(keys[1:], about[1:], strict=True)}
    ask = draw.pick(
        f"Convert {amount} {source} to {target}.", f"How many {target} are {amount} {source}?",
        f"What is {amount} {source} in {target}?",
    )  # fmt: skip
    name = draw.pick("convert_units", "unit_converter", "convert")
    tool = tool_schema(name, "Convert a number from one unit to another", properties)
    arguments: dict[str, Any] = dict(zip(keys, (amount, source, target), strict=True))
    answer = draw.pick(f"{amount} {source} are {value} {target}.", f"That is {value} {target}.")
    return ToolUse(tool=tool, ask=ask, arguments=arguments, result={"result": value}, answer=answer)


def list_files(draw: Draw) -> ToolUse:
    """The files of a folder."""
    path, key = folder(draw), draw.pick("path", "directory", "folder", "dir")
    files = [file_name(draw) for _ in range(draw.number(0, 4))]
    count = "is 1 file" if len(files) == 1 else f"are {len(files)} files"
    answer = f"There {count} in {path}: {', '.join(files)}." if files else f"{path} is empty."
    ask = draw.pick(
        f"List the files in {path}.", f"What files are in {path}?", f"Show me what is in {path}.",
        f"What's in the folder {path}?",
    )  # fmt: skip
    tool = tool_schema(
        draw.pick("list_files", "list_directory", "ls", "list_dir"),
        draw.pick("List the files in a directory", "Show what is in a folder"),
        {key: string("Path of the directory")},
    )
    given = draw.pick({"files": files}, files)
    return ToolUse(tool=tool, ask=ask, arguments={key: path}, result=given, answer=answer)


def note_text(draw: Draw) -> str:
    """One line that a file or a message may hold."""
    return draw.pick(
        f"Buy {draw.number(2, 9)} {plural(draw.choice(WORDS['fruits']))}",
        f"Call {first_name(draw)} at {draw.number(8, 20)}:00",
        f"Meeting with {full_name(draw)}",
        f"The {noun(draw)} is ready",
        f"Please bring the {draw.choice(WORDS['objects'])}",
        f"{first_name(draw)} lost a {draw.choice(WORDS['colors'])} {draw.choice(WORDS['objects'])}",
    )


def read_file(draw: Draw) -> ToolUse:
    """The content of a file."""
    path, text = f"{folder(draw)}/{file_name(draw)}", f"{note_text(draw)}. {note_text(draw)}."
    key = draw.pick("path", "file", "filename")
    ask = draw.pick(
        f"Read the file {path}.", f"What does {path} say?", f"Show me the content of {path}.",
        f"Open {path} for me.",
    )  # fmt: skip
    name = draw.pick("read_file", "open_file", "cat")
    tool = tool_schema(name, "Read a text file", {key: string("Path of the file")})
    given = draw.pick({"content": text}, text)
    answer = f'The file says: "{text}"'
    return ToolUse(tool=tool, ask=ask, arguments={key: path}, result=given, answer=answer)


def price(draw: Draw) -> ToolUse:
    """What a thing costs."""
    item, key = thing(draw), draw.pick("item", "product", "name")
    value = draw.number(1, 90) + draw.number(0, 99) / 100
    ask = draw.pick(
        f"How much does the {item} cost?", f"What is the price of the {item}?",
        f"Look up the price of the {item}.",
    )  # fmt: skip
    name = draw.pick("get_price", "price_of", "lookup_price", "shop_price")
    tool = tool_schema(name, "Get the price of an item in the shop", {key: string("The item")})
    given = draw.pick({"price": value, "currency": "USD"}, {"item": item, "price": value})
    answer = f"The {item} costs {value} dollars."
    return ToolUse(tool=tool, ask=ask, arguments={key: item}, result=given, answer=answer)


def translate(draw: Draw) -> ToolUse:
    """A word in another language."""
    word = thing(draw)
    language = draw.pick("French", "German", "Italian", "Spanish", "Dutch", "Polish", "Japanese")
    keys = draw.pick(("text", "language"), ("word", "to"), ("phrase", "target_language"))
    ask = draw.pick(
        f'Translate "{word}" into {language}.', f'What is "{word}" in {language}?',
        f'How do you say "{word}" in {language}?',
    )  # fmt: skip
    said = made_up(draw)
    properties = {keys[0]: string("What to translate"), keys[1]: string("The language")}
    name = draw.pick("translate", "translate_text", "dictionary")
    tool = tool_schema(name, "Translate into another language", properties)
    arguments: dict[str, Any] = dict(zip(keys, (word, language), strict=True))
    answer = f'"{word}" in {language} is "{said}".'
    given = {"translation": said}
    return ToolUse(tool=tool, ask=ask, arguments=arguments, result=given, answer=answer)
