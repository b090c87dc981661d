"""Answers in pieces: what comes out, when, and that no cut changes it."""

import pytest

from flashmoe_lab.chat.parser import (
    Event,
    OutputParser,
    Text,
    Thinking,
    ToolCall,
    merged,
    parse,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "s": {"type": "string"},
                    "i": {"type": "integer"},
                    "b": {"type": "boolean"},
                    "l": {"type": "array"},
                    "r": {"$ref": "#/$defs/x"},
                },
                "$defs": {"x": {"type": "number"}},
            },
        },
    },
    {"name": "g", "parameters": None},
]


def call(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def in_pieces(text: str, size: int, thinking: bool = False) -> list[Event]:
    parser = OutputParser(TOOLS, thinking=thinking)
    events = [e for n in range(0, len(text), size) for e in parser.feed(text[n : n + size])]
    return merged([*events, *parser.finish()])


def read(text: str, thinking: bool = False) -> list[Event]:
    """All at once, and the same for pieces of one character and of three."""
    events = parse(text, TOOLS, thinking=thinking)
    for size in (1, 3):
        assert in_pieces(text, size, thinking) == events
    return events


def called(name: str, **arguments: object) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


def test_text_thinking_and_calls():
    text = "<think>\nHm.\n\nYes.\n</think>\n\nI look.\n\n" + call("f", i="5") + "\n" + call("g")
    assert read(text) == [
        Thinking(text="Hm.\n\nYes."), Text(text="I look."), called("f", i=5), called("g"),
    ]  # fmt: skip
    assert read("Hm.\n</think>\n\nHello\n", thinking=True) == [
        Thinking(text="Hm."), Text(text="Hello\n"),
    ]  # fmt: skip
    assert read("\n</think>\n\n" + call("g"), thinking=True) == [called("g")]
    assert [e.text for e in parse(call("g") + "\n\n" + call("g"))] == [call("g")] * 2


def test_plain_text_stays_as_it_is():
    for text in ("", " ", "\n a \n\n", "a < b </think> <think> <tool_cal", "</tool_call>", "<thin"):
        assert read(text) == ([Text(text=text)] if text else [])


def test_an_open_think_block_is_thinking_to_its_end():
    inside = "a\n" + call("g")
    assert read(inside, thinking=True) == [Thinking(text=inside)]
    assert read("<think>" + inside) == [Thinking(text=inside)]
    assert read(" \n", thinking=True) == []


def test_text_comes_as_soon_as_it_is_certain():
    parser = OutputParser(TOOLS)
    assert parser.feed("Hello") == [Text(text="Hello")]
    assert parser.feed(", you <") == [Text(text=", you")]
    assert parser.feed("b> and") == [Text(text=" <b> and")]
    assert parser.feed("\n\n<tool_call>\n<function=g>\n</function>\n</tool_cal") == []
    assert parser.feed("l>") == [called("g")]
    assert parser.feed(" bye") == [Text(text="bye")]
    assert parser.finish() == []
    parser = OutputParser(TOOLS, thinking=True)
    assert parser.feed("\nso") == [Thinking(text="so")]


@pytest.mark.parametrize(
    "value",
    ["5", "True", "null", '{"a": 1}', "", "\n", " x ", "a\n\nb", "if (a < b) {", "<div>\n</div>",
     "</", "a </parameter> b", "a </tool_call> b", "a <tool_call> b", "x </function>", "<parameter",
     "say <parameter=i>", "é\r\n🙂"],
)  # fmt: skip
def test_strings_stay_raw(value):
    assert read(call("f", s=value, i="1")) == [called("f", s=value, i=1)]
    assert read(call("unknown", x=value)) == [called("unknown", x=value)]


def test_other_values_get_their_types():
    found = read(call("f", i="-3", b="True", l='["a", {"b": null}]', r="2.5"))
    assert found == [called("f", i=-3, b=True, l=["a", {"b": None}], r=2.5)]


def test_loose_spacing_is_read_too():
    values = "<parameter=s>a</parameter> <parameter=i>\n4</parameter>"
    text = f"<tool_call><function=f>{values}</function></tool_call>"
    assert read(text) == [called("f", s="a", i=4)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>\n</tool_call>", "where <function="),
        ("<tool_call>\nhello\n</tool_call>", "it has 'h'"),
        ("<tool_call>\n<function=>\n</function>\n</tool_call>", "name"),
        ("<tool_call>\n<function=f g>\n</function>\n</tool_call>", "name"),
        ("<tool_call>\n<function=f>\nx\n</function>\n</tool_call>", "it has 'x'"),
        ("<tool_call>\n<function=f>\n</tool_call>", "where <parameter= or </function>"),
        ("<tool_call>\n<function=f>\n<parameter=s>\na\n</function>\n</tool_call>", "begins a line"),
        ("<tool_call>\n<function=f>\n<parameter=s>\na\n</parameter>\n</tool_call>", "followed by"),
        (call("f", s="a\n</parameter>\nb"), "followed by"),
        (call("f", s="a\n<parameter=i>\n5"), "begins a line"),
        (call("f", s="a") .replace("</function>", "</function>x"), "where </tool_call>"),
        (call("f", i="five"), "'five' is not of type integer"),
        (call("f", b="yes"), "boolean"),
        (call("f", l="[1"), "not JSON"),
        (call("f", i="1").replace("</function>", "<parameter=i>2</parameter></function>"), "twice"),
        ('<tool_call>{"name": "f"}</tool_call>', "keys name and arguments"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "object"),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', "text"),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN"),
        ('<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>', "twice"),
        ('<tool_call>{"name": "f", "arguments": {]}</tool_call>', "not JSON"),
        ("<tool_call>" + '{"a":' * 10000 + "</tool_call>", "deeply"),
    ],
)  # fmt: skip
def test_malformed_calls_are_text_with_a_warning(text, reason):
    good = call("g")
    before, bad, after, again, end = read("So:\n" + text + "then" + good + "x")
    assert (before, after, again, end) == (
        Text(text="So:"), Text(text="then"), called("g"), Text(text="x"),
    )  # fmt: skip
    assert isinstance(bad, Text) and bad.text == "\n" + text
    assert bad.warning.startswith("not a tool call: ") and reason in bad.warning


