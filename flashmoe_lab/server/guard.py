"""The door: who may come in, and a count of what was answered."""

import re

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashmoe_lab.server.errors import ApiError, answer_error
from flashmoe_lab.server.service import Service

_OPEN = ("/health",)
_LOCAL = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
_COUNTED = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics",
            "/openapi.json")  # fmt: skip


class Guard:
    """Middleware around the whole application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _COUNTED else "other"

        begun = False

        async def counting(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._service.metrics.request(path, message["status"])
            await send(message)

        request = Request(scope)
        if error := self._refusal(request):
            response = await answer_error(request, error)
            await response(scope, receive, counting)
            return
        try:
            await self._app(scope, receive, counting)
        except Exception:
            if not begun:  # it is answered further out
                self._service.metrics.request(path, 500)
            raise

    def _refusal(self, request: Request) -> ApiError | None:
        host = request.headers.get("host", "")
        if self._service.settings.loopback and not _LOCAL.fullmatch(host):
            # A web page could else have its own name lead here, and read what is answered.
            message = f"this server answers to the names of its machine alone, not to {host[:60]!r}"
            return ApiError(403, message, "wrong_host")
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        # Not request.url: that is put together with the Host that the client gave.
        if request.scope["path"] in _OPEN or self._service.permits(key):
            return None
        message = "the API key is missing or wrong; send Authorization: Bearer KEY"
        headers = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, message, "invalid_api_key", headers=headers)
