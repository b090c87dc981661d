"""The chat widget over a session, and the same without widgets."""

import shutil
import time
from dataclasses import replace
from typing import Any

import pytest

import flashmoe_lab as fl
from flashmoe_lab.chat.parser import Text, Thinking, ToolCall
from flashmoe_lab.chat.session import Session
from flashmoe_lab.chat.tools import ToolResult
from flashmoe_lab.widgets import Chat, converse
from flashmoe_lab.widgets.conversation import events_html

_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def talker(forms, tmp_path):
    place = tmp_path / "talker"
    shutil.copytree(forms / "golden-4", place)
    (place / "chat_template.jinja").write_text(_TEMPLATE)
    with fl.load(place, bank_gb=0.0004) as engine:
        engine.config = replace(engine.config, eos_token_ids=())  # it answers to its length
        yield engine


@pytest.fixture
def chat(talker):
    found = Chat(talker, max_tokens=6)
    yield found
    found.session.stop()
    found._worker.wait()


def test_it_says_what_a_session_says(talker, chat):
    chat.question.value = "hello"
    chat.send_button.click()
    turn = chat.wait().turns[0]
    expected = Session(talker, max_tokens=6)
    list(expected.send("hello"))
    assert turn.text == expected.turns[0].text and turn.question == "hello"
    assert chat.question.value == "" and chat.answer.value == ""
    assert chat.status.value.count(turn.figures()) == 1
    assert not chat.send_button.disabled and chat.stop_button.disabled


def test_a_turns_record_is_one_click_away(chat):
    chat.send("hello")
    chat.wait()
    assert [name for name, _ in chat.turn.options] == ["none", "1: hello"]
    assert chat._figures.content is None
    chat.turn.value = 0
    chat.wait()
    figures: Any = chat._figures.content
    assert figures.turn is chat.session.turns[0]
    assert len(figures.traces) == 1 and len(figures.plots) == 4
    chat.turn.value = -1
    chat.wait()
    assert chat._figures.content is None


def test_stop_leaves_a_conversation_that_goes_on(talker, chat):
    chat.session.max_tokens = 800
    with talker.intercept("lm_head", lambda *_: time.sleep(0.005)):
        chat.send("hello")
        assert chat.send_button.disabled and not chat.stop_button.disabled
        chat.send("again")  # while an answer is under way
        while not any(run.tokens for turn in chat.session.turns for run in turn.runs):
            time.sleep(0.001)
        chat.stop_button.click()
        chat.wait()
    assert [turn.finish_reason for turn in chat.session.turns] == ["cancelled"]
    chat.session.max_tokens = 4
    chat.k.value = 1
    chat.send("go on")
    chat.wait()
    assert [turn.question for turn in chat.session.turns] == ["hello", "go on"]
    assert chat.session.turns[1].runs[0].num_experts_per_tok == 1


def test_an_error_is_told(chat):
    chat.send("x" * 5000)
    with pytest.raises(ValueError, match="the model was made for"):
        chat.wait()
    assert "the model was made for" in chat.status.value
    assert not chat.send_button.disabled and not chat.session.turns
    chat.send("hello")
    chat.wait()


def test_everything_said_is_escaped():
    events = [
        Thinking(text="<i>"),
        Text(text="a <b>"),
        Text(text="c"),
        ToolCall(name="f", arguments={"x": "<script>"}),
        ToolResult(name="f", content="<u>"),
    ]
    html = events_html(events)
    for tag in ("<b>", "<script>", "<u>"):
        assert tag not in html
    assert "a &lt;b&gt;c" in html and "&lt;script&gt;" in html


def test_the_same_without_widgets(talker):
    conversation = converse(talker, ["hello", "and <you>?"], max_tokens=3)
    html = conversation._repr_html_()
    assert html.count("ended by length") == 2 and "and &lt;you&gt;?" in html
    assert all(turn.runs[0].trace is not None for turn in conversation.session.turns)
