"""Reading a request's body: bounded in size, depth and time, and of the right form, or an error."""

import asyncio
from typing import TypeVar

import pydantic
import pydantic_core
from starlette.requests import ClientDisconnect, Request

from flashmoe_lab.chat.arguments import deeper
from flashmoe_lab.server.errors import ApiError

Model = TypeVar("Model", bound=pydantic.BaseModel)

DEEPEST = 100  # brackets within brackets; pydantic's parser alone would stop at 200
_FAULTS = 3  # that are named


async def read_body(request: Request, model: type[Model], longest: int, seconds: float) -> Model:
    """What a client asks for.

    Args:
        longest: bytes.
        seconds: within which the whole body must have come.

    Raises:
        ApiError: 400, 408, 413 or 415, with what is wrong.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps foreign web pages out: without asking, they may only send other types.
        raise ApiError(415, f"Content-Type is {kind[:60]!r}; it must be application/json", "type")
    try:
        async with asyncio.timeout(seconds):
            data = await _read(request, longest)
    except TimeoutError:
        raise ApiError(
            408,
            f"the request's body was not complete after {seconds:g} s",
            "request_timeout",
            headers={"Connection": "close"},
        ) from None
    return _parsed(data, model)


async def _read(request: Request, longest: int) -> bytes:
    error = ApiError(
        413,
        f"the request's body is too large; {longest} bytes are allowed",
        "request_too_large",
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and len(announced) < 20 and int(announced) > longest:
        raise error
    data = bytearray()
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > longest:
                raise error
    except ClientDisconnect:
        raise ApiError(400, "the request's body is cut off", "request_cut_off") from None
    return bytes(data)


def _parsed(data: bytes, model: type[Model]) -> Model:
    try:
        value = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", "invalid_json") from None
    if deeper(value, DEEPEST):
        message = f"the body is nested too deeply; {DEEPEST} levels are allowed"
        raise ApiError(400, message, "invalid_json")
    try:
        return model.model_validate(value)
    except pydantic.ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        words = [f"{_place(fault['loc'])}: {fault['msg']}" for fault in faults[:_FAULTS]]
        words += [f"and {len(faults) - _FAULTS} more"] * (len(faults) > _FAULTS)
        raise ApiError(
            400, "; ".join(words), "invalid_value", param=_place(faults[0]["loc"])
        ) from None


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location))[:200] or "body"
