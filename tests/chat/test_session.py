"""Conversations with a model that says what the test wants."""

import threading
from types import SimpleNamespace

import pytest

from flashmoe_lab.chat.parser import Text, Thinking, ToolCall, merged
from flashmoe_lab.chat.tools import ToolResult
from tests.chat.scripted import CALL, session


def prompts(chat) -> list[str]:
    return chat.engine.prompts


def say(chat, text="Hi"):
    return merged(chat.send(text))


def add(a: int, b: int = 0) -> int:
    """Adds."""
    return a + b


# A conversation


def test_turns_follow_each_other():
    chat = session("Hello!", "Fine.", system="Be kind.")
    assert say(chat, "Hi") == [Text(text="Hello!")]
    assert say(chat, "How are you?") == [Text(text="Fine.")]
    assert prompts(chat) == [
        "<system>Be kind.<user>Hi<assistant>",
        "<system>Be kind.<user>Hi<assistant>Hello!<user>How are you?<assistant>",
    ]
    assert [(turn.question, turn.text, turn.finish_reason) for turn in chat.turns] == [
        ("Hi", "Hello!", "stop"),
        ("How are you?", "Fine.", "stop"),
    ]


def test_events_come_while_it_writes():
    seen = threading.Semaphore(0)
    chat = session("abc")
    chat.engine.before = lambda number: number and seen.acquire(timeout=30)
    for event, expected in zip(chat.send("Hi"), "abc", strict=True):
        assert event == Text(text=expected)
        seen.release()


def test_nothing_happens_before_the_first_event():
    chat = session("a")
    chat.send("Hi")
    assert (chat.turns, prompts(chat)) == ([], [])


def test_options_reach_the_engine():
    chat = session("a", num_experts_per_tok=2, max_tokens=7, temperature=0.5, trace="flow")
    say(chat)
    asked = chat.engine.asked[0]
    expected = dict(max_tokens=7, num_experts_per_tok=2, temperature=0.5, trace="flow")
    assert expected.items() <= asked.items()
    assert asked["cache"] is chat.cache


def test_attributes_may_change_between_turns():
    chat = session("a", "b")
    say(chat)
    chat.system, chat.num_experts_per_tok = "New.", 1
    say(chat)
    assert prompts(chat)[1].startswith("<system>New.<user>Hi")
    assert chat.engine.asked[1]["num_experts_per_tok"] == 1


def test_answers_end_with_the_context():
    chat = session("a")
    chat.engine.config = SimpleNamespace(max_position_embeddings=len("<user>Hi<assistant>") + 5)
    say(chat)
    assert chat.engine.asked[0]["max_tokens"] == 5
    chat.engine.config = SimpleNamespace(max_position_embeddings=20)
    before = chat.messages
    with pytest.raises(ValueError, match="tokens and the model was made for 20; begin a new one"):
        say(chat)
    assert chat.messages == before


def test_length_is_a_reason():
    chat = session("abcdef", max_tokens=3)
    assert say(chat) == [Text(text="abc")]
    assert chat.turns[0].finish_reason == "length"


# Editing


def test_edit_replaces_what_came_after():
    chat = session("1", "2", "3", "4")
    for question in "ABC":
        say(chat, question)
    assert merged(chat.edit(1, "X")) == [Text(text="4")]
    assert [turn.question for turn in chat.turns] == ["A", "X"]
    assert prompts(chat)[-1] == "<user>A<assistant>1<user>X<assistant>"


def test_edit_of_the_last_and_of_none():
    chat = session("1", "2")
    say(chat, "A")
    list(chat.edit(-1, "B"))
    assert [turn.question for turn in chat.turns] == ["B"]
    with pytest.raises(IndexError):
        chat.edit(1, "C")


def test_edit_that_fails_leaves_what_was():
    chat = session("1", "2", "3")
    for question in "AB":
        say(chat, question)
    chat.engine.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        list(chat.edit(0, "X"))
    assert [turn.question for turn in chat.turns] == ["A", "B"]


# Tools


