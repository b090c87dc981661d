"""The command that talks: chat."""

import argparse
import os
import runpy
import sys
from collections.abc import Callable
from inspect import isfunction
from pathlib import Path
from typing import Any

from flashmoe_lab.chat.commands import Commands as ChatCommands
from flashmoe_lab.chat.prefix_cache import PrefixCache
from flashmoe_lab.chat.session import Session
from flashmoe_lab.chat.terminal import TerminalChat
from flashmoe_lab.cli.options import Commands, demo_bits
from flashmoe_lab.cli.running import add_engine, add_sampling, open_engine, run_options
from flashmoe_lab.cli.terminal import show_prefill
from flashmoe_lab.engine import Engine
from flashmoe_lab.user_cache import make_directory, user_cache_directory

_HISTORY = "chat_history"


def _add_chat(commands: Commands) -> None:
    command = commands.add_parser("chat", help="talk to a model in the terminal; /help says how")
    add_engine(command)
    command.add_argument("--max-tokens", type=int, default=1024, help="of one answer")
    add_sampling(command)
    command.add_argument("--system", default="", help="what the model is told first")
    command.add_argument("--thinking", action="store_true", help="let the model think first")
    command.add_argument(
        "--thinking-budget", type=int, metavar="N", help="tokens that it may think for"
    )
    command.add_argument("--stop", action="append", default=[], help="text that ends an answer")
    command.add_argument(
        "--tools", type=Path, help="a Python file whose functions the model may call"
    )
    command.add_argument(
        "--cache-gb",
        type=float,
        default=2.0,
        help="memory for what was read before, in 10**9 bytes (default 2)",
    )
    command.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> int:
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    tools = functions_of(options.tools)
    if not 1e-9 <= options.cache_gb < 1e9:
        raise ValueError(f"--cache-gb is {options.cache_gb}; it must be above 0 and below 1e9")
    session = Session(
        open_engine(options),
        system=options.system,
        tools=tools,
        thinking=options.thinking or options.thinking_budget is not None,
        thinking_budget=options.thinking_budget,
        stop_sequences=options.stop,
        cache=PrefixCache(round(options.cache_gb * 1e9)),
        progress=show_prefill if sys.stderr.isatty() else None,
        **run_options(options),
    )

    def reopen(bits: str) -> Engine:
        try:
            options.bits = demo_bits(bits)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"bits are {error}") from None
        return open_engine(options)

    commands = ChatCommands(session, reopen)
    read = _reader(commands, Path(options.model).name) if typed else _piped
    try:
        TerminalChat(commands, read, _writer()).run()
    finally:
        commands.session.engine.close()
    return 0


def functions_of(file: Path | None) -> list[Callable[..., Any]]:
    """The functions that a Python file defines, but for those whose names begin with _."""
    if file is None:
        return []
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    found = runpy.run_path(str(file), run_name="tools")
    made = [value for name, value in found.items() if isfunction(value) and name[0] != "_"]
    return [function for function in made if function.__module__ == "tools"]


def _reader(commands: ChatCommands, name: str) -> Callable[[], str]:
    from flashmoe_lab.chat.lines import TypedLines

    def status() -> str:
        session = commands.session
        engine = session.engine
        k = session.num_experts_per_tok or engine.num_experts_per_tok
        thinking = "on" if session.thinking else "off"
        return (
            f" {name}  experts {engine.checkpoint.label}  K={k}  "
            f"thinking {thinking}  {len(session.turns)} turns  /help"
        )

    history = make_directory(user_cache_directory()) / _HISTORY
    return TypedLines(commands.table, status, history).read


def _piped() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _writer() -> Callable[[str, bool], None]:
    """Text goes out at once; what is beside the answer is dim where there is a screen."""
    dim = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def write(text: str, beside: bool) -> None:
        print(f"\x1b[2m{text}\x1b[0m" if dim and beside else text, end="", flush=True)

    return write


COMMANDS = (_add_chat,)
