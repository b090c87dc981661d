"""What went wrong with a request, in the shape in which OpenAI's API says it."""

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people; what to do about it.
        code: for programs.
        param: the field of the request that is to blame.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON object that is sent."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def unexpected(error: Exception) -> ApiError:
    """Any other error: its kind, and no more than that, for it may name what is not the client's
    business."""
    return ApiError(500, f"the server failed ({type(error).__name__})", "internal_error")


def shutting_down() -> ApiError:
    """The server ends."""
    return ApiError(503, "the server is shutting down", "shutting_down")


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """An ApiError as a response; for Starlette."""
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    """Any other error as a response."""
    return JSONResponse(unexpected(error).body, 500)


async def answer_not_found(request: Request, error: Exception) -> JSONResponse:
    """There is no such path."""
    path = request.scope["path"][:100]
    return JSONResponse(ApiError(404, f"there is no {path} here", "not_found").body, 404)


async def answer_wrong_method(request: Request, error: Exception) -> JSONResponse:
    """The path knows other methods."""
    message = f"{request.scope['path'][:100]} does not take {request.method[:20]}"
    headers = getattr(error, "headers", None)
    return JSONResponse(ApiError(405, message, "method_not_allowed").body, 405, headers)
