"""Chat templates: what they are given, where they are read from, and what the sandbox refuses."""

import json
from datetime import datetime

import pytest

from flashmoe_lab.chat.template import ChatTemplate

SAY = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
QUESTION = [{"role": "user", "content": "Hi <b>"}]


def test_renders_messages_and_variables():
    template = ChatTemplate(SAY + "{% if add_generation_prompt %}>{% endif %}{{ mood }}")
    assert template.render(QUESTION, mood="!") == "user: Hi <b>\n>!"
    assert template.render(QUESTION, add_generation_prompt=False) == "user: Hi <b>\n"


def test_tools_are_absent_or_a_list():
    template = ChatTemplate(
        "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    )
    assert template.render(QUESTION) == ""
    assert template.render(QUESTION, [{"name": "größe<>"}]) == '{"name": "größe<>"}'


def test_arguments_given_as_json_text_are_parsed():
    template = ChatTemplate(
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}"
        "{% endfor %}{% endfor %}"
    )
    call = {"function": {"name": "f", "arguments": json.dumps({"a": 1, "b": "x"})}}
    assert template.render([{"role": "assistant", "tool_calls": [call]}]) == "a=1;b=x;"
    assert call["function"]["arguments"] == '{"a": 1, "b": "x"}'  # the caller's is left alone
    with pytest.raises(ValueError, match="arguments of the call of f are not JSON"):
        template.render([{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "{"}}]}])  # fmt: skip


def test_what_the_template_objects_to_is_a_value_error():
    template = ChatTemplate("{{ raise_exception('no user') }}", "here.jinja")
    with pytest.raises(ValueError, match="^here.jinja: no user$"):
        template.render(QUESTION)
    with pytest.raises(ValueError, match="not a template"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append({'role': 'user'}) }}",
    ],
)
def test_the_sandbox_lets_nothing_out_and_changes_nothing(attack):
    with pytest.raises(ValueError, match="unsafe|not safely|undefined|access"):
        ChatTemplate(attack).render(QUESTION)


def test_is_read_from_either_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no chat format"):
        ChatTemplate.read(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "A"}))
    assert ChatTemplate.read(tmp_path).render(QUESTION) == "A"
    (tmp_path / "chat_template.jinja").write_text("B")
    assert ChatTemplate.read(tmp_path).render(QUESTION) == "B"


def test_special_tokens_come_with_the_template(tmp_path):
    settings = {
        "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "pad_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTemplate.read(tmp_path).render(QUESTION) == "<s></s>"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    assert ChatTemplate.read(tmp_path).render(QUESTION) == "</s>"
    assert ChatTemplate.read(tmp_path).render(QUESTION, eos_token="x") == "x"


def test_the_clock_is_the_callers():
    template = ChatTemplate("{{ strftime_now('%d %B %Y') }}", now=lambda: datetime(2026, 3, 5))
    assert template.render(QUESTION) == "05 March 2026"


def test_reasoning_is_known_by_its_other_names_too():
    template = ChatTemplate("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}")
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert template.render([{"role": "assistant", name: "why"}]) == "whywhy"
    assert template.render([{"role": "assistant", "reasoning": None}]) == ""


def test_none_is_as_if_it_were_not_there():
    template = ChatTemplate("{{ 'content' in messages[0] }}")
    assert template.render([{"role": "assistant", "content": None}]) == "False"


@pytest.mark.parametrize("arguments", ["[1]", "5", "null", "{", "[" * 9999])
def test_arguments_that_are_no_object_are_refused(arguments):
    call = {"name": "f", "arguments": arguments}
    with pytest.raises(ValueError, match="arguments of the call of f"):
        ChatTemplate(SAY).render([{"role": "assistant", "tool_calls": [call]}])


def test_a_template_sees_plain_data_only():
    template = ChatTemplate("{{ thing }}")

    class Loud(str):
        def __str__(self) -> str:
            raise AssertionError("a method of ours was called")

    assert template.render(QUESTION, thing=Loud("a")) == "a"
    assert template.render(QUESTION, thing=(1, 2)) == "[1, 2]"
    for thing in (print, object(), {1, 2}, b"x", {"a": [datetime]}):
        with pytest.raises(ValueError, match="should hold text, numbers"):
            template.render(QUESTION, thing=thing)
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        template.render(QUESTION, thing=deep)
    with pytest.raises(ValueError, match="a message should be a dictionary"):
        template.render(["hello"])  # pyright: ignore


def test_templates_render_in_several_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    template = ChatTemplate(SAY)
    chats = [[{"role": "user", "content": str(n) * 50}] * 20 for n in range(64)]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(template.render, chats))
    assert texts == [template.render(chat) for chat in chats]
