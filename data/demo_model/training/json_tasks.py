"""JSON answers: from text, lists and tables to JSON; looking up, changing and repairing JSON.

The evaluation compares values, so white space is free; most answers stand on one line, and some are
indented when the question says so. The record decides the side of the split.
"""

import json
from typing import Any

from .chat_format import Chat, assistant, to_json, user
from .draw import Draw
from .words import WORDS, article, city, first_name, full_name, joined, plural

Record = dict[str, Any]

_ONLY_JSON = ("Reply with JSON only.", "Answer only with valid JSON.", "Always answer in JSON.")


def json_chat(draw: Draw) -> Chat:
    """Any of the JSON tasks."""
    tasks = (
        _from_text,
        _from_text,
        _from_text,
        _array,
        _table,
        _look_up,
        _change,
        _repair,
        _inventory,
    )
    chat = draw.choice(tasks)(draw)
    if chat.messages[0]["role"] != "system" and "json" in (chat.check or {}) and draw.chance(0.2):
        chat.with_system(draw.pick(*_ONLY_JSON))
    return chat


def _record(draw: Draw) -> Record:
    """Two to six facts about one person, in random order."""

    def make() -> Record:
        facts = {
            "name": full_name(draw),
            "age": draw.number(5, 95),
            "city": city(draw),
            "job": draw.choice(WORDS["jobs"]),
            "pet": draw.choice(WORDS["animals"]),
            "likes": draw.sample(WORDS["fruits"] + WORDS["foods"], draw.number(1, 3)),
            "married": draw.chance(0.5),
            "height_cm": draw.number(120, 205),
            "score": draw.number(0, 100) / 10,
        }
        return {key: facts[key] for key in draw.sample(list(facts), draw.number(2, 6))}

    return draw.until(make, to_json)


def _describe(draw: Draw, record: Record) -> str:
    """The record in sentences, in its own order."""
    who = str(record.get("name", "The person")).split()[0] if "name" in record else "The person"
    sentences = []
    if "name" in record:
        name = record["name"]
        sentences.append(
            draw.pick(f"This is {name}.", f"My friend is called {name}.", f"I met {name}.")
        )
    for key, value in record.items():
        if key != "name":
            sentences.append(_sentence(draw, who, key, value))
    return " ".join(sentences)


def _sentence(draw: Draw, who: str, key: str, value: Any) -> str:
    if key == "age":
        return draw.pick(f"{who} is {value} years old.", f"{who} is {value}.")
    if key == "city":
        return draw.pick(f"{who} lives in {value}.", f"{who} is from {value}.")
    if key == "likes":
        return f"{who} likes {joined(value)}."
    return {
        "job": f"{who} works as {article(str(value))}.",
        "pet": f"{who} has a pet {value}.",
        "married": f"{who} is {'' if value else 'not '}married.",
        "height_cm": f"{who} is {value} cm tall.",
        "score": f"{who} has a score of {value}.",
    }[key]


def _from_text(draw: Draw) -> Chat:
    record = _record(draw)
    keys, text = ", ".join(record), _describe(draw, record)
    ask = draw.pick(
        f"Write this as JSON with the keys {keys}.\n\n{text}",
        f"{text}\n\nGive me a JSON object with {keys}.",
        f"Extract {keys} as JSON: {text}",
        f"Make a JSON object with the keys {keys} from this text: {text}",
    )
    indent = draw.chance(0.25)
    ask += draw.pick(" Use indentation.", " Indent it.", " Pretty-print it.") if indent else ""
    return _chat(ask, _dump(record, indent), f"The keys are {keys}.", {"json": record})


def _array(draw: Draw) -> Chat:
    def make() -> list[str]:
        count = draw.number(2, 7)
        if draw.chance(0.3):
            return list(dict.fromkeys(draw.pick(first_name, city)(draw) for _ in range(count)))
        return draw.sample(WORDS[draw.pick("animals", "fruits", "objects", "cities")], count)

    items = draw.until(make, to_json)
    ask = draw.pick(
        f"Make a JSON array of: {', '.join(items)}.",
        f"Turn this list into JSON: {', '.join(items)}",
        "As a JSON array, please:\n" + "\n".join(f"- {item}" for item in items),
    )
    return _chat(ask, to_json(items), f"The array has {len(items)} items.", {"json": items})


