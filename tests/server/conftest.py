"""A server on a port of its own, in front of the golden model with a tokenizer of bytes."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from starlette.applications import Starlette
from tokenizers import AddedToken, Tokenizer

import flashmoe_lab as fl
from flashmoe_lab.bundled import bundled
from flashmoe_lab.server.app import listen, make_server
from flashmoe_lab.server.service import ServerSettings, Service

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
END = 257  # <|end|>


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that runs in a thread."""

    engine: fl.Engine
    app: Starlette
    port: int

    @property
    def service(self) -> Service:
        return self.app.state.service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> OpenAI:
        """The official client; it does not try again by itself."""
        options = {"api_key": "any", "max_retries": 0, "timeout": 60, **options}
        return OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **options)

    def count(self, name: str) -> float:
        """A counter of /metrics."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return float(
            next(line for line in lines if line.startswith(f"flashmoe_{name} ")).split()[1]
        )

    def wait_until_idle(self) -> None:
        """Until nobody uses the engine or waits for it."""
        deadline = time.monotonic() + 30
        while self.service.queue.running:
            assert time.monotonic() < deadline, "something is still running"
            time.sleep(0.005)


@contextmanager
def running(engine: fl.Engine, **settings: Any) -> Iterator[Running]:
    """Serve until the `with` ends."""
    server = make_server(engine, ServerSettings(**{"name": "golden", **settings}))
    app = server.config.app
    assert isinstance(app, Starlette)
    with listen("127.0.0.1", 0) as place:
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve(sockets=[place])), daemon=True
        )
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Running(engine=engine, app=app, port=place.getsockname()[1])
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def speaking(
    packed: Callable[..., Path],
    write_tokenizer: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The golden model, packed, with a tokenizer and a chat format."""
    folder = tmp_path_factory.mktemp("speaking") / "golden"
    shutil.copytree(packed("golden/hf"), folder)
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(tag, special=True) for tag in TAGS])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = bundled("demo_model") / "chat_template.jinja"
    shutil.copy(template, folder / "chat_template.jinja")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return folder


@pytest.fixture(scope="session")
def server(speaking: Path) -> Iterator[Running]:
    """Shared by all tests that leave it as it was; its answers are greedy without `temperature`."""
    with fl.load(speaking) as engine, running(engine, longest_queue=64) as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with server.client() as found:
        yield found
