"""Every generated answer is checked by code that does not share the generator's."""

import json
import re
from collections.abc import Callable

import pytest

from data.demo_model.training import mixture, prompts
from data.demo_model.training.arithmetic import sum_chat
from data.demo_model.training.chat_format import Chat, render, schema
from data.demo_model.training.draw import Draw, is_held_out
from data.demo_model.training.json_tasks import json_chat
from data.demo_model.training.lists import list_chat
from data.demo_model.training.memory import memory_chat
from data.demo_model.training.scorer import first_json, judge, parse_calls, same_json
from data.demo_model.training.stories import make_story
from data.demo_model.training.tool_chats import chained_calls, one_call, parallel_calls
from data.demo_model.training.words import WORDS

GENERATED = [name for name, part in mixture.PARTS.items() if part.make]
CHECKED = [sum_chat, list_chat, json_chat, one_call, parallel_calls, chained_calls]


def answer_of(chat: Chat) -> str:
    """The text of the answer that the check judges, as the model would write it."""
    place = len(chat.prompt())
    before = render(Chat(kind="", messages=chat.messages[:place], tools=chat.tools))
    until = Chat(kind="", messages=chat.messages[: place + 1], tools=chat.tools)
    return "".join(text for text, _ in render(until)[len(before) :]).split("</think>\n\n")[-1]


def question_of(chat: Chat) -> str:
    return chat.prompt()[-1]["content"]


@pytest.mark.parametrize("name", GENERATED)
def test_a_seed_fixes_what_a_part_makes(name: str) -> None:
    make = mixture.PARTS[name].make
    assert make is not None
    first, again, other = Draw.of(5), Draw.of(5), Draw.of(6)
    texts = [make(first).text for _ in range(20)]
    assert texts == [make(again).text for _ in range(20)]
    assert texts != [make(other).text for _ in range(20)]


@pytest.mark.parametrize("make", CHECKED)
def test_the_generated_answer_is_right_by_its_own_check(make: Callable[[Draw], Chat]) -> None:
    draw = Draw.of(1)
    for _ in range(400):
        chat = make(draw)
        assert chat.check is not None
        verdict = judge(chat.check, answer_of(chat))
        assert verdict.parse is not False and verdict.exact, answer_of(chat)


def test_every_tool_call_parses_back_and_fits_its_schema() -> None:
    draw = Draw.of(2)
    for _ in range(600):
        chat = draw.pick(one_call, parallel_calls, chained_calls)(draw)
        schemas = {tool["name"]: schema(tool)["function"]["parameters"] for tool in chat.tools}
        assert len(schemas) == len(chat.tools)
        for message in chat.messages:
            wanted = [call["function"] for call in message.get("tool_calls", [])]
            text = "".join(
                t for t, _ in render(Chat(kind="", messages=[chat.messages[0], message]))
            )
            found = parse_calls(text)
            assert [name for name, _ in found] == [call["name"] for call in wanted]
            for (name, arguments), call in zip(found, wanted, strict=True):
                properties = schemas[name]["properties"]
                assert set(schemas[name]["required"]) <= set(arguments) <= set(properties)
                for key, value in call["arguments"].items():
                    kind = properties[key]["type"]
                    read = arguments[key]
                    if kind == "boolean":  # as the family's template writes it
                        read = {"True": True, "False": False}[read]
                    elif kind != "string":
                        read = json.loads(read)
                    assert same_json(read, value)
                    assert value in properties[key].get("enum", [value])


def test_one_call_never_offers_two_tools_of_one_purpose() -> None:
    draw = Draw.of(3)
    for _ in range(300):
        described = [tool["description"] for tool in one_call(draw).tools]
        weather = [text for text in described if "weather" in text]
        assert len(weather) <= 1


