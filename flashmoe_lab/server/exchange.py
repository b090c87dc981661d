"""From a request to its answer: read, queued, generated, sent; and dropped when its client is gone.

An exchange is an ASGI application of its own, because a stream must be able to fail with a proper
status until its first piece is there, and because a client that leaves must stop the engine at
once, whether it waits, reads a prompt or generates.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from flashmoe_lab.server.body import read_body
from flashmoe_lab.server.errors import ApiError, unexpected
from flashmoe_lab.server.job import Job
from flashmoe_lab.server.queue import Place
from flashmoe_lab.server.requests import Asked
from flashmoe_lab.server.service import Service

AskedT = TypeVar("AskedT", bound=Asked)
_KEEP_ALIVE_S = 10.0
_SEND_S = 30.0  # that a client may take before it reads on
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """Nobody is there to be answered."""


class Answering(Protocol):
    """The answer to one request."""

    def job(self) -> Job:
        """What the engine is to do."""
        ...

    def chunks(self, job: Job) -> AsyncGenerator[BaseModel, None]:
        """The answer in pieces."""
        ...

    async def whole(self, job: Job) -> BaseModel:
        """The answer at once."""
        ...


class Exchange(Generic[AskedT]):
    """One path that generates.

    Args:
        model: of its requests.
        answer: makes the answer to one.
    """

    def __init__(
        self, service: Service, model: type[AskedT], answer: Callable[[Service, AskedT], Answering]
    ) -> None:
        self._service, self._model, self._answer = service, model, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One exchange, as ASGI has it."""
        settings = self._service.settings
        asked = await read_body(
            Request(scope, receive),
            self._model,
            settings.longest_body_nbytes,
            settings.body_seconds,
        )
        self._service.check_model(asked.model)
        with self._service.queue.enter() as place:
            try:
                await unless_gone(receive, self._serve(asked, place, scope, receive, send))
            except ClientGone:
                self._service.metrics.disconnect()

    async def _serve(
        self, asked: AskedT, place: Place, scope: Scope, receive: Receive, send: Send
    ) -> None:
        answer = self._answer(self._service, asked)
        job = await asyncio.to_thread(answer.job)
        self._service.begun(job)
        try:
            if asked.stream:
                await EventStream(send).send_all(_in_turn(place, answer.chunks(job)))
            else:
                await place.come()
                body = (await answer.whole(job)).model_dump_json()
                response = Response(body, media_type="application/json")
                await _in_time(response(scope, receive, send))
        finally:
            self._service.done(job)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, unless the client leaves; it has then been stopped.

    Raises:
        ClientGone: the client left.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        leaving.cancel()
        doing.cancel()
        await asyncio.wait({doing})
        if not doing.cancelled():
            doing.exception()  # it was seen


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _in_turn(
    place: Place, chunks: AsyncGenerator[BaseModel, None]
) -> AsyncGenerator[BaseModel, None]:
    await place.come()
    async with contextlib.aclosing(chunks) as pieces:
        async for piece in pieces:
            yield piece


async def _in_time(sending: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(_SEND_S):
            await sending
    except TimeoutError:
        raise ClientGone from None


class EventStream:
    """Server-sent events. It begins with the first event, or when that is long in coming."""

    def __init__(self, send: Send) -> None:
        self._send, self._begun = send, False
        self._one = asyncio.Lock()

    async def send_all(self, pieces: AsyncGenerator[BaseModel, None]) -> None:
        """Each piece as an event, and the word that ends OpenAI's streams.

        Raises:
            Exception: an error before anything was sent; a later one is an event itself.
        """
        beating = asyncio.ensure_future(self._keep_alive())
        try:
            async with contextlib.aclosing(pieces) as events:
                async for piece in events:
                    await self._put(f"data: {piece.model_dump_json()}\n\n")
            last = "data: [DONE]\n\n"
        except ClientGone:
            raise
        except Exception as error:
            if not self._begun:
                raise
            known = error if isinstance(error, ApiError) else unexpected(error)
            last = f"data: {json.dumps(known.body)}\n\n"
        finally:
            beating.cancel()
        await self._put(last, more=False)

    async def _keep_alive(self) -> None:
        with contextlib.suppress(ClientGone):  # the next piece will tell
            while True:
                await asyncio.sleep(_KEEP_ALIVE_S)
                await self._put(": waiting\n\n")

    async def _put(self, text: str, more: bool = True) -> None:
        async with self._one:
            if not self._begun:
                self._begun = True
                start: Message = {"type": "http.response.start", "status": 200}
                await self._send({**start, "headers": _STREAM_HEADERS})
            body: Message = {"type": "http.response.body", "body": text.encode()}
            await _in_time(self._send({**body, "more_body": more}))
