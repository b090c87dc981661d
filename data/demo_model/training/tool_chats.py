"""Chats with tools: one call, several at once, one after another, a question back, no call at all.

The side of the split goes by the question, so a held-out question is never asked in training, not
even with other schemas.
"""

from collections.abc import Callable

from .actions import FAMILIES, unknown
from .chat_format import Chat, Message, Tool, assistant, calls, tool_result, user, value_text
from .draw import Draw
from .tools import ToolUse, calculator, clock, list_files, price, read_file, weather
from .words import file_name, folder, joined

_ERRORS = ("not found", "permission denied", "timeout", "service unavailable", "invalid value")


def offered(draw: Draw, *needed: Callable[[Draw], ToolUse], tools: list[Tool]) -> list[Tool]:
    """`tools` among up to three of other families, in random order."""
    others = [family for family in FAMILIES if family not in needed or family is unknown]
    names = {tool["name"] for tool in tools}
    for family in draw.sample(others, draw.pick(0, 1, 1, 2, 2, 3)):
        tool = family(draw).tool
        if tool["name"] not in names:
            tools, names = [*tools, tool], names | {tool["name"]}
    return draw.sample(tools, len(tools))


def politely(draw: Draw, text: str) -> str:
    """The question as one person or another might type it."""
    style = draw.rng.random()
    if style < 0.1 and text.endswith((".", "?")):
        return f"{text[:-1]}, please{text[-1]}"
    if style < 0.18:
        return f"{draw.pick('Hi!', 'Hello!', 'Can you help me?', 'I have a question.')} {text}"
    if style < 0.25 and text.endswith((".", "?")):
        return text[:-1]
    if style < 0.3:
        return text[0].lower() + text[1:]
    return text


def _use(draw: Draw, family: Callable[[Draw], ToolUse]) -> ToolUse:
    return draw.until(lambda: family(draw), lambda use: use.ask)


def _thought(draw: Draw, use: ToolUse) -> str:
    given = ", ".join(f"{key} {value_text(value)}" for key, value in use.arguments.items())
    return draw.pick(
        f"The function {use.name} fits. Its parameters: {given}.",
        f"I can call {use.name} with {given}.",
        f"For this there is {use.name}. I need {given}.",
    )


def _called(draw: Draw, use: ToolUse, text: str = "") -> list[Message]:
    call = calls((use.name, use.arguments), text=text, thought=_thought(draw, use))
    if draw.chance(0.06):
        error = draw.pick(*_ERRORS)
        answer = draw.pick(
            f"Sorry, that did not work: {error}.",
            f"The function {use.name} gave an error: {error}.",
        )
        return [call, tool_result({"error": error}), assistant(answer, f"It failed: {error}.")]
    thought = draw.pick("The result is there, so I can answer.", "Now I tell the result.")
    return [call, tool_result(use.result), assistant(use.answer, thought)]


def one_call(draw: Draw) -> Chat:
    """One question, one call, the answer; at times a second question follows."""
    family = draw.choice(FAMILIES)
    use = _use(draw, family)
    tools = offered(draw, family, tools=[use.tool])
    lead = draw.pick("", "", "", "", "Let me check.", "One moment.")
    messages = [user(politely(draw, use.ask)), *_called(draw, use, lead)]
    follow = draw.rng.random()
    if follow < 0.15:
        thanks, reply = draw.pick(
            ("Thank you!", "You are welcome!"), ("Thanks.", "Happy to help."),
            ("Great, that is all.", "Good. Have a nice day!"),
        )  # fmt: skip
        messages += [user(thanks), assistant(reply, "A short friendly reply is enough.")]
    elif follow < 0.35:
        other = draw.choice([other for other in FAMILIES if other is not family])
        second = _use(draw, other)
        if not {tool["name"] for tool in tools} & {second.name}:
            tools = [*tools, second.tool]
            messages += [user(politely(draw, second.ask)), *_called(draw, second)]
    check = {"call": {"name": use.name, "arguments": use.arguments}}
    return Chat(kind="tool", messages=messages, tools=tools, check=check, prompt_length=1)


