"""The command that answers other programs: serve."""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from flashmoe_lab.cli.options import Commands
from flashmoe_lab.cli.running import add_engine, open_engine
from flashmoe_lab.demo import DEFAULT_BITS, is_demo

_KEY = "FLASHMOE_API_KEY"


def _add_serve(commands: Commands) -> None:
    command = commands.add_parser(
        "serve", help="answer programs that speak OpenAI's protocol, over HTTP"
    )
    add_engine(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (this machine)")
    command.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    command.add_argument("--name", help="of the model, for clients (default: from its path)")
    command.add_argument(
        "--api-key-file",
        type=Path,
        help=f"file with the key that clients must send (or the environment's {_KEY})",
    )
    command.add_argument("--max-tokens", type=int, default=8192, help="of an answer, at the most")
    command.add_argument("--queue", type=int, default=32, help="requests that may wait")
    command.add_argument(
        "--cache-gb",
        type=float,
        default=1.0,
        help="memory for beginnings of prompts, in 10**9 bytes; 0 keeps none",
    )
    command.add_argument(
        "--request-seconds", type=float, default=3600.0, help="after which an answer is cut off"
    )
    command.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    from flashmoe_lab.server.app import is_loopback, listen, make_server
    from flashmoe_lab.server.service import ServerSettings

    settings = ServerSettings(
        name=options.name or _name(options),
        api_key=_api_key(options.api_key_file),
        loopback=is_loopback(options.host),
        longest_queue=options.queue,
        max_tokens=options.max_tokens,
        cache_gb=options.cache_gb,
        request_seconds=options.request_seconds,
    )
    with listen(options.host, options.port) as place, open_engine(options) as engine:
        server = make_server(engine, settings)
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http://{host}:{place.getsockname()[1]}/v1"
        print(f"{settings.name} at {url} (interrupt to end)", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[place])
    return 0


def _name(options: argparse.Namespace) -> str:
    if is_demo(options.model):
        bits = options.bits or DEFAULT_BITS
        return f"demo-{bits}bit" if bits != "none" else "demo"
    return Path(options.model).resolve().name


def _api_key(file: Path | None) -> str | None:
    """The key, if there is to be one.

    Raises:
        ValueError: the file is empty.
    """
    if file is None:
        return os.environ.get(_KEY) or None
    key = file.read_text("utf-8").strip()
    if not key:
        raise ValueError(f"{file}: is empty; it should hold the API key")
    return key


COMMANDS = (_add_serve,)
