"""Tools that do something: write, set, send, add, roll, store, switch; and one with made-up names.

`FAMILIES` lists these and the tools that find something out. Two tools of one family never stand in
one prompt, so that a question has exactly one right call.
"""

from collections.abc import Callable
from typing import Any

from .draw import Draw
from .tools import (
    ToolUse,
    calculator,
    clock,
    integer,
    list_files,
    note_text,
    price,
    read_file,
    string,
    tool_schema,
    translate,
    units,
    weather,
)
from .words import WORDS, city, file_name, first_name, full_name, joined, made_up, noun


def write_file(draw: Draw) -> ToolUse:
    """A line written to a file."""
    name, text = file_name(draw), note_text(draw)
    keys = draw.pick(("path", "content"), ("filename", "text"), ("file", "data"))
    ask = draw.pick(
        f'Save "{text}" to {name}.', f'Write "{text}" into the file {name}.',
        f'Create a file {name} with the text "{text}".',
    )  # fmt: skip
    properties = {keys[0]: string("File to write"), keys[1]: string("Text to store")}
    tool = tool_schema(
        draw.pick("write_file", "save_file", "create_file"), "Write text to a file", properties
    )
    arguments: dict[str, Any] = dict(zip(keys, (name, text), strict=True))
    given = draw.pick({"ok": True}, {"status": "written", "bytes": len(text)})
    answer = draw.pick(f"Done. I saved it to {name}.", f'I wrote "{text}" to {name}.')
    return ToolUse(tool=tool, ask=ask, arguments=arguments, result=given, answer=answer)


def timer(draw: Draw) -> ToolUse:
    """A countdown, at times with a label."""
    minutes, key = draw.number(1, 90), draw.pick("minutes", "duration_minutes")
    length = f"{minutes} minute{'' if minutes == 1 else 's'}"
    arguments: dict[str, Any] = {key: minutes}
    properties = {key: integer("Length in minutes")}
    ask = draw.pick(f"Set a timer for {length}.", f"Start a timer for {length}.")
    if draw.chance(0.5):
        properties["label"] = string("What the timer is for", optional=True)
        if draw.chance(0.75):
            label = draw.pick(
                "tea", "pasta", "laundry", "a nap", "the oven", "homework", noun(draw)
            )
            arguments["label"] = label
            ask = draw.pick(f"Set a timer for {label}, {length}.", f"{length} for {label}, please.")
    tool = tool_schema(
        draw.pick("set_timer", "start_timer", "timer"), "Start a countdown", properties
    )
    given = draw.pick({"ok": True}, {"status": "started"})
    answer = draw.pick(f"Your timer for {length} is running.", f"Done, {length} from now.")
    return ToolUse(tool=tool, ask=ask, arguments=arguments, result=given, answer=answer)


def message(draw: Draw) -> ToolUse:
    """A short message to a person."""
    to, text = first_name(draw), draw.pick(
        "I will be late", "happy birthday", "see you in the park", "dinner is ready",
        f"the meeting is at {draw.number(1, 12)}", f"I found your {draw.choice(WORDS['objects'])}",
        f"please bring {draw.choice(WORDS['foods'])}", f"I am in {city(draw)}",
    )  # fmt: skip
    keys = draw.pick(("to", "text"), ("recipient", "message"), ("name", "body"))
    ask = draw.pick(
        f"Send a message to {to}: {text}.", f'Tell {to} "{text}".', f"Text {to} that {text}.",
        f'Write "{text}" to {to}.',
    )  # fmt: skip
    properties = {keys[0]: string("Who gets the message"), keys[1]: string("The message")}
    tool = tool_schema(
        draw.pick("send_message", "send_text", "text_person"),
        "Send a message to a person",
        properties,
    )
    arguments: dict[str, Any] = dict(zip(keys, (to, text), strict=True))
    given = draw.pick({"sent": True}, {"status": "sent"})
    answer = draw.pick(f"I sent the message to {to}.", f"Done, {to} will get your message.")
    return ToolUse(tool=tool, ask=ask, arguments=arguments, result=given, answer=answer)


def event(draw: Draw) -> ToolUse:
    """An entry in a calendar."""
    title = draw.pick(
        "Dentist", f"Lunch with {first_name(draw)}", "Piano lesson", "Team meeting",
        f"Birthday of {first_name(draw)}", f"Trip to {city(draw)}", "Football game",
    )  # fmt: skip
    date = f"{draw.number(2024, 2029)}-{draw.number(1, 12):02d}-{draw.number(1, 28):02d}"
    time = f"{draw.number(7, 20):02d}:{draw.pick('00', '15', '30', '45')}"
    keys = draw.pick(("title", "date", "time"), ("name", "day", "start"))
    about = ("Title", "Date as YYYY-MM-DD", "Time as HH:MM")
    ask = draw.pick(
        f'Add "{title}" to my calendar on {date} at {time}.',
        f'Put "{title}" on {date} at {time} in my calendar.',
    )
    properties = {key: string(text) for key, text in zip(keys, about, strict=True)}
    tool = tool_schema(
        draw.pick("add_event", "create_event", "calendar_add"),
        "Add an event to the calendar",
        properties,
    )
    arguments: dict[str, Any] = dict(zip(keys, (title, date, time), strict=True))
    given = draw.pick({"ok": True}, {"id": draw.number(100, 999)})
    answer = draw.pick(
        f'I added "{title}" on {date} at {time}.', f"Done. It is on {date} at {time}."
    )
    return ToolUse(tool=tool, ask=ask, arguments=arguments, result=given, answer=answer)


