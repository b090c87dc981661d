"""The parts that can be tried without a server: the line, streams, addresses."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from flashmoe_lab.server import exchange
from flashmoe_lab.server.answers import Health
from flashmoe_lab.server.app import is_loopback
from flashmoe_lab.server.errors import ApiError
from flashmoe_lab.server.queue import Queue


def test_queue_goes_in_order_and_is_bounded():
    async def visit() -> list[str]:
        queue, seen = Queue(2), list[str]()

        async def come(name: str) -> None:
            with queue.enter() as place:
                await place.turn.wait()
                assert queue.running == 1
                seen.append(name)
                await asyncio.sleep(0)

        async def leave(name: str) -> None:
            with queue.enter():
                seen.append(name)

        tasks = [asyncio.create_task(come(name)) for name in "abc"]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="2 requests are waiting") as caught:
            queue.enter()
        assert caught.value.status == 429
        assert int(caught.value.headers["Retry-After"]) >= 1
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert queue.running == queue.waiting == 0
        await leave("d")
        return seen

    assert asyncio.run(visit()) == ["a", "c", "d"]


def test_queue_without_waiting():
    async def visit() -> None:
        queue = Queue(0)
        with queue.enter() as place:
            assert place.turn.is_set()
            with pytest.raises(ApiError):
                queue.enter()
        queue.enter()

    asyncio.run(visit())


class Sent:
    """What an ASGI application sends; from some message on, nobody reads."""

    def __init__(self, read: int = 99):
        self.messages: list[Message] = []
        self._read = read

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)
        if len(self.messages) > self._read:
            await asyncio.sleep(60)

    @property
    def bodies(self) -> list[str]:
        return [m["body"].decode() for m in self.messages if "body" in m]


async def pieces(*delays: float) -> AsyncGenerator[Health, None]:
    for number, delay in enumerate(delays):
        await asyncio.sleep(delay)
        yield Health(running=number, waiting=0)


def test_a_stream_that_waits_is_kept_alive(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exchange, "_KEEP_ALIVE_S", 0.02)
    sent = Sent()
    asyncio.run(exchange.EventStream(sent).send_all(pieces(0.1, 0)))
    assert sent.messages[0]["status"] == 200
    assert sent.bodies[0] == ": waiting\n\n"
    assert [body for body in sent.bodies if body[0] != ":"] == [
        'data: {"status":"ok","running":0,"waiting":0}\n\n',
        'data: {"status":"ok","running":1,"waiting":0}\n\n',
        "data: [DONE]\n\n",
    ]
    assert [m["more_body"] for m in sent.messages[1:]][-2:] == [True, False]


def test_a_client_that_does_not_read_is_gone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exchange, "_SEND_S", 0.02)
    sent = Sent(read=2)
    with pytest.raises(exchange.ClientGone):
        asyncio.run(exchange.EventStream(sent).send_all(pieces(0, 0, 0)))
    assert len(sent.bodies) == 2


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_loopback(host: str, local: bool):
    assert is_loopback(host) == local
