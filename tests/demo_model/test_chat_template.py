"""chat_template.jinja renders what chat_format.render does, and what the family's users expect."""

# pyright: reportMissingImports=false
import json
from collections.abc import Callable
from typing import Any

import pytest

from data.demo_model.training import mixture
from data.demo_model.training.chat_format import Chat, render, render_prompt, schema
from data.demo_model.training.draw import Draw
from data.demo_model.training.tokenizer import TEMPLATE

jinja2 = pytest.importorskip("jinja2")

Render = Callable[..., str]


@pytest.fixture(scope="module")
def template() -> Render:
    """The template in the environment that transformers and mlx-lm give it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(text: str) -> None:
        raise jinja2.TemplateError(text)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = fail
    return environment.from_string(TEMPLATE.read_text("utf-8")).render


def as_given(chat: Chat) -> dict[str, Any]:
    messages = chat.messages
    if not chat.thinking:
        messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
    return {"messages": messages, "tools": [schema(tool) for tool in chat.tools] or None}


@pytest.mark.parametrize("name", [n for n, p in mixture.PARTS.items() if p.make and n != "tales"])
def test_generated_chats_render_as_the_template_does(template: Render, name: str) -> None:
    make, draw = mixture.PARTS[name].make, Draw.of("template")
    assert make is not None
    for _ in range(60):
        chat = make(draw).chat
        assert chat is not None
        assert template(**as_given(chat)) == "".join(text for text, _ in render(chat))


def test_prompts_render_as_the_template_does(template: Render) -> None:
    draw = Draw.of("prompt")
    for _ in range(50):
        chat = mixture.tool_any(draw)
        chat.thinking = False
        given = as_given(Chat(kind="", messages=chat.prompt(), tools=chat.tools))
        off = template(**given, add_generation_prompt=True, enable_thinking=False)
        assert off == render_prompt(chat.prompt(), chat.tools)
        on = template(**given, add_generation_prompt=True, enable_thinking=True)
        assert on == render_prompt(chat.prompt(), chat.tools, thinking=True)
        assert on == template(**given, add_generation_prompt=True)


def test_reasoning_shows_only_after_the_last_question(template: Render) -> None:
    answer = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nBecause."}
    asked = {"role": "user", "content": "Why?"}
    assert template(messages=[asked, answer]).endswith(
        "<think>\nwhy\n</think>\n\nBecause.<|im_end|>\n"
    )
    twice = template(messages=[asked, answer, asked, answer])
    assert twice.count("why") == 1 and "assistant\nBecause." in twice


def test_content_may_be_a_list_of_parts(template: Render) -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
    assert template(messages=[{"role": "user", "content": parts}]) == (
        "<|im_start|>user\nHello you<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "empty"),
        ([{"role": "system", "content": "x"}], "no user"),
        (
            [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
            "must be the first",
        ),
        ([{"role": "user", "content": "x"}, {"role": "developer", "content": "y"}], "developer"),
    ],
)
def test_wrong_chats_are_errors(template: Render, messages: list[Any], error: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=error):
        template(messages=messages)


def test_mlx_lm_finds_the_tool_parser() -> None:
    assert r"<tool_call>\n<function=" in TEMPLATE.read_text("utf-8")
