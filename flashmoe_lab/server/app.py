"""The server put together: paths, errors, and running it."""

import asyncio
import contextlib
import ipaddress
import socket

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from flashmoe_lab.engine import Engine
from flashmoe_lab.server import errors, metrics
from flashmoe_lab.server.answers import Health, ModelList
from flashmoe_lab.server.chat import ChatAnswer
from flashmoe_lab.server.completion import CompletionAnswer
from flashmoe_lab.server.description import description
from flashmoe_lab.server.exchange import Exchange
from flashmoe_lab.server.guard import Guard
from flashmoe_lab.server.protocol import BoundedProtocol
from flashmoe_lab.server.requests import ChatRequest, CompletionRequest
from flashmoe_lab.server.service import ServerSettings, Service

_FAREWELL_S = 3  # that answers under way may take when the server ends; then they are stopped
_STOP_S = 5  # that stopping may take, and telling the clients


def make_app(engine: Engine, settings: ServerSettings) -> Starlette:
    """The application that answers for an engine; `app.state.service` is what is behind it."""
    service = Service(engine, settings)
    document = description(needs_key=settings.api_key is not None)

    async def models(request: Request) -> Response:
        return JSONResponse(ModelList(data=[service.card]).model_dump())

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["model"])
        return JSONResponse(service.card.model_dump())

    async def health(request: Request) -> Response:
        queue = service.queue
        return JSONResponse(Health(running=queue.running, waiting=queue.waiting).model_dump())

    async def counters(request: Request) -> Response:
        queue, cache = service.queue, service.cache
        text = service.metrics.text(
            running=queue.running,
            waiting=queue.waiting,
            cached_prefix_bytes=cache.nbytes if cache else 0,
        )
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    async def openapi(request: Request) -> Response:
        return JSONResponse(document)

    chat = Exchange(service, ChatRequest, ChatAnswer)
    completion = Exchange(service, CompletionRequest, CompletionAnswer)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", model),
            Route("/health", health),
            Route("/metrics", counters),
            Route("/openapi.json", openapi),
        ],
        middleware=[Middleware(Guard, service=service)],
        exception_handlers={
            errors.ApiError: errors.answer_error,
            404: errors.answer_not_found,
            405: errors.answer_wrong_method,
            Exception: errors.answer_unexpected,
        },
    )
    app.state.service = service
    return app


class Server(uvicorn.Server):
    """Stops what is under way at its end, while the clients can still be told."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        timer = asyncio.get_running_loop().call_later(_FAREWELL_S, self._service.end)
        await super().shutdown(sockets)
        timer.cancel()


def make_server(engine: Engine, settings: ServerSettings) -> Server:
    """For `run`, `serve(sockets)` and `should_exit` of uvicorn."""
    app = make_app(engine, settings)
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_FAREWELL_S + _STOP_S,
    )
    return Server(config, app.state.service)


def listen(host: str, port: int) -> socket.socket:
    """A socket at which to be called.

    Raises:
        ValueError: there is no such port.
        OSError: naming the address, which may be taken.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; it must be between 0 and 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port} ({error.strerror or error})") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound there."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
