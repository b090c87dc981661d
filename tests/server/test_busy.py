"""Many clients at once, clients that leave, and clients that are too many."""

import logging
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from openai import OpenAI, RateLimitError

import flashmoe_lab as fl
from flashmoe_lab.server import app
from tests.server.conftest import Running, running

CLIENTS = 32


@pytest.fixture
def slow(speaking: Any) -> Iterator[Running]:
    """A server whose tokens take 20 ms and more; two may wait."""

    def wait(result: Any, path: str) -> None:
        time.sleep(0.02)

    with fl.load(speaking) as engine, engine.intercept("lm_head", wait):
        with running(engine, longest_queue=2) as found:
            yield found


def test_32_clients_get_their_own_answers(server: Running):
    """Greedy, so each answer is known; a text that got into another's stream would show."""
    prompts = [f"Client {number} says " + "abc"[number % 3] * number for number in range(CLIENTS)]
    alone = [server.engine.generate(prompt, 8).text for prompt in prompts]

    def ask(number: int) -> list[str]:
        with server.client() as client:
            found = []
            for turn in range(2):
                options: Any = {"model": "golden", "temperature": 0, "max_tokens": 8}
                options |= {"prompt": prompts[number], "stream": (number + turn) % 2 == 0}
                answer = client.completions.create(**options)
                pieces = answer if options["stream"] else [answer]
                found.append("".join(piece.choices[0].text for piece in pieces))
            return found

    with ThreadPoolExecutor(CLIENTS) as clients:
        for expected, found in zip(alone, clients.map(ask, range(CLIENTS)), strict=True):
            assert found == [expected] * 2
    server.wait_until_idle()


# The random model may end at any token; within this it cannot.
NEVER_ENDS = """, "response_format": {"type": "json_schema", "json_schema": {"schema":
    {"type": "array", "items": {"type": "integer"}, "minItems": 900}}}"""


def open_stream(
    server: Running, max_tokens: int = 3000, stream: bool = True, text: str = ""
) -> socket.socket:
    """A connection on which an answer is under way; `text` is more of the request."""
    body = f'{{"model": "golden", "prompt": "go", "max_tokens": {max_tokens}, "stream": '
    body += f'{"true" if stream else "false"}, "seed": 1{text}}}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


def test_a_disconnect_stops_the_generation_within_a_token(slow: Running):
    with open_stream(slow) as connection:
        seen = b""
        while seen.count(b"data: ") < 5:
            seen += connection.recv(65536)
    before = slow.engine.bank.counts.hits
    slow.wait_until_idle()
    idle = slow.engine.bank.counts.hits
    per_token = 3 * 4  # K times layers
    assert idle - before <= 8 * per_token  # of 3000 tokens
    time.sleep(0.1)
    assert slow.engine.bank.counts.hits == idle
    assert slow.count("disconnects_total") == 1


def test_clients_that_leave_at_any_moment_leave_nothing_running(server: Running):
    rng = random.Random(0)
    gone = server.count("disconnects_total")
    for turn in range(40):
        with open_stream(server, stream=turn % 4 > 0):
            time.sleep(rng.random() * 0.02)
    server.wait_until_idle()
    assert server.service.queue.waiting == 0
    assert server.count("disconnects_total") > gone
    assert server.engine.generate("ab", 3).finish_reason == "length"


def test_too_many_are_told_to_come_again(slow: Running):
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(open_stream(slow))
        while slow.service.queue.waiting < 2:
            time.sleep(0.005)
        client = stack.enter_context(slow.client())
        with pytest.raises(RateLimitError, match="2 requests are waiting") as caught:
            client.completions.create(model="golden", prompt="x")
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert caught.value.code == "queue_full"
        health = httpx.get(slow.url + "/health").json()
        assert health == {"status": "ok", "running": 1, "waiting": 2}
    slow.wait_until_idle()
    with slow.client() as client:
        answer = client.completions.create(model="golden", prompt="x", max_tokens=2)
    assert answer.usage and answer.usage.completion_tokens == 2


