"""HTTP as uvicorn speaks it, with two bounds more: the head of a request must come in time, and a
request that is no HTTP gets an error in the API's shape.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from flashmoe_lab.server.errors import ApiError

HEAD_S = 30.0


class BoundedProtocol(H11Protocol):
    """One connection."""

    head_s = HEAD_S
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Somebody calls; now the head of a request should come."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Bytes came, perhaps the rest of a head."""
        super().data_received(data)
        self._await_head()

    def on_response_complete(self) -> None:
        """All is said; perhaps the client still sends a body that was refused."""
        super().on_response_complete()
        if self.conn.our_state is h11.DONE:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._drop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse(ApiError(400, msg, "invalid_http"))

    def _await_head(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._drop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.head_s, self._too_late)

    def _drop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        if self.conn.our_state is h11.DONE:
            self.transport.close()
        elif self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            message = f"no whole request came within {self.head_s:g} s"
            self._refuse(ApiError(408, message, "request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        events = (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
