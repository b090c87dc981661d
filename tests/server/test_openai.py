"""The official client, unmodified: it chats, streams, calls tools and gets JSON."""

import json
from typing import Any

import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from flashmoe_lab.bundled import bundled
from flashmoe_lab.chat.template import ChatTemplate
from tests.server.conftest import Running

MESSAGES: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"model": "golden", "temperature": 0, "max_tokens": 20}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "set_lamp",
            "description": "Switch a lamp",
            "parameters": {
                "type": "object",
                "properties": {
                    "room": {"type": "string", "enum": ["hall", "kitchen"]},
                    "on": {"type": "boolean"},
                    "level": {"type": "integer", "minimum": 0, "maximum": 9},
                },
                "required": ["room", "on", "level"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Anna", "Bert"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def streamed(chunks: Any) -> tuple[str, list[Any], Any]:
    """The text, the chunks and the usage of a stream."""
    chunks = list(chunks)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    return text, chunks, chunks[-1].usage


def best_logprob(server: Running, ids: list[int], k: int | None = None) -> float:
    """Of the token that follows."""
    logits = server.engine.logits(ids, k)[-1][: server.service.tokenizer.size].astype(float)
    return logits.max() - np.log(np.exp(logits).sum())


def test_answer_is_the_engines(server: Running, client: OpenAI):
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    template = ChatTemplate.read(bundled("demo_model"))
    prompt = template.render(MESSAGES, enable_thinking=False)
    alone = server.engine.generate(prompt, 20)
    choice, usage = answer.choices[0], answer.usage
    assert choice.message.content == alone.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.model == "golden"
    assert usage and usage.completion_tokens == 20
    assert usage.prompt_tokens == len(server.engine.encode(prompt))
    assert usage.total_tokens == usage.prompt_tokens + 20


def test_stream_is_the_same_answer_piece_by_piece(client: OpenAI):
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    text, chunks, usage = streamed(
        client.chat.completions.create(messages=MESSAGES, **options, **GREEDY)
    )
    assert text == whole.choices[0].message.content
    assert len(chunks) > 10
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert whole.usage and usage.completion_tokens == whole.usage.completion_tokens


def test_stream_without_usage_has_none(client: OpenAI):
    _, chunks, usage = streamed(
        client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
    )
    assert usage is None and all(chunk.choices for chunk in chunks)


def test_usage_tells_what_streaming_cost(server: Running, client: OpenAI):
    """The second time, the prompt's beginning is known; the whole model is in the bank by then."""
    question: Any = [{"role": "system", "content": "Count the reads."}, *MESSAGES[1:]]
    first = client.chat.completions.create(messages=question, **GREEDY).usage
    before = server.count("cached_tokens_total")
    second = client.chat.completions.create(messages=question, **GREEDY).usage
    assert first and second and second.prompt_tokens_details
    assert 0 < (second.prompt_tokens_details.cached_tokens or 0) < second.prompt_tokens
    assert (
        server.count("cached_tokens_total") - before == second.prompt_tokens_details.cached_tokens
    )
    costs: Any = second.model_extra
    assert costs["read_nbytes"] == 0
    assert costs["hit_rate"] == 1.0


def test_k_of_one_request_is_named_where_it_is_lossy(server: Running, client: OpenAI):
    own = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    fewer = client.chat.completions.create(
        messages=MESSAGES, extra_body={"num_experts_per_tok": 1}, **GREEDY
    )
    assert own.model_extra and own.model_extra["lossy"] == []
    assert fewer.model_extra and fewer.model_extra["lossy"] == ["K=1 of the model's 3"]
    ids, probable = server.engine.encode("Hello"), list[float]()
    for k in (1, 3):
        choice = client.completions.create(
            prompt=ids, logprobs=0, extra_body={"num_experts_per_tok": k}, **GREEDY
        ).choices[0]
        assert choice.logprobs and choice.logprobs.token_logprobs
        probable += choice.logprobs.token_logprobs[:1]
        assert probable[-1] == pytest.approx(best_logprob(server, ids, k), abs=1e-5)
    assert probable[0] != pytest.approx(probable[1], abs=1e-3)
    with pytest.raises(BadRequestError, match="num_experts_per_tok is 99"):
        client.chat.completions.create(
            messages=MESSAGES, extra_body={"num_experts_per_tok": 99}, **GREEDY
        )


def test_seed_and_temperature(client: OpenAI):
    def said(seed: int) -> str | None:
        options = {**GREEDY, "temperature": 1.5, "seed": seed}
        return (
            client.chat.completions.create(messages=MESSAGES, **options).choices[0].message.content
        )

    assert said(1) == said(1)
    assert said(1) != said(2)
    assert said(-1) != said(1)  # OpenAI allows negative ones


def test_stop_sequence_ends_the_answer(client: OpenAI):
    text = client.completions.create(prompt="Hello", **GREEDY).choices[0].text
    stop = text[9:12]
    for options in ({"stop": stop}, {"stop": ["never seen", stop]}):
        choice = client.completions.create(prompt="Hello", **options, **GREEDY).choices[0]
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"


def test_stop_sequence_ends_a_chat(client: OpenAI):
    options: Any = {"messages": MESSAGES, **GREEDY}
    text = client.chat.completions.create(**options).choices[0].message.content or ""
    stop = text[7:9]
    choice = client.chat.completions.create(stop=stop, **options).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    pieces, chunks, _ = streamed(client.chat.completions.create(stop=stop, stream=True, **options))
    assert pieces == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_completion_streams_and_goes_on_from_ids(server: Running, client: OpenAI):
    whole = client.completions.create(prompt="Hello", **GREEDY)
    ids = client.completions.create(prompt=server.engine.encode("Hello"), **GREEDY)
    pieces = list(client.completions.create(prompt="Hello", stream=True, **GREEDY))
    assert whole.choices[0].text == server.engine.generate("Hello", 20).text
    assert ids.choices[0].text == whole.choices[0].text
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == "length"


def test_logprobs_are_the_models(server: Running, client: OpenAI):
    options: Any = {"logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(messages=MESSAGES, **options, **GREEDY)
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    found = answer.choices[0].logprobs.content
    assert len(found) == 20
    for token in found:
        best = [top.logprob for top in token.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        assert token.logprob == best[0]  # greedy
    written = b"".join(bytes(token.bytes or []) for token in found)
    assert written.decode("utf-8", "replace") == answer.choices[0].message.content

    chunks = client.chat.completions.create(messages=MESSAGES, stream=True, **options, **GREEDY)
    each = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    assert [t.logprob for one in each for t in one.content or []] == [t.logprob for t in found]


def test_logprobs_of_completions(server: Running, client: OpenAI):
    ids = server.engine.encode("Hello")
    choice = client.completions.create(prompt=ids, logprobs=2, **GREEDY).choices[0]
    assert choice.logprobs and choice.logprobs.token_logprobs and choice.logprobs.text_offset
    assert choice.logprobs.token_logprobs[0] == pytest.approx(best_logprob(server, ids), abs=1e-5)
    assert len(choice.logprobs.tokens or []) == 20
    assert choice.logprobs.text_offset[0] == 0
    # What may begin a stop sequence is held back, and moves no token.
    text = choice.text
    held = next(at for at in range(1, 10) if len(text[at : at + 2].encode()) == 2)
    stop = text[held : held + 2] + "\n\n\n"
    for stream in (False, True):
        options: Any = {**GREEDY, "stop": stop, "stream": stream}
        found = client.completions.create(prompt=ids, logprobs=2, **options)
        logprobs = [c.choices[0].logprobs for c in (found if stream else [found])]
        offsets = [at for each in logprobs if each for at in each.text_offset or []]
        assert offsets == choice.logprobs.text_offset


def test_a_template_says_what_is_wrong_and_not_where_it_lies(server: Running):
    body = {"model": "golden", "messages": [{"role": "system", "content": "x"}]}
    error = server.post(json=body).json()["error"]
    assert error["message"] == "messages has no user message"


@pytest.mark.parametrize("stream", [False, True])
def test_required_tool_is_called_with_arguments_of_its_types(client: OpenAI, stream: bool):
    """A model of random weights, so it is the constraint that makes it one."""
    options = {**GREEDY, "max_tokens": 400, "temperature": 1.0, "seed": 4}
    asked: Any = {"messages": MESSAGES, "tools": TOOLS, **options}
    choice: Any = {"type": "function", "function": {"name": "set_lamp"}}
    asked |= {"tool_choice": choice, "parallel_tool_calls": False}
    if stream:
        chunks = list(client.chat.completions.create(stream=True, **asked))
        calls: list[Any] = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = client.chat.completions.create(**asked).choices[0]
        calls, reason = list(answer.message.tool_calls or []), answer.finish_reason
        assert answer.message.content is None
    assert reason == "tool_calls"
    assert [call.function.name for call in calls] == ["set_lamp"]
    arguments = json.loads(calls[0].function.arguments)
    assert arguments["room"] in ("hall", "kitchen")
    assert isinstance(arguments["on"], bool) and 0 <= arguments["level"] <= 9


def test_a_call_and_its_result_go_back_to_the_model(server: Running, client: OpenAI):
    call = {"name": "set_lamp", "arguments": '{"room": "hall", "on": true, "level": 3}'}
    turns: Any = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    answer = client.chat.completions.create(messages=turns, tools=TOOLS, **GREEDY)
    template = ChatTemplate.read(bundled("demo_model"))
    offered = [{**tool, "function": {"description": "", **tool["function"]}} for tool in TOOLS]
    prompt = template.render(turns, offered, enable_thinking=False)
    assert answer.usage and answer.usage.prompt_tokens == len(server.engine.encode(prompt))
    assert answer.choices[0].message.content == server.engine.generate(prompt, 20).text


def test_tools_that_must_not_be_called_are_not_told_of(client: OpenAI):
    without = client.chat.completions.create(messages=MESSAGES, **GREEDY).usage
    none = client.chat.completions.create(
        messages=MESSAGES, tools=TOOLS, tool_choice="none", **GREEDY
    ).usage
    assert none and without and none.prompt_tokens == without.prompt_tokens


@pytest.mark.parametrize("seed", range(3))
def test_json_schema(client: OpenAI, seed: int):
    format: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    options = {**GREEDY, "max_tokens": 400, "temperature": 1.5, "seed": seed}
    answer = client.chat.completions.create(messages=MESSAGES, response_format=format, **options)
    value = json.loads(answer.choices[0].message.content or "")
    assert value.keys() == {"name", "age"} and value["name"] in ("Anna", "Bert")
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", [2, 10, 50])
def test_json_object_is_complete_whatever_the_limit(client: OpenAI, max_tokens: int):
    options = {**GREEDY, "temperature": 1.0, "seed": 0, "max_tokens": max_tokens}
    answer = client.chat.completions.create(
        messages=MESSAGES, response_format={"type": "json_object"}, **options
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_json_after_thinking(client: OpenAI):
    """Random weights do not end their thinking, so it is ended while there is room for the JSON;
    the answer says that it is not all that the model would have written."""
    format: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    options = {**GREEDY, "max_tokens": 250}
    choice = client.chat.completions.create(
        messages=MESSAGES, response_format=format, extra_body={"enable_thinking": True}, **options
    ).choices[0]
    assert json.loads(choice.message.content or "").keys() == {"name", "age"}
    assert choice.finish_reason == "length"
    assert choice.message.model_extra and choice.message.model_extra["reasoning_content"]


def test_a_schema_that_cannot_be_kept_is_refused(client: OpenAI):
    format: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(BadRequestError, match="the JSON schema cannot be used"):
        client.chat.completions.create(messages=MESSAGES, response_format=format, **GREEDY)


def test_errors_are_the_clients_own(client: OpenAI):
    with pytest.raises(NotFoundError, match="there is no model 'other'"):
        client.chat.completions.create(messages=MESSAGES, **{**GREEDY, "model": "other"})
    with pytest.raises(BadRequestError, match="4096 together") as caught:
        client.chat.completions.create(messages=MESSAGES, **{**GREEDY, "max_tokens": 4096})
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(BadRequestError, match="has no user message"):
        client.chat.completions.create(messages=MESSAGES[:1], **GREEDY)


def test_models(client: OpenAI):
    assert [model.id for model in client.models.list()] == ["golden"]
    assert client.models.retrieve("golden").id == "golden"
    with pytest.raises(NotFoundError, match="there is no model 'a/b'"):
        client.models.retrieve("a/b")