def test_tools_are_run_and_it_goes_on():
    chat = session("Wait. " + CALL.format(2), "Two.", tools=[add])
    call = ToolCall(name="add", arguments={"a": 2})
    result = ToolResult(name="add", content="2")
    assert say(chat) == [Text(text="Wait."), call, result, Text(text="Two.")]
    turn = chat.turns[0]
    assert merged(turn.events) == [Text(text="Wait."), call, result, Text(text="Two.")]
    assert len(turn.runs) == 2
    assert prompts(chat)[1] == "<user>Hi<assistant>Wait.(add)<tool>2<assistant>"


def test_several_calls_in_one_answer():
    chat = session(CALL.format(1) + "\n" + CALL.format(2), "ok", tools=[add])
    kinds = [type(event) for event in say(chat)]
    assert kinds == [ToolCall, ToolCall, ToolResult, ToolResult, Text]


def test_unknown_and_failing_tools_are_told_to_the_model():
    chat = session(CALL.format("x"), "ok", tools=[add])
    assert any("a" in event.text for event in say(chat) if isinstance(event, Text))
    chat = session(CALL.format(1), "ok")
    result = next(event for event in say(chat) if isinstance(event, ToolResult))
    assert result.failed and "there is no tool add" in result.content
    assert "there is no tool add" in prompts(chat)[1]


def test_rounds_are_bounded():
    chat = session(*[CALL.format(n) for n in range(3)], "Well.", tools=[add], rounds=2)
    events = say(chat)
    assert (len(chat.turns[0].runs), chat.turns[0].finish_reason) == (3, "rounds")
    # The last call is left: nobody would read its result.
    assert [event.content for event in events if isinstance(event, ToolResult)] == ["0", "1"]
    assert say(chat, "And?") == [Text(text="Well.")]


def test_tools_in_thinking_are_not_run():
    chat = session(f"I could {CALL.format(1)}</think>No.", tools=[add], thinking=True)
    assert [type(event) for event in say(chat)] == [Thinking, Text]


# Thinking


def test_thinking_is_apart():
    chat = session("Hm.\n</think>\n\nYes.", "ok", thinking=True)
    assert say(chat) == [Thinking(text="Hm."), Text(text="Yes.")]
    assert prompts(chat)[0].endswith("<think>\n")
    assert (chat.turns[0].thinking, chat.turns[0].text) == ("Hm.", "Yes.")
    assert chat.messages[-1]["reasoning_content"] == "Hm."


# Stop sequences


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("one END two", "one "),
        ("one EN two", "one EN two"),
        ("one EN", "one EN"),
        ("EEND", "E"),
        ("a. b", "a"),
        ("a . b END", "a "),
    ],
)
def test_stop_sequences(answer, expected):
    chat = session(answer, "ok", stop_sequences=["END", "."])
    assert say(chat) == [Text(text=expected)]
    found = expected != answer
    assert chat.turns[0].finish_reason == ("stop_sequence" if found else "stop")
    assert chat.messages[-1]["content"] == expected
    assert say(chat) == [Text(text="ok")]


def test_stop_sequences_look_at_answers_alone():
    chat = session(f"a.</think>b{CALL.format(1)}", "</think>c.d", thinking=True, tools=[add])
    chat.stop_sequences = (".", "add", "<tool")
    kinds = [type(event) for event in say(chat)]
    assert kinds == [Thinking, Text, ToolCall, ToolResult, Text]
    assert chat.turns[0].text == "bc"


def test_empty_stop_sequence_is_refused():
    chat = session("a", stop_sequences=[""])
    with pytest.raises(ValueError, match="stop sequence is empty"):
        say(chat)
    assert chat.turns == []


# Stopping and failing


@pytest.mark.parametrize("after", range(1, 6))
def test_leaving_the_loop_keeps_what_was_written(after):
    chat = session("abcdef", "ok")
    events = chat.send("Hi")
    for _ in range(after):
        next(events)
    events.close()
    assert (chat.turns[0].text, chat.turns[0].finish_reason) == ("abcdef"[:after], "cancelled")
    assert say(chat, "Go on") == [Text(text="ok")]
    assert prompts(chat)[1] == f"<user>Hi<assistant>{'abcdef'[:after]}<user>Go on<assistant>"