def dice(draw: Draw) -> ToolUse:
    """A roll of dice."""
    sides, count = draw.pick(4, 6, 8, 10, 12, 20), draw.number(1, 4)
    rolls = [draw.number(1, sides) for _ in range(count)]
    word = "die" if count == 1 else "dice"
    ask = draw.pick(
        f"Roll {count} {word} with {sides} sides.", f"Throw {count} {sides}-sided {word}."
    )
    properties = {"sides": integer("Sides of each die"), "count": integer("How many dice")}
    tool = tool_schema(draw.pick("roll_dice", "dice", "throw_dice"), "Roll some dice", properties)
    answer = f"You rolled {joined([str(roll) for roll in rolls])}."
    arguments = {"sides": sides, "count": count}
    return ToolUse(tool=tool, ask=ask, arguments=arguments, result={"rolls": rolls}, answer=answer)


def record(draw: Draw) -> ToolUse:
    """A record, given as one JSON object."""
    entry: dict[str, Any] = {"name": full_name(draw), "age": draw.number(6, 90)}
    ask = f"Save a record for {entry['name']}, age {entry['age']}"
    if draw.chance(0.5):
        entry["tags"] = draw.sample(WORDS["nouns"], draw.number(1, 3))
        ask += f", with the tags {', '.join(entry['tags'])}"
    key = draw.pick("record", "data", "entry")
    about = {"type": "object", "description": "The record with name, age and, if given, tags"}
    name = draw.pick("create_record", "save_record", "add_person", "insert_row")
    tool = tool_schema(name, "Store a record in the database", {key: about})
    given = draw.pick({"ok": True}, {"id": draw.number(1, 9999)})
    answer = draw.pick(f"I saved the record for {entry['name']}.", f"{entry['name']} is stored.")
    return ToolUse(tool=tool, ask=f"{ask}.", arguments={key: entry}, result=given, answer=answer)


def switch(draw: Draw) -> ToolUse:
    """A light or device, on or off: a boolean."""
    room = draw.pick("kitchen", "bedroom", "hall", "garden", "office", "cellar", noun(draw))
    on, key = draw.chance(0.5), draw.pick("on", "enabled")
    where = draw.pick("room", "place", "area")
    ask = draw.pick(
        f"Turn {'on' if on else 'off'} the light in the {room}.",
        f"Switch the {room} light {'on' if on else 'off'}.",
    )
    properties = {
        where: string("Where the light is"),
        key: {"type": "boolean", "description": "On or off"},
    }
    name = draw.pick("set_light", "switch_light", "light")
    tool = tool_schema(name, "Turn a light on or off", properties)
    answer = f"The light in the {room} is {'on' if on else 'off'} now."
    given = draw.pick({"ok": True}, {"light": "on" if on else "off"})
    return ToolUse(
        tool=tool, ask=ask, arguments={where: room, key: on}, result=given, answer=answer
    )


def shopping(draw: Draw) -> ToolUse:
    """Items for a shopping list: an array."""
    items, key = (
        draw.sample(WORDS["foods"] + WORDS["fruits"], draw.number(1, 4)),
        draw.pick("items", "things"),
    )
    ask = draw.pick(
        f"Add {joined(items)} to my shopping list.", f"Put {joined(items)} on the shopping list.",
        f"I need to buy {joined(items)}. Put it on my list.",
    )  # fmt: skip
    about = {"type": "array", "items": {"type": "string"}, "description": "What to buy"}
    name = draw.pick("add_to_list", "shopping_list", "buy_list_add")
    tool = tool_schema(name, "Add items to the shopping list", {key: about})
    given = draw.pick({"ok": True}, {"count": len(items)})
    answer = f"I put {joined(items)} on your list."
    return ToolUse(tool=tool, ask=ask, arguments={key: items}, result=given, answer=answer)


def unknown(draw: Draw) -> ToolUse:
    """A tool with made-up names: the schema has to be read."""
    verb = draw.pick("get", "set", "find", "run", "open", "check", "start", "count")
    what, properties, arguments = made_up(draw), {}, {}
    while len(arguments) < draw.number(1, 2):
        key = made_up(draw)
        if draw.chance(0.5):
            properties[key], arguments[key] = integer(f"The {key} number"), draw.number(1, 999)
        else:
            properties[key], arguments[key] = string(f"The {key} name"), noun(draw)
    given = joined([f"{key} {value}" for key, value in arguments.items()])
    ask = draw.pick(
        f"{verb.title()} the {what} with {given}.", f"{verb.title()} the {what}, use {given}."
    )
    tool = tool_schema(f"{verb}_{what}", f"{verb.title()} the {what}", properties)
    value = draw.number(1, 999)
    answer = draw.pick(f"The result is {value}.", f"Done. The result is {value}.")
    return ToolUse(tool=tool, ask=ask, arguments=arguments, result={"result": value}, answer=answer)


FAMILIES: list[Callable[[Draw], ToolUse]] = [
    weather, calculator, clock, units, list_files, read_file, write_file, timer, message, price,
    event, dice, record, switch, shopping, translate, unknown, unknown,
]  # fmt: skip
