"""The prompt of a command that runs a model: text, token ids, or a question in chat format."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flashmoe_lab.chat.template import ChatTemplate
from flashmoe_lab.cli.options import ids
from flashmoe_lab.engine import Engine


def add_prompt(command: argparse.ArgumentParser) -> None:
    """What to generate from."""
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to go on from; - reads standard input")
    prompt.add_argument("--prompt-ids", type=ids, help="the same as token ids: 1,2,3")
    prompt.add_argument("--chat", metavar="QUESTION", help="a question, put into the chat format")
    command.add_argument("--system", help="with --chat: what the assistant is told first")
    command.add_argument(
        "--tools", type=Path, help="with --chat: a JSON file with a list of function schemas"
    )
    command.add_argument(
        "--thinking", action="store_true", help="with --chat: let the model think first"
    )


def prompt_of(options: argparse.Namespace, engine: Engine) -> str | list[int]:
    """The prompt that `add_prompt`'s options ask for.

    Raises:
        FileNotFoundError, ValueError: the tools or the chat template cannot be read.
    """
    if options.chat is None:
        for name in ("system", "tools", "thinking"):
            if getattr(options, name):
                raise ValueError(f"--{name} goes with --chat")
    if options.prompt_ids:
        return options.prompt_ids
    if options.chat is None:
        return sys.stdin.read() if options.prompt == "-" else options.prompt
    messages = [{"role": "user", "content": options.chat}]
    if options.system:
        messages.insert(0, {"role": "system", "content": options.system})
    template = ChatTemplate.read(engine.checkpoint.path)
    return template.render(
        messages, read_tools(options.tools), enable_thinking=bool(options.thinking)
    )


def read_tools(file: Path | None) -> list[dict[str, Any]]:
    """Function schemas of a JSON file: a list, each with or without {"type": "function"}."""
    if file is None:
        return []
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise ValueError(f"{file}: should hold a list of function schemas")
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in found
    ]