def test_text_that_is_held_back_is_kept_too():
    chat = session("ab <tool_call>\n<fun", "ok", stop_sequences=["bcd"])
    chat.engine.before = lambda number: chat.stop() if number == 15 else None
    say(chat)
    assert chat.turns[0].finish_reason == "cancelled"
    assert "ab <tool_call>\n<f".startswith(chat.messages[-1]["content"].strip())
    assert chat.messages[-1]["content"].startswith("ab <tool_call>")


@pytest.mark.parametrize("number", range(8))
def test_stop_at_any_token(number):
    chat = session("abcdefgh", "ok")
    chat.engine.before = lambda n: chat.stop() if n == number else None
    text = "".join(event.text for event in chat.send("Hi") if isinstance(event, Text))
    assert text == "abcdefgh"[: number + 1]
    assert chat.turns[0].finish_reason == ("cancelled" if number < 8 else "stop")
    chat.engine.before = lambda n: None
    assert say(chat) == [Text(text="ok")]


def test_stop_in_thinking_before_any_word():
    chat = session("Hm hm hm", "ok", thinking=True)
    chat.engine.before = lambda n: chat.stop() if n == 4 else None
    say(chat, "A")
    assert chat.turns == []
    chat.engine.before = lambda n: None
    assert say(chat, "B") == [Thinking(text="ok")]
    assert prompts(chat)[1] == "<user>B<assistant><think>\n"


def test_stop_while_a_tool_runs():
    def slow() -> str:
        """Slow."""
        chat.stop()
        return "late"

    call = "<tool_call>\n<function=slow>\n</function>\n</tool_call>"
    chat = session(call, "ok", tools=[slow])
    assert [type(event) for event in say(chat)] == [ToolCall, ToolResult]
    assert (chat.turns[0].finish_reason, len(chat.turns[0].runs)) == ("cancelled", 1)
    assert say(chat, "B") == [Text(text="ok")]


def test_stop_before_the_run():
    """While the prompt is rendered, say."""
    chat = session("abc", "ok")
    encode = chat.engine.encode
    chat.engine.encode = lambda prompt: chat.stop() or encode(prompt)
    say(chat)
    assert (chat.turns[0].text, chat.turns[0].finish_reason) == ("a", "cancelled")
    chat.engine.encode = encode
    assert say(chat) == [Text(text="ok")]


def test_stop_without_a_turn_is_of_no_effect():
    chat = session("a")
    chat.stop()
    assert say(chat) == [Text(text="a")]


def test_interrupt_keeps_what_was_written():
    chat = session("abcdef", "ok")
    events = chat.send("Hi")
    next(events)
    with pytest.raises(KeyboardInterrupt):
        events.throw(KeyboardInterrupt)
    assert (chat.turns[0].text, chat.turns[0].finish_reason) == ("a", "cancelled")
    assert say(chat) == [Text(text="ok")]


def test_error_leaves_the_conversation_as_it_was():
    chat = session("abc", "def", "ok")
    say(chat, "A")
    chat.engine.error = ZeroDivisionError("in the engine")
    with pytest.raises(ZeroDivisionError):
        say(chat, "B")
    chat.engine.error = None
    assert len(chat.turns) == 1
    assert say(chat, "C") == [Text(text="ok")]
    assert prompts(chat)[-1] == "<user>A<assistant>abc<user>C<assistant>"


def test_one_turn_at_a_time():
    chat = session("abc", "ok")
    events = chat.send("A")
    next(events)
    with pytest.raises(RuntimeError, match="a turn is under way"):
        next(chat.send("B"))
    events.close()
    assert say(chat, "B") == [Text(text="ok")]


def test_turns_from_another_thread():
    chat, found = session("abc", "ok"), []
    thread = threading.Thread(target=lambda: found.extend(chat.send("A")))
    thread.start()
    thread.join(30)
    assert merged(found) == [Text(text="abc")]
    assert say(chat, "B") == [Text(text="ok")]


def test_turn_shows_itself():
    chat = session(f"<b>{CALL.format(1)}", "ok", tools=[add])
    say(chat, "a < b?")
    turn = chat.turns[0]
    html = turn._repr_html_()
    assert "a &lt; b?" in html and "&lt;b&gt;" in html and "add(a=1)" in html
    assert "a < b?" in repr(turn) and "prompt 0 tokens" in turn.figures()
