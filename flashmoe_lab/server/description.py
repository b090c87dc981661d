"""What the server can be asked: an OpenAPI document, made from the models that check requests."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from flashmoe_lab.server import answers
from flashmoe_lab.server.requests import ChatRequest, CompletionRequest
from flashmoe_lab.version import __version__

_PLACE = "#/components/schemas/"
_ERRORS = {
    "400": "The request cannot be met, and why.",
    "401": "The API key is missing or wrong.",
    "403": "Another name of this machine was used.",
    "404": "There is no such model.",
    "408": "The request did not come in time.",
    "413": "The request is too large.",
    "415": "The body is no application/json.",
    "429": "Too many requests wait; Retry-After says when to come again.",
    "500": "The server failed.",
    "503": "The server is shutting down.",
}
_MODELS: list[type[BaseModel]] = [
    ChatRequest,
    CompletionRequest,
    answers.ChatCompletion,
    answers.ChatChunk,
    answers.Completion,
    answers.ModelCard,
    answers.ModelList,
    answers.Health,
    answers.ErrorAnswer,
]


def description(needs_key: bool) -> dict[str, Any]:
    """The document.

    Args:
        needs_key: clients must give a key.
    """
    _, schemas = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template=_PLACE + "{model}"
    )
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "flashmoe_lab",
            "version": __version__,
            "description": "A Mixture-of-Experts model whose experts are read from the SSD, behind "
            "OpenAI's protocol.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _generates(ChatRequest, answers.ChatCompletion, "Answer a conversation")
            },
            "/v1/completions": {
                "post": _generates(CompletionRequest, answers.Completion, "Go on with a text")
            },
            "/v1/models": {"get": _gives(answers.ModelList, "The models: one")},
            "/v1/models/{model}": {
                "get": {
                    **_gives(answers.ModelCard, "One model", "404"),
                    "parameters": [_parameter("model")],
                }
            },
            "/health": {"get": _gives(answers.Health, "Whether the server is there")},
            "/metrics": {"get": _text("text/plain", "Counters, for Prometheus")},
            "/openapi.json": {"get": _text("application/json", "This document")},
        },
        "components": {"schemas": schemas["$defs"]},
    }
    if needs_key:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": _PLACE + model.__name__}}


def _failures(*codes: str) -> dict[str, Any]:
    content = {"application/json": _reference(answers.ErrorAnswer)}
    return {code: {"description": _ERRORS[code], "content": content} for code in codes}


def _generates(asked: type[BaseModel], given: type[BaseModel], about: str) -> dict[str, Any]:
    about_data = "a piece of the answer as JSON; of the last event, [DONE]"
    event = {
        "type": "object",
        "properties": {"data": {"type": "string", "description": about_data}},
    }
    stream = {"schema": event}
    content = {"application/json": _reference(given), "text/event-stream": stream}
    return {
        "summary": about,
        "requestBody": {"required": True, "content": {"application/json": _reference(asked)}},
        "responses": {
            "200": {"description": "The answer", "content": content},
            **_failures(*_ERRORS),
        },
    }


def _gives(model: type[BaseModel], about: str, *codes: str) -> dict[str, Any]:
    content = {"application/json": _reference(model)}
    answer = {"description": about, "content": content}
    return {"summary": about, "responses": {"200": answer, **_failures("401", "403", *codes)}}


def _text(kind: str, about: str) -> dict[str, Any]:
    schema = {"type": "string"} if kind == "text/plain" else {"type": "object"}
    answer = {"description": about, "content": {kind: {"schema": schema}}}
    return {"summary": about, "responses": {"200": answer, **_failures("401", "403")}}


def _parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
