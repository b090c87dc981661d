"""200 conversations render as transformers renders them; make_fixtures.py made the answers."""

import hashlib
import json
import lzma
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from flashmoe_lab.chat.template import ChatTemplate

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEPT = json.loads(lzma.decompress((HERE / "renderings.json.xz").read_bytes()))
# A folder with the other templates, such as llama.cpp's models/templates.
MORE = os.environ.get("FLASHMOE_CHAT_TEMPLATES")


def rendered(file: Path) -> list[dict[str, str]]:
    now = datetime.fromisoformat(KEPT["now"])
    text = file.read_text("utf-8")
    template = ChatTemplate(text, "t", special_tokens=KEPT["tokens"], now=lambda: now)
    answers = []
    for number, given in enumerate(KEPT["conversations"]):
        given = {**given, "tools": given["tools"] or ()}
        try:
            answers.append({"text": template.render(**as_sent(given, number % 2 == 1))})
        except ValueError as error:
            answers.append({"error": str(error).removeprefix("t: ")})
    return answers


def as_sent(given: dict[str, Any], as_json: bool) -> dict[str, Any]:
    """Arguments as JSON text, as OpenAI's clients send them, for every other conversation."""
    messages = json.loads(json.dumps(given["messages"]))
    for call in (c for m in messages for c in m.get("tool_calls") or [] if as_json):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return {**given, "messages": messages}


@pytest.mark.parametrize("name", KEPT["answers"])
def test_renders_as_transformers_does(name: str) -> None:
    wanted = KEPT["answers"][name]
    found = rendered(ROOT / name)
    assert len(wanted) == len(found) == 200
    for one, other in zip(found, wanted, strict=True):
        assert one.get("text") == other.get("text")
    if name.startswith("data/"):  # our own template has one wording of each error
        for one, other in zip(found, wanted, strict=True):
            assert one.get("error", "")[:100] == other.get("error", "")


def test_the_conversations_are_of_all_kinds() -> None:
    messages = [m for given in KEPT["conversations"] for m in given["messages"]]
    assert {m["role"] for m in messages} == {"system", "user", "assistant", "tool"}
    assert any(len(m.get("tool_calls") or []) > 1 for m in messages)
    assert any(m.get("reasoning_content") for m in messages)
    assert any(m["content"] == "" for m in messages)
    assert {given.get("enable_thinking") for given in KEPT["conversations"]} == {True, False, None}
    for answers in KEPT["answers"].values():
        assert sum("text" in answer for answer in answers) > 100  # few of them are errors


@pytest.mark.parametrize("name", KEPT["hashes"] if MORE else [])
def test_other_templates_render_as_transformers_does(name: str) -> None:
    file, kept = Path(MORE or "") / name, KEPT["hashes"][name]
    if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != kept["sha256"]:
        pytest.skip(f"{name} is not there, or is another version")
    texts = [answer.get("text", "error") for answer in rendered(file)]
    assert [hashlib.sha256(text.encode()).hexdigest()[:8] for text in texts] == kept["of"]