def test_sums_are_right() -> None:
    draw, plain = Draw.of(4), 0
    for _ in range(3000):
        chat = sum_chat(draw)
        answer = answer_of(chat)
        for left, op, right, value in re.findall(r"(\d+) ([-+*]) (\d+) = (-?\d+)", answer):
            assert eval(f"{left}{op}{right}") == int(value)
        thought = chat.messages[-1]["reasoning_content"]
        for left, op, right, value in re.findall(r"(\d+) ([-+*]) (\d+) = (-?\d+)", thought):
            assert eval(f"{left}{op}{right}") == int(value)
        signs = question_of(chat).replace("plus", "+").replace("minus", "-").replace("times", "*")
        if (found := re.findall(r"(\d+) ([-+*]) (\d+)", signs)) and "has" not in signs:
            assert eval("".join(found[0])) == (chat.check or {})["number"]
            plain += 1
    assert plain > 1500


def test_word_problems_are_right() -> None:
    draw, seen = Draw.of(5), 0
    for _ in range(4000):
        chat = sum_chat(draw)
        question, value = question_of(chat), (chat.check or {})["number"]
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        if "more and then" in question:
            assert value == numbers[0] + numbers[1] - numbers[2] > 0
        elif "in each" in question:
            assert value == numbers[0] * numbers[1]
        elif "How many more" in question:
            assert value == numbers[0] - numbers[1] > 0
        elif re.search(r" (gets|buys|finds) \d+ more\.", question):
            assert value == numbers[0] + numbers[1]
        elif re.search(r" (gives away|eats|loses) \d+\.", question):
            assert value == numbers[0] - numbers[1] > 0
        else:
            continue
        seen += 1
    assert seen > 800


def test_list_answers_are_right() -> None:
    draw, seen = Draw.of(6), set()
    for _ in range(6000):
        chat = list_chat(draw)
        question, answer = question_of(chat), (chat.check or {})["text"]
        expected = expected_list_answer(question)
        if expected is not None:
            assert answer == expected[1], question
            seen.add(expected[0])
    assert len(seen) == 11, seen


def expected_list_answer(question: str) -> tuple[str, str] | None:
    """Kind and answer of a list question, worked out from its words alone."""
    listed = question.split("? ")[-1] if "? " in question else question.split(": ")[-1]
    items = listed.split("\n\n")[0].split(", ")
    lower = question.lower()
    if "numbers" in lower and "sort" in lower or "numbers in order" in lower:
        ranked = sorted(map(int, items), reverse="large to small" in lower)
        return "sort numbers", ", ".join(map(str, ranked))
    if found := re.search(r"(smallest|largest) number", lower):
        values = list(map(int, items))
        return "extreme", str(min(values) if found.group(1) == "smallest" else max(values))
    if "reverse" in lower or "opposite order" in lower:
        return "reverse", ", ".join(reversed(items))
    if lower.startswith("sort") or "alphabetical" in lower or "sort the list" in lower:
        return "sort", ", ".join(sorted(items, key=str.casefold))
    if lower.startswith(("how many", "count")):
        return "count", f"There are {len(items)} items."
    if found := re.search(r"item number (\d)|item is number (\d)", lower):
        return "number", items[int(found.group(1) or found.group(2)) - 1]
    if "the last item?" in lower:
        return "last", items[-1]
    if "spell" in lower:
        word = re.sub(r'.*spell (?:the word )?"?([^".?]+)"?[.?]?$', r"\1", lower)
        return "spell", "-".join(word.replace(" ", "")).upper()
    if found := re.match(r"is (\w+) in this|does this list contain (\w+)\?", lower):
        word = found.group(1) or found.group(2)
        inside = word in [item.lower() for item in items]
        item = re.search(word, question, re.IGNORECASE)
        assert item is not None
        text = f"Yes, {item.group()} is in the list." if inside else ""
        return "member", text or f"No, {item.group()} is not in the list."
    if found := re.search(r"the (first|last) (two|three|2|3) items", lower):
        count = {"two": 2, "2": 2}.get(found.group(2), 3)
        return "ends", ", ".join(items[:count] if found.group(1) == "first" else items[-count:])
    if lower.startswith(("repeat", "say", "copy")):
        return "copy", question.split(": ", 1)[1]
    return None


