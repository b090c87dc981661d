"""Many answers: every way of cutting them, mlx-lm's reading of the same calls, and nonsense."""

import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_lab.chat.parser import OutputParser, Text, Thinking, ToolCall, merged, parse
from flashmoe_lab.study.scorer import same_json

KEPT = json.loads(lzma.decompress((Path(__file__).parent / "mlx_lm_calls.json.xz").read_bytes()))
TAGS = ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>", "<think>",
        "</parameter>", "</think>", '{"name": "f", "arguments": {', "}}", "\n", " ", "<", ">",
        "é🙂", "[", '"', "\\", "5", "True", "\ud800", "\x00"]  # fmt: skip


def calls(answer: str, tools: list[Any]) -> list[dict[str, Any]]:
    found = [event for event in parse(answer, tools) if isinstance(event, ToolCall)]
    return [{"name": call.name, "arguments": call.arguments} for call in found]


def test_every_call_is_read_as_it_was_meant():
    assert len(KEPT) == 1000
    for kept in KEPT:
        assert same_json(calls(kept["text"], kept["tools"]), kept["truth"]), kept["text"]


def test_equals_mlx_lm_where_that_is_right():
    agreed = different = 0
    for kept in KEPT:
        found = calls(kept["text"], kept["tools"])
        for ours, theirs, truth in zip(found, kept["mlx_lm"], kept["truth"], strict=True):
            if same_json(theirs, truth):
                agreed += 1
                assert same_json(ours, theirs)
            else:
                different += 1
                assert same_json(ours, truth)
    # The rest: it leaves what has anyOf instead of a type as text, takes the text null for none,
    # and ends a value or a call at the first closing tag, wherever that is.
    assert agreed > 1000 and different > 50


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_no_cut_changes_the_events(data):
    kept = KEPT[data.draw(st.integers(0, 999))]
    text = data.draw(mutations(kept["text"]))
    thinking = data.draw(st.booleans())
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    assert in_pieces(text, sorted(places), kept["tools"], thinking) == parse(
        text, kept["tools"], thinking=thinking
    )


def test_one_character_at_a_time_changes_no_event():
    for kept in KEPT:
        text, tools = kept["text"], kept["tools"]
        assert in_pieces(text, list(range(len(text))), tools, False) == parse(text, tools)


@pytest.mark.slow
def test_nothing_makes_it_raise():
    draw = random.Random(1)
    for number in range(100_000):
        kept = KEPT[number % 1000]
        text = nonsense(draw) if number % 2 else mutated(draw, kept["text"])
        thinking = draw.random() < 0.2
        places = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(0, 6)))
        events = in_pieces(text, places, kept["tools"], thinking)
        # What comes out is what went in, but for the format's white space and think tags.
        assert stripped("".join(event.text for event in events)) == stripped(text)
        assert all(isinstance(event, Text | Thinking | ToolCall) for event in events)


def in_pieces(text: str, places: list[int], tools: list[Any], thinking: bool) -> list[Any]:
    parser = OutputParser(tools, thinking=thinking)
    bounds = zip([0, *places], [*places, len(text)], strict=True)
    events = [event for start, end in bounds for event in parser.feed(text[start:end])]
    return merged([*events, *parser.finish()])


def mutations(text: str) -> st.SearchStrategy[str]:
    return st.one_of(
        st.just(text), st.integers(0, 10**6).map(lambda n: mutated(random.Random(n), text))
    )


def mutated(draw: random.Random, text: str) -> str:
    for _ in range(draw.randint(1, 4)):
        start = draw.randint(0, len(text))
        end = min(len(text), start + draw.choice([0, 0, 1, 5, 30]))
        text = text[:start] + draw.choice(["", "", *TAGS]) + text[end:]
    return text


def nonsense(draw: random.Random) -> str:
    return "".join(draw.choice(TAGS) for _ in range(draw.randint(0, 40)))


def stripped(text: str) -> str:
    text, before = "".join(text.split()), ""
    while text != before:
        text, before = text.replace("<think>", "").replace("</think>", ""), text
    return text
