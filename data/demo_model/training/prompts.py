"""Writes what the evaluation asks: eval.jsonl (500 prompts) and loss.jsonl (texts for the loss).

    python -m data.demo_model.training.prompts CORPUS OUT

Both are drawn from the held-out side of the split (see draw.py) with a seed that training does not
use, and shards.py refuses to write a training sample that asks one of these prompts. A prompt has
thinking switched off. The kinds and their numbers stand in `KINDS`.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .arithmetic import sum_chat
from .chat_format import Chat, Message, render_prompt, to_json
from .draw import Draw
from .json_tasks import json_chat
from .lists import list_chat
from .memory import memory_chat
from .mixture import PARTS, filler
from .prose import documents
from .tool_chats import chained_calls, one_call, parallel_calls

SEED = "evaluation 7"

KINDS: dict[str, tuple[int, Callable[[Draw], Chat]]] = {
    "tool": (130, one_call),
    "tool_parallel": (20, parallel_calls),
    "tool_chain": (30, chained_calls),
    "json": (120, json_chat),
    "list": (75, list_chat),
    "arith": (75, sum_chat),
    "memory": (50, lambda draw: memory_chat(draw, filler)),
}


def fingerprint(messages: list[Message]) -> str:
    """A short hash of what the user asks, with all that was said before; system texts aside."""
    said = [(m["role"], m["content"]) for m in messages if m["role"] != "system"]
    return hashlib.blake2b(to_json(said).encode(), digest_size=8).hexdigest()


def questions(chat: Chat) -> Iterator[str]:
    """The fingerprints of every place of a chat where the assistant has to answer a user."""
    for place, message in enumerate(chat.messages):
        if message["role"] == "user":
            yield fingerprint(chat.messages[: place + 1])


def evaluation_prompts(seed: str = SEED) -> list[dict[str, Any]]:
    """The prompts with their checks, all different."""
    rows, seen = [], set()
    for kind, (count, make) in KINDS.items():
        draw, wanted = Draw.of(f"{seed} {kind}", held_out=True), len(rows) + count
        while len(rows) < wanted:
            chat = make(draw)
            mark = fingerprint(chat.prompt())
            if mark not in seen:
                seen.add(mark)
                rows.append(_row(chat))
    return rows


def _row(chat: Chat) -> dict[str, Any]:
    prompt = render_prompt(chat.prompt(), chat.tools)
    row = {"kind": chat.kind, "prompt": prompt, "messages": chat.prompt()}
    return {**row, "tools": chat.tools, "check": chat.check}


def loss_texts(
    corpus: Path, seed: str = SEED, characters: int = 20_000
) -> Iterator[dict[str, Any]]:
    """About `characters` of held-out text of each part, as segments with and without loss."""
    for name, part in PARTS.items():
        draw, left = Draw.of(f"{seed} loss {name}", held_out=True), characters
        made = (part.make(draw).segments for _ in range(10_000)) if part.make else None
        for segments in made or documents(corpus, name, held_out=True):
            if left <= 0:
                break
            left -= sum(len(text) for text, _ in segments)
            yield {"part": name, "segments": segments}


def write(path: Path, rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> int:
    """Writes rows as JSON lines; how many."""
    lines = [to_json(row) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8")
    return len(lines)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"eval.jsonl: {write(given.out / 'eval.jsonl', evaluation_prompts())} prompts")
    print(f"loss.jsonl: {write(given.out / 'loss.jsonl', loss_texts(given.corpus))} texts")


if __name__ == "__main__":
    main()
