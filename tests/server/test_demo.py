"""The bundled model behind the official client: a tool call from question to answer."""

import json
from typing import Any

import pytest

import flashmoe_lab as fl
from flashmoe_lab.bundled import bundled
from tests.server.conftest import running

WEIGHTS = bundled("demo_model") / "model.safetensors.index.json"


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the weights are not here")
def test_the_demo_model_calls_a_tool_and_uses_its_result():
    functions = json.loads((bundled("prompts") / "tools.json").read_text())
    tools = [{"type": "function", "function": function} for function in functions]
    messages: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    with fl.load("demo") as engine, running(engine, name="demo") as server:
        options: Any = {"model": "demo", "tools": tools, "temperature": 0, "max_tokens": 80}
        with server.client() as client:
            first: Any = client.chat.completions.create(messages=messages, **options).choices[0]
            assert first.finish_reason == "tool_calls"
            [call] = first.message.tool_calls
            assert call.function.name == "get_weather"
            assert json.loads(call.function.arguments) == {"city": "Oslo"}
            content = '{"temperature": 17, "condition": "sunny"}'
            result = {"role": "tool", "tool_call_id": call.id, "content": content}
            messages += [first.message.model_dump(exclude_none=True), result]
            answer = client.chat.completions.create(messages=messages, **options)
    assert "17" in (answer.choices[0].message.content or "")
    details = answer.usage and answer.usage.prompt_tokens_details
    assert details and (details.cached_tokens or 0) > 100  # tools and question were known
