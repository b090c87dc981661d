"""The prompt options of commands that run a model."""

import argparse
import json
from types import SimpleNamespace
from typing import Any

import pytest

from flashmoe_lab.cli.prompt import add_prompt, prompt_of, read_tools

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}={{ m.content }}|{% endfor %}"
    "{{ (tools or []) | length }}|{{ enable_thinking }}"
)


@pytest.fixture
def ask(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    engine: Any = SimpleNamespace(checkpoint=SimpleNamespace(path=tmp_path))

    def answer(*arguments):
        parser = argparse.ArgumentParser()
        add_prompt(parser)
        return prompt_of(parser.parse_args(arguments), engine)

    return answer


def test_text_and_ids_are_taken_as_they_are(ask):
    assert ask("--prompt", "Once") == "Once"
    assert ask("--prompt-ids", "3,4") == [3, 4]


def test_a_question_goes_through_the_template(ask, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "f"}, {"type": "function", "function": {"name": "g"}}]))
    assert ask("--chat", "Hi") == "user=Hi|0|False"
    given = ask("--chat", "Hi", "--system", "Be kind", "--tools", str(tools), "--thinking")
    assert given == "system=Be kind|user=Hi|2|True"
    assert [tool["function"]["name"] for tool in read_tools(tools)] == ["f", "g"]


@pytest.mark.parametrize("text", ["{", '{"name": "f"}', "[1]"])
def test_tools_that_are_none(tmp_path, text):
    file = tmp_path / "tools.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="tools.json: (not JSON|should hold)"):
        read_tools(file)


def test_chat_options_want_chat(ask):
    with pytest.raises(ValueError, match="--system goes with --chat"):
        ask("--prompt", "x", "--system", "y")