def _table(draw: Draw) -> Chat:
    def make() -> list[Record]:
        columns = draw.sample(["name", "age", "city", "pet"], draw.number(2, 3))
        return [
            {key: value for key, value in row.items() if key in columns}
            for row in (
                {"name": first_name(draw), "age": draw.number(5, 90), "city": city(draw),
                 "pet": draw.choice(WORDS["animals"])}
                for _ in range(draw.number(1, 3))
            )
        ]  # fmt: skip

    rows = draw.until(make, to_json)
    lines = [",".join(rows[0])] + [",".join(map(str, row.values())) for row in rows]
    ask = draw.pick("Convert this CSV to JSON:\n", "CSV to JSON, please:\n") + "\n".join(lines)
    return _chat(ask, to_json(rows), f"Rows in the table: {len(rows)}.", {"json": rows})


def _look_up(draw: Draw) -> Chat:
    record = _record(draw)
    key = draw.choice(list(record))
    value = record[key]
    answer = ", ".join(value) if isinstance(value, list) else str(value)
    answer = answer.lower() if isinstance(value, bool) else answer
    ask = draw.pick(f'What is the value of "{key}"?', f"Tell me the {key}.", f"What is {key} here?")
    text = f"{_dump(record, draw.chance(0.3))}\n\n{ask}"
    return _chat(text, answer, f'I look for the key "{key}".', {"text": answer})


def _change(draw: Draw) -> Chat:
    record = _record(draw)
    key = draw.pick("age", "city", "pet")
    new = {"age": draw.number(5, 95), "city": city(draw), "pet": draw.choice(WORDS["animals"])}[key]
    changed = {**record, key: new}
    ask = draw.pick(
        f"Set {key} to {new} and give me the new JSON.", f"Change {key} to {new}.",
        f"Update the JSON so that {key} is {to_json(new)}.",
    )  # fmt: skip
    how = "changes" if key in record else "is new and goes last"
    text = f"{to_json(record)}\n\n{ask}"
    return _chat(text, to_json(changed), f'The key "{key}" {how}.', {"json": changed})


def _repair(draw: Draw) -> Chat:
    record = _record(draw)
    good = to_json(record)
    damage = draw.pick("end", '"', ",:")
    if damage == "end":
        bad = good[:-1]
        thought = "The last bracket is missing."
    else:
        places = [place for place, sign in enumerate(good) if sign in damage]
        place = draw.choice(places[1:] if damage == '"' else places)
        bad = good[:place] + good[place + 1 :]
        thought = (
            "A quotation mark is missing." if damage == '"' else "A comma or colon is missing."
        )
    ask = draw.pick(
        "Fix this JSON: ", "This JSON is broken. Please repair it:\n", "Correct this JSON:\n"
    )
    return _chat(ask + bad, good, thought, {"json": record})


def _inventory(draw: Draw) -> Chat:
    """A nested object whose form the system message gives."""

    def make() -> Record:
        words = draw.sample(WORDS["objects"] + WORDS["fruits"], draw.number(1, 3))
        items = [{"name": word, "count": draw.number(2, 12)} for word in words]
        return {"owner": first_name(draw), "items": items, "done": draw.chance(0.5)}

    record = draw.until(make, to_json)
    things = [f"{item['count']} {plural(item['name'])}" for item in record["items"]]
    indent = draw.chance(0.25)
    state = "done" if record["done"] else "not done"
    ask = f"{record['owner']} has {joined(things)}. The work is {state}."
    system = draw.pick(
        "Answer only with JSON that has the keys owner, items (list of name and count) and done.",
        "Reply with a JSON object: owner (string), items (array of {name, count}), done (boolean).",
    )
    ask += " Indent the answer." if indent else ""
    thought = f"The owner is {record['owner']}, with {len(things)} kinds of items."
    return _chat(ask, _dump(record, indent), thought, {"json": record}).with_system(system)


def _dump(value: object, indent: bool) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) if indent else to_json(value)


def _chat(question: str, answer: str, thought: str, check: dict[str, Any]) -> Chat:
    messages = [user(question), assistant(answer, thought)]
    return Chat(kind="json", messages=messages, check=check)