def test_an_answer_that_takes_too_long_is_cut_off(speaking: Any):
    with fl.load(speaking) as engine, running(engine, request_seconds=0.3) as server:
        options: Any = {"model": "golden", "prompt": "x", "max_tokens": 4000, "temperature": 0}
        with (
            engine.intercept("lm_head", lambda result, path: time.sleep(0.02)),
            server.client() as client,
        ):
            answer = client.completions.create(**options)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage and 0 < answer.usage.completion_tokens < 4000


def test_an_error_of_the_engine_is_told(speaking: Any):
    """Before the first token by a status, later within the stream; and the next one is answered."""
    with fl.load(speaking) as engine, running(engine) as server:
        tokens = 0

        def fail(result: Any, path: str) -> None:
            nonlocal tokens
            tokens += 1
            if tokens in (1, 5):
                raise OSError("/secret/path: the disk is gone")

        options: Any = {"model": "golden", "prompt": "x", "max_tokens": 9, "temperature": 0}
        with engine.intercept("lm_head", fail):
            first = server.post("/v1/completions", json={**options, "stream": True})
            later = server.post("/v1/completions", json={**options, "stream": True})
            again = server.post("/v1/completions", json=options)
        counted = httpx.get(server.url + "/metrics").text
        assert 'path="/v1/completions",status="500"} 1' in counted
    assert first.status_code == 500 and later.status_code == again.status_code == 200
    assert "the server failed (OSError)" in first.json()["error"]["message"]
    assert "the server failed (OSError)" in later.text.splitlines()[-2]
    assert "[DONE]" not in later.text and "secret" not in later.text + first.text


def test_the_server_ends_while_it_answers(speaking: Any):
    """`running` fails if its thread does not end."""
    with fl.load(speaking) as engine, running(engine) as server:
        connection = open_stream(server)
        connection.recv(10)
    connection.close()


def test_who_is_under_way_when_the_server_ends_is_told(
    speaking: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(app, "_FAREWELL_S", 0.1)
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    with fl.load(speaking) as engine, ExitStack() as stack:
        stack.enter_context(engine.intercept("lm_head", lambda *_: time.sleep(0.02)))
        with running(engine) as server:
            begun = stack.enter_context(open_stream(server, text=NEVER_ENDS))
            seen = begun.recv(65536)
            waiting = [
                stack.enter_context(open_stream(server, stream=stream)) for stream in (True, False)
            ]
            while server.service.queue.waiting < 2:
                time.sleep(0.005)
        told = [whole(connection) for connection in (begun, *waiting)]
        hits = engine.bank.counts.hits
        time.sleep(0.1)
        assert engine.bank.counts.hits == hits
    assert b"200 OK" in seen
    assert all(b'"code":' in each and b"shutting_down" in each for each in told)
    assert all(each.startswith(b"HTTP/1.1 503") for each in told[1:])
    assert not caplog.records


def whole(connection: socket.socket) -> bytes:
    """All that still comes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_metrics_count(server: Running, client: OpenAI):
    names = (
        "prompt_tokens_total",
        "generated_tokens_total",
        "expert_hits_total",
        "read_bytes_total",
    )
    before = {name: server.count(name) for name in names}
    options: Any = {"model": "golden", "prompt": "Hello", "max_tokens": 7, "temperature": 0}
    usage = client.completions.create(**options).usage
    after = {name: server.count(name) for name in names}
    assert usage and usage.prompt_tokens == 5
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == 5
    assert after["generated_tokens_total"] - before["generated_tokens_total"] == 7
    assert after["expert_hits_total"] > before["expert_hits_total"]
    text = httpx.get(server.url + "/metrics").text
    assert 'flashmoe_requests_total{path="/v1/completions",status="200"}' in text
    assert "flashmoe_running 0" in text and "flashmoe_waiting 0" in text
