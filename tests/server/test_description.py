"""The server's own description: schemathesis makes requests from it, and none is a 500."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

import flashmoe_lab as fl
from flashmoe_lab.server.description import description
from tests.server.conftest import Running, running

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def short(speaking: Any) -> Iterator[Running]:
    """A server whose answers are short."""
    with fl.load(speaking) as engine, running(engine, max_tokens=4) as found:
        yield found


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_no_request_makes_it_fail(short: Running, path: str, mode: GenerationMode):
    """Requests as described, and requests that are not."""
    schema = schemathesis.openapi.from_dict(description(needs_key=False))

    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=8, deadline=None, suppress_health_check=SLOW)
    def ask(case: Any) -> None:
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = "golden"  # the only one; else no request would get far
            case.body.pop("max_tokens", None)
        case.call_and_validate(base_url=short.url, checks=CHECKS)

    ask()


def test_every_path_is_described(server: Running):
    described = httpx.get(server.url + "/openapi.json").json()["paths"]
    served = {r.path.replace(":path", "") for r in server.app.routes if isinstance(r, Route)}
    assert described.keys() == served