@pytest.mark.parametrize("wrong", [5, "x", ["s"], True])
def test_calls_of_a_schema_that_is_none_are_malformed(wrong):
    events = parse(call("f", s="a"), [{"name": "f", "parameters": {"properties": wrong}}])
    assert [type(event) for event in events] == [Text]
    assert isinstance(events[0], Text) and "should be an object" in events[0].warning


def test_cut_off_calls_are_text_with_a_warning():
    whole = "Yes.\n\n" + call("f", s="a <b>", i="5")
    for end in range(whole.index("<tool_call>") + len("<tool_call>"), len(whole)):
        yes, cut = read(whole[:end])
        assert yes == Text(text="Yes.")
        assert isinstance(cut, Text) and "Yes." + cut.text == whole[:end]
        assert cut.warning == "a tool call is cut off"


def test_nothing_within_a_malformed_call_is_called():
    inner = call("g")
    found = read(call("f", s="see:\n" + inner))
    assert not any(isinstance(event, ToolCall) for event in found)
    assert "".join(e.text for e in found) == call("f", s="see:\n" + inner)


def test_the_json_form():
    given = '{"s": "}\\"]</tool_call>", "x": [1, {}]}'
    text = f'<tool_call>\n{{"name": "f", "arguments": {given}}}\n</tool_call>'
    assert read(text) == [called("f", s='}"]</tool_call>', x=[1, {}])]
    as_text = '<tool_call>{"arguments": "{\\"i\\": 5}", "name": "f"}</tool_call>'
    assert read(as_text + as_text) == [called("f", i=5)] * 2


def test_a_long_value_takes_no_quadratic_time():
    # 2 MB in 20,000 pieces; were every piece read again, this would take minutes.
    parser = OutputParser(TOOLS)
    parser.feed("<tool_call>\n<function=f>\n<parameter=s>\n")
    for _ in range(20_000):
        assert parser.feed("x < y and so on\n" * 6) == []
    (found,) = parser.feed("\n</parameter>\n</function>\n</tool_call>")
    assert isinstance(found, ToolCall) and len(found.arguments["s"]) == 20_000 * 96