def parallel_calls(draw: Draw) -> Chat:
    """The same function for two or three things at once."""
    family, what = draw.pick(
        (weather, "the weather in"), (clock, "the time in"), (price, "the price of"),
        (list_files, "the files in"),
    )  # fmt: skip
    first = family(draw)
    key = first.tool["parameters"]["required"][0]
    kept = {key: first.tool["parameters"]["properties"][key]}
    parameters = {"type": "object", "properties": kept, "required": [key]}
    tool = {**first.tool, "parameters": parameters}

    def make() -> dict[str, ToolUse]:
        found: dict[str, ToolUse] = {}
        while len(found) < 2 + (draw.number(0, 2) == 0):
            use = family(draw)
            found[next(iter(use.arguments.values()))] = use
        return found

    found = draw.until(make, lambda made: f"{what} {list(made)}")
    names = list(found)
    ask = draw.pick(
        f"Tell me {what} {joined(names)}.", f"What is {what} {joined(names)}?",
        f"I need {what} {joined(names)}.",
    )  # fmt: skip
    thought = f"I call {tool['name']} {len(names)} times: {', '.join(names)}."
    together = calls(*((tool["name"], {key: name}) for name in names), thought=thought)
    results = [tool_result(use.result) for use in found.values()]
    lines = "\n".join(f"- {name}: {_short(use.result, name)}" for name, use in found.items())
    answer = assistant(lines, "All results are there, one line for each.")
    wanted = [{"name": tool["name"], "arguments": {key: name}} for name in names]
    return Chat(
        kind="tool_parallel", messages=[user(politely(draw, ask)), together, *results, answer],
        tools=offered(draw, family, tools=[tool]), check={"calls": wanted}, prompt_length=1,
    )  # fmt: skip


def _short(given: object, name: str) -> str:
    if isinstance(given, dict):
        given = given.get("files", {k: v for k, v in given.items() if v != name})
    if isinstance(given, dict):
        return ", ".join(f"{key} {value}" for key, value in given.items())
    return ", ".join(map(str, given)) or "nothing" if isinstance(given, list) else str(given)


def chained_calls(draw: Draw) -> Chat:
    """A folder is listed, then the file that fits is read."""
    lister, reader = list_files(draw).tool, read_file(draw)

    def make() -> tuple[str, list[str], str]:
        files = [file_name(draw) for _ in range(draw.number(2, 4))]
        return folder(draw), files, draw.choice(files)

    path, files, name = draw.until(make, lambda made: f"{made[0]} {_stem(made[2])}")
    stem = _stem(name)
    ask = draw.pick(
        f"Find the file about {stem} in {path} and read it.",
        f"Look in {path}. What does the {stem} file say?",
    )
    list_key = lister["parameters"]["required"][0]
    read_key = reader.tool["parameters"]["required"][0]
    text = str(reader.result["content"] if isinstance(reader.result, dict) else reader.result)
    listing = (lister["name"], {list_key: path})
    reading = (reader.name, {read_key: f"{path}/{name}"})
    messages = [
        user(ask),
        calls(listing, thought=f"First I list {path} with {lister['name']}."),
        tool_result({"files": files}),
        calls(reading, thought=f"The file about {stem} is {name}. I read it."),
        tool_result({"content": text}),
        assistant(
            draw.pick(f'The file {name} says: "{text}"', f'{name} says: "{text}"'),
            "I have the text.",
        ),
    ]
    return Chat(
        kind="tool_chain", messages=messages,
        tools=offered(draw, list_files, read_file, tools=[lister, reader.tool]),
        check={"call": {"name": listing[0], "arguments": listing[1]}}, prompt_length=1,
    )  # fmt: skip


def _stem(file: str) -> str:
    return file.split(".")[0].split("_")[0].split("-")[0]


def asked_back(draw: Draw) -> Chat:
    """The city is missing, so the assistant asks for it and then calls."""
    family = draw.pick(weather, clock)
    use = _use(draw, family)
    while len(use.arguments) > 1:
        use = _use(draw, family)
    key = use.tool["parameters"]["required"][0]
    place = use.arguments[key]
    ask = "What is the weather?" if family is weather else "What time is it?"
    back = draw.pick("For which city?", "Which city do you mean?", "Please tell me the city.")
    reply = draw.pick(place, f"{place}, please.", f"In {place}.")
    call = calls((use.name, {key: place}), thought=f"The city is {place}. I call {use.name}.")
    messages = [
        user(ask),
        assistant(back, "The city is missing, so I ask for it."),
        user(reply), call, tool_result(use.result), assistant(use.answer, "Now I can answer."),
    ]  # fmt: skip
    return Chat(kind="tool_ask", messages=messages, tools=offered(draw, family, tools=[use.tool]))


def without_call(draw: Draw, chat: Chat) -> Chat:
    """The same chat, with tools on offer that it does not need."""
    tools = offered(draw, calculator, tools=[])
    return Chat(kind="tool_none", messages=chat.messages, tools=tools or [unknown(draw).tool])
