"""Chat templates: what they are given, where they are read from, and what the sandbox refuses."""

import json

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
