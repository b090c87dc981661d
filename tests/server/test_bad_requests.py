"""Whatever is wrong with a request: a 4xx in the API's shape, and the server goes on."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.datastructures import URL
from starlette.requests import Request

import flashmoe_lab as fl
from flashmoe_lab.server.protocol import BoundedProtocol
from flashmoe_lab.server.service import ServerSettings
from tests.server.conftest import Running, running

CHAT = "/v1/chat/completions"
GOOD = {"model": "golden", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}

HALF = {"function": {"name": "x", "arguments": r'{"a": "\ud800"}'}}  # of a character


def asked(**changes: Any) -> dict[str, Any]:
    return {"json": {**GOOD, **changes}}


def raw(text: str | bytes, kind: str = "application/json") -> dict[str, Any]:
    return {"content": text, "headers": {"Content-Type": kind}}


def written(field: str, text: str) -> dict[str, Any]:
    """A good body but for one field, whose JSON text is given."""
    return raw(json.dumps(GOOD)[:-1] + f', "{field}": {text}}}')


def check_shape(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] and error["code"]
    return error


NOT_JSON = [
    "",
    "{",
    "nonsense",
    "{'a': 1}",
    b"\xff\xfe",
    '{"a": 1}}',
    "[" * 10_000,
    '{"a":' * 10_000,
]


@pytest.mark.parametrize("text", NOT_JSON)
def test_what_is_no_json(server: Running, text: str | bytes):
    check_shape(server.post(**raw(text)), 400)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("field", ["temperature", "max_tokens", "metadata"])
def test_numbers_that_are_none(server: Running, text: str, field: str):
    check_shape(server.post(**written(field, text)), 400)


@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"', "{}"])
def test_a_body_that_is_something_else(server: Running, text: str):
    check_shape(server.post(**raw(text)), 400)


WRONG = {
    "model": [None, 3, "other"],
    "messages": [None, [], "hi", {}, [[]], [{}], [{"role": "king"}], [{"content": "hi"}]],
    "temperature": ["1", -1, 2.1, True, [], {}],
    "top_p": ["1", 0, 1.1, False],
    "max_tokens": [0, -1, 1.5, "5", True, 2**40, 10**30],
    "max_completion_tokens": [0, "5"],
    "seed": [1.5, "1", 2**70, True],
    "stop": [3, [3], "", [""], ["a"] * 17],
    "stream": ["yes", 1],
    "stream_options": [3, {"other": 1}],
    "n": [0, 2, "1"],
    "presence_penalty": [0.5],
    "logit_bias": [{"5": 1}],
    "logprobs": [1, "true"],
    "top_logprobs": [3, 21, -1],  # the first is in range, but needs logprobs
    "tools": [
        "x",
        [3],
        [{"type": "function"}],
        [{"type": "function", "function": {"name": "a b"}}],
    ],
    "tool_choice": ["required", "other", {"type": "function", "function": {"name": "x"}}],
    "response_format": ["json", {"type": "xml"}, {"type": "json_schema"}],
    "num_experts_per_tok": [0, -1, 99, "3", 2.5],
    "top_k": [-1, 1.5],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, 1000],
    "unknown_field": [1],
    "functions": [[]],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in WRONG.items() for v in vs])
def test_wrong_values(server: Running, field: str, value: Any):
    error = check_shape(
        server.post(**asked(**{field: value})),
        404 if value == "other" and field == "model" else 400,
    )
    named = field in error["message"] or error["param"] in (field, "body")
    assert named, error


def message(**fields: Any) -> dict[str, Any]:
    return asked(messages=[{"role": "user", "content": "hi", **fields}])


@pytest.mark.parametrize(
    "request_",
    [
        message(content=3),
        message(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        message(tool_calls=[{"function": {"name": "x", "arguments": "{"}}]),
        message(tool_calls=[{"function": {"name": "x", "arguments": "[]"}}]),
        message(tool_calls=[{"function": {"name": "x", "arguments": {}}}]),
        asked(messages=[*GOOD["messages"], {"role": "assistant", "tool_calls": [HALF]}]),
        message(role="system"),
        asked(messages=[*GOOD["messages"], {"role": "system", "content": "late"}]),
        written("user", '"\\ud800"'),
        asked(tools=[{"type": "function", "function": {"name": "f"}}] * 2),
        asked(prompt="hi"),
    ],
)  # fmt: skip
def test_wrong_messages(server: Running, request_: dict[str, Any]):
    check_shape(server.post(**request_), 400)


@pytest.mark.parametrize("prompt", [None, "", [], ["a"], [1.5], [-1], [512], [10**30], {}, [[1]]])
def test_wrong_prompts(server: Running, prompt: Any):
    body = {"model": "golden", "prompt": prompt, "max_tokens": 1}
    check_shape(server.post("/v1/completions", json=body), 400)


def test_deep_schemas_and_tools(server: Running):
    deep = '{"a":' * 150 + "1" + "}" * 150
    for field, text in (
        ("tools", f'[{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]'),
        ("response_format", f'{{"type": "json_schema", "json_schema": {{"schema": {deep}}}}}'),
    ):
        assert "deeply" in check_shape(server.post(**written(field, text)), 400)["message"]


def test_tools_whose_schemas_are_none(server: Running):
    function = {"name": "f", "parameters": {"properties": ["x"]}}
    tools = [{"type": "function", "function": function}]
    error = check_shape(server.post(**asked(tools=tools, tool_choice="required")), 400)
    assert "properties are ['x']" in error["message"] and error["param"] == "tools"


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types(server: Running, kind: str):
    """A web page may send these here without asking the browser's leave."""
    check_shape(server.post(**raw(json.dumps(GOOD), kind)), 415)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb(server: Running, chunked: bool):
    size = 100_000_000

    def pieces() -> Iterator[bytes]:
        yield b'{"model": "'
        for _ in range(20):
            yield b"x" * (size // 20)

    content = pieces() if chunked else b"x" * size
    check_shape(server.post(**raw(content)), 413)  # pyright: ignore[reportArgumentType]
    assert httpx.get(server.url + "/health").json()["status"] == "ok"


def test_unknown_paths_and_methods(server: Running):
    check_shape(httpx.get(server.url + "/nothing"), 404)
    check_shape(httpx.get(server.url + CHAT), 405)
    check_shape(httpx.delete(server.url + "/v1/models"), 405)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:80", ""])
def test_other_names_of_this_machine(server: Running, host: str):
    response = httpx.get(server.url + "/v1/models", headers={"Host": host})
    check_shape(response, 403)


def conversation(port: int, *pieces: bytes) -> httpx.Response:
    """The answer to bytes on a bare connection, which is kept open."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
    head, _, body = found.partition(b"\r\n\r\n")
    kind = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-type"))
    headers = {"content-type": kind.split(b": ")[1].decode()}
    return httpx.Response(int(head.split()[1]), headers=headers, content=body)


@pytest.fixture
def hasty(speaking: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(BoundedProtocol, "head_s", 0.2)
    with fl.load(speaking) as engine, running(engine, body_seconds=0.2, api_key="k1") as found:
        yield found


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k1\r\n"


@pytest.mark.parametrize("sent", [b"", b"POST /v1/ch", HEAD])
def test_half_a_head(hasty: Running, sent: bytes):
    check_shape(conversation(hasty.port, sent), 408)


def test_half_a_body(hasty: Running):
    rest = b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n" + b'{"model'
    check_shape(conversation(hasty.port, HEAD, rest), 408)


def test_the_rest_of_a_refused_body_is_not_awaited_for_ever(hasty: Running):
    head = HEAD + b"Content-Type: application/json\r\nContent-Length: 99000000\r\n\r\n"
    check_shape(conversation(hasty.port, head), 413)  # ends when the server closes


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"x" * 99999]
)
def test_what_is_no_http(hasty: Running, sent: bytes):
    check_shape(conversation(hasty.port, sent), 400)


@pytest.mark.parametrize("key", [None, "x", "k", "k2", "k1", "K1", "k\u00e9"])
def test_api_key(hasty: Running, key: str | None):
    headers: Any = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    right = key == "k1"
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        response = httpx.get(hasty.url + path, headers=headers)
        if not right:
            check_shape(response, 401)
    assert httpx.get(hasty.url + "/health").status_code == 200
    assert httpx.get(hasty.url + "/v1/models", headers=headers).status_code == (
        200 if right else 401
    )


def test_no_name_of_the_machine_opens_a_door(hasty: Running, monkeypatch: pytest.MonkeyPatch):
    """Starlette makes a request's URL of the Host that a client gives: 0.48 gives /health as the
    path of any request to "x/health?"."""
    monkeypatch.setattr(Request, "url", URL("http://x/health?/v1/models"))
    check_shape(httpx.get(hasty.url + "/v1/models"), 401)


def test_settings():
    with pytest.raises(ValueError, match="cache_gb is inf; it must be below 1e9"):
        ServerSettings(name="x", cache_gb=float("inf"))
    with pytest.raises(ValueError, match="others than this machine could reach the server"):
        ServerSettings(name="x", loopback=False)
    with pytest.raises(ValueError, match="max_tokens is 0; it must be at least 1"):
        ServerSettings(name="x", max_tokens=0)
    assert "secret" not in repr(ServerSettings(name="x", api_key="secret"))