def test_json_answers_are_right() -> None:
    draw, arrays = Draw.of(7), 0
    for _ in range(1500):
        chat = json_chat(draw)
        question, check = question_of(chat), chat.check or {}
        if "text" in check:
            record, _ = json.JSONDecoder().raw_decode(question)
            values = [v if isinstance(v, list) else [v] for v in record.values()]
            texts = [", ".join(json.dumps(v).strip('"') for v in value) for value in values]
            assert check["text"] in texts
        elif question.startswith("Turn this list into JSON: "):
            assert first_json(answer_of(chat)) == question.split(": ")[1].split(", ")
            arrays += 1
        elif "CSV" in question:
            head, *rows = [line.split(",") for line in question.split("\n")[1:]]
            got = [[str(v) for v in row.values()] for row in first_json(answer_of(chat))]
            assert got == rows and all(list(row) == head for row in check["json"])
        elif question.startswith(("Extract", "Write this", "Make a JSON object")):
            for value in check["json"].values():
                if not isinstance(value, bool | list):
                    assert str(value) in question
    assert arrays > 10


def test_memory_is_told_before_it_is_asked() -> None:
    draw = Draw.of(8)
    for _ in range(500):
        chat = memory_chat(draw, mixture.filler)
        told = " ".join(m["content"] for m in chat.messages if m["role"] == "user")
        fact = (chat.check or {})["text"].rstrip(".").split(" ")[-1]
        assert fact in told


def test_stories_keep_names_and_pronouns() -> None:
    draw = Draw.of(9)
    listed = set(WORDS["girls"]) | set(WORDS["boys"])
    for _ in range(600):
        story = make_story(draw, draw.pick(1, 2))
        named = set(re.findall(r"[A-Z][a-z]+", story.text)) & listed
        assert named <= {story.hero.name, story.friend.name}
        assert not re.search(r"[\[\]{}|]|  |\ba [aeiou]", story.text), story.text
        wrong = {"m": r"\b[Ss]he\b|\b[Hh]er\b", "f": r"\b[Hh]e\b|\b[Hh]is\b|\bhim\b"}
        if story.hero.gender == story.friend.gender:
            assert not re.search(wrong[story.hero.gender], story.text), story.text


def test_the_split_is_by_key_and_keeps_its_share() -> None:
    share = sum(is_held_out(f"key {number}") for number in range(20_000)) / 20_000
    assert 0.09 < share < 0.11
    held = Draw.of(1, held_out=True)
    assert held.allows("a") != Draw.of(1).allows("a")


def test_no_training_sample_asks_an_evaluation_prompt() -> None:
    rows = prompts.evaluation_prompts()
    asked = {prompts.fingerprint(row["messages"]) for row in rows}
    assert len(asked) == len(rows) == 500
    kinds = {kind: sum(row["kind"] == kind for row in rows) for kind in prompts.KINDS}
    assert kinds == {kind: count for kind, (count, _) in prompts.KINDS.items()}
    for name in GENERATED:
        make, draw = mixture.PARTS[name].make, Draw.of(f"train test {name}")
        assert make is not None
        for _ in range(400):
            chat = make(draw).chat
            assert not chat or asked.isdisjoint(prompts.questions(chat))


def test_no_pair_of_the_evaluation_is_added_in_training() -> None:
    def pairs(held_out: bool) -> set[tuple[int, int]]:
        draw, found = Draw.of("pairs", held_out), set()
        for _ in range(20_000):
            match = re.search(r"(\d+) (?:\+|plus) (\d+)", question_of(sum_chat(draw)))
            if match:
                found.add(tuple(sorted(map(int, match.groups()))))
        return found

    held, trained = pairs(True), pairs(False)
    assert not held & trained and len(trained) > 3000 and len(held) > 300


def test_shares_of_the_mixture() -> None:
    for progress in (0.0, 0.5, 1.0):
        for row in (mixture.SHORT, mixture.LONG):
            parts = [part for part in mixture.PARTS.values() if part.row == row]
            assert sum(part.share(progress) for part in parts) == pytest.approx(0.5)


def test_thinking_comes_with_reasoning() -> None:
    draw, thinking = Draw.of(10), 0
    for _ in range(600):
        chat = mixture.finish(draw, mixture.tool_any(draw)).chat
        assert chat is not None
        text = "".join(part for part, _ in render(chat))
        empty = text.count("<think>\n\n</think>")
        blocks = text.count("<think>\n")
        assert empty == (0 if chat.thinking else blocks) and blocks
        thinking += chat.thinking
    assert 120 < thinking < 240
