"""Whether the server bears many clients, and clients that leave: counts and memory, no speeds.

    python benchmarks/server_load.py demo --seconds 300 --disconnects 1000

It starts `flashmoe-lab serve` itself. Each of the clients has questions whose greedy answers were
asked for before, one at a time; any other answer is an error. Beside 429 there must be no other.
"""

import argparse
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import APIError, OpenAI, RateLimitError
from record import record

QUESTIONS = [
    f"{ask} {thing}."
    for ask in ("Tell me about the", "Write a story about a", "Count to ten, then name a")
    for thing in (
        "dog",
        "cat",
        "house",
        "river",
        "tree",
        "boat",
        "garden",
        "mouse",
        "king",
        "song",
        "road",
    )  # fmt: skip
][:32]


class Server:
    """`flashmoe-lab serve` in a process of its own, seen from outside."""

    def __init__(self, process: subprocess.Popen[str], url: str, model: str) -> None:
        self.process, self.url, self.model = process, url, model
        self.port = int(url.rsplit(":", 1)[1].split("/")[0])

    def health(self) -> dict[str, Any]:
        """What /health says."""
        return httpx.get(self.url.replace("/v1", "/health"), timeout=60).json()

    def tokens(self) -> int:
        """How many it generated so far."""
        text = httpx.get(self.url.replace("/v1", "/metrics"), timeout=60).text
        found = re.search(r"^flashmoe_generated_tokens_total (\d+)", text, re.MULTILINE)
        assert found
        return int(found[1])

    def wait_until_idle(self) -> None:
        """Until nothing is generated."""
        while self.health()["running"]:
            time.sleep(0.1)

    @property
    def rss_nbytes(self) -> int:
        """Its resident memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def threads_and_files(self) -> tuple[int, int]:
        """How many it has open."""
        place = Path(f"/proc/{self.process.pid}")
        return len(list((place / "task").iterdir())), len(list((place / "fd").iterdir()))


@contextmanager
def serving(model: str, *options: str) -> Iterator[Server]:
    """A server, with further options of the command, until the `with` ends."""
    command = [sys.executable, "-m", "flashmoe_lab", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        for line in process.stderr:
            if found := re.match(r"(\S+) at (http://\S+)", line):
                yield Server(process, found[2], found[1])
                return
        raise SystemExit(f"the server did not start: {' '.join(command)}")
    finally:
        process.terminate()
        process.wait(60)


def answer(client: OpenAI, model: str, question: str, stream: bool) -> str:
    """What a chat says; the usage has to be there too."""
    options: Any = {"model": model, "temperature": 0, "max_tokens": 40, "stream": stream}
    made: Any = client.chat.completions.create(
        messages=[{"role": "user", "content": question}], **options
    )
    if not stream:
        assert made.usage.completion_tokens
        return made.choices[0].message.content
    chunks = list(made)
    assert chunks[-1].choices[0].finish_reason
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def crowd(server: Server, seconds: float) -> dict[str, Any]:
    """All clients at once for so long."""
    first = OpenAI(base_url=server.url, api_key="x", max_retries=0, timeout=600)
    right = [answer(first, server.model, question, False) for question in QUESTIONS]
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        rng = random.Random(number)
        with OpenAI(base_url=server.url, api_key="x", max_retries=0, timeout=600) as client:
            while time.monotonic() < end:
                which = rng.randrange(len(QUESTIONS))
                try:
                    found = answer(client, server.model, QUESTIONS[which], rng.random() < 0.5)
                    counts["right" if found == right[which] else "mixed up"] += 1
                except RateLimitError as error:
                    counts["429"] += 1
                    time.sleep(rng.random() * float(error.response.headers["Retry-After"]))
                except (APIError, AssertionError) as error:
                    counts[f"{type(error).__name__}: {error}"] += 1

    memory: list[int] = []
    with ThreadPoolExecutor(len(QUESTIONS)) as clients:
        for number in range(len(QUESTIONS)):
            clients.submit(work, number)
        while time.monotonic() < end:
            time.sleep(min(10.0, seconds / 10))
            memory.append(server.rss_nbytes)
    server.wait_until_idle()
    return {"counts": dict(counts), "rss_mb": [round(nbytes / 1e6, 1) for nbytes in memory]}


def leave(server: Server, disconnects: int) -> dict[str, Any]:
    """Clients that leave at random moments, politely or not."""
    before = server.threads_and_files
    rng = random.Random(0)
    moments = [
        (rng.random() * 0.4, rng.random() < 0.5, rng.random() < 0.7) for _ in range(disconnects)
    ]

    def visit(moment: tuple[float, bool, bool]) -> None:
        delay, abrupt, stream = moment
        body = json.dumps(
            {
                "model": server.model,
                "max_tokens": 2000,
                "stream": stream,
                "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
                "temperature": 1.0,
            }
        )
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall((head + body).encode())
            time.sleep(delay)
            if abrupt:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(visit, moments))
    started = time.monotonic()
    server.wait_until_idle()
    quiet_s = time.monotonic() - started
    tokens = server.tokens()
    time.sleep(2)
    return {
        "disconnects": disconnects,
        "quiet_after_s": round(quiet_s, 2),
        "tokens_after": server.tokens() - tokens,
        "health": server.health(),
        "threads_and_files": [before, server.threads_and_files],
    }


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description="the server under load")
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the crowd")
    parser.add_argument("--disconnects", type=int, default=100)
    parser.add_argument(
        "--queue", default="24", help="fewer than the clients, so that some get 429"
    )
    parser.add_argument("--json", type=Path, help="append the results to this file")
    options = parser.parse_args()
    failed = False
    with serving(options.model, "--queue", options.queue) as server:
        if options.seconds:
            found = crowd(server, options.seconds)
            counts = found["counts"]
            wrong = sum(counts.values()) - counts.get("right", 0) - counts.get("429", 0)
            failed |= bool(wrong)
            print(f"{len(QUESTIONS)} clients, {options.seconds:g} s: {counts}")
            print(f"memory of the server, MB: {found['rss_mb']}")
            record(options.json, benchmark="server_load", case="crowd", variant=options.model,
                   value=wrong, unit="errors", repetitions=1, **found)  # fmt: skip
        if options.disconnects:
            found = leave(server, options.disconnects)
            idle = found["health"]["running"] == found["health"]["waiting"] == 0
            failed |= not idle or bool(found["tokens_after"])
            print(f"disconnects: {found}")
            record(options.json, benchmark="server_load", case="disconnects",
                   variant=options.model, value=found["tokens_after"], unit="tokens",
                   repetitions=1, **found)  # fmt: skip
    return failed


if __name__ == "__main__":
    sys.exit(main())
