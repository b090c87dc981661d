"""What the server answers to the held-out questions: JSON that is valid, calls that are right.

    python benchmarks/server_answers.py --bits 4 2 --json results/server-answers.jsonl

Every question is asked for JSON of a schema made from its check; an answer counts if it is complete
and valid under the schema. Questions about tools are asked again with the tools, and the calls that
come back are held to the check, beside those of the engine alone, which is what `evaluate` runs.
"""

import argparse
import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
from openai import OpenAI
from record import record

import flashmoe_lab as fl
from flashmoe_lab.bundled import bundled
from flashmoe_lab.server.app import listen, make_server
from flashmoe_lab.server.service import ServerSettings
from flashmoe_lab.study.questions import Tasks
from flashmoe_lab.study.scorer import judge, same_json

MAX_TOKENS = 160
CALL_TOKENS = 160  # as in `evaluate`
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


@contextmanager
def serving(engine: fl.Engine) -> Iterator[OpenAI]:
    """A client of a server in a thread."""
    server = make_server(engine, ServerSettings(name="demo"))
    with listen("127.0.0.1", 0) as place:
        work = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[place])))
        work.start()
        url = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
        with OpenAI(base_url=url, api_key="x", timeout=600) as client:
            yield client
        server.should_exit = True
        work.join()


def schema_of(value: Any) -> dict[str, Any]:
    """A schema that a value is valid under: its types, and all of its keys."""
    if isinstance(value, dict):
        inner = {key: schema_of(item) for key, item in value.items()}
        return {"type": "object", "properties": inner, "required": list(inner),
                "additionalProperties": False}  # fmt: skip
    if isinstance(value, list):
        return {"type": "array", "items": schema_of(value[0]) if value else {"type": "string"}}
    return {"type": "null"} if value is None else {"type": TYPES[type(value)]}


def wanted(check: dict[str, Any]) -> dict[str, Any]:
    """The schema of an answer to a question with this check."""
    if "json" in check:
        return schema_of(check["json"])
    if "number" in check:
        return schema_of({"result": check["number"]})
    if "text" in check:
        return schema_of({"answer": check["text"]})
    return schema_of({"calls": check.get("calls") or [check.get("call", {"name": ""})]})


def ask(client: OpenAI, question: dict[str, Any], max_tokens: int, **options: Any) -> Any:
    """The answer, greedy."""
    tools = [t if "function" in t else {"type": "function", "function": t}
             for t in question["tools"] or []]  # fmt: skip
    made: Any = client.chat.completions.create(
        model="demo", messages=question["messages"], temperature=0, max_tokens=max_tokens,
        **({"tools": tools} if tools else {}), **options,
    )  # fmt: skip
    return made.choices[0]


def valid(client: OpenAI, question: dict[str, Any]) -> bool:
    """Whether the answer is JSON of the schema."""
    schema = wanted(question["check"])
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    choice = ask(client, question, MAX_TOKENS, response_format=format)
    try:
        jsonschema.validate(json.loads(choice.message.content), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        print(
            f"{choice.finish_reason}: {choice.message.content!r:.200}: {error!s:.100}", flush=True
        )
        return False
    return True


def right_calls(client: OpenAI, question: dict[str, Any]) -> bool:
    """Whether exactly the right calls came."""
    check = question["check"]
    calls = ask(client, question, CALL_TOKENS).message.tool_calls or []
    found = [
        {"name": c.function.name, "arguments": json.loads(c.function.arguments)} for c in calls
    ]
    return same_json(found, check.get("calls") or [check["call"]])


def main() -> None:
    """Ask all questions at each of the bits."""
    parser = argparse.ArgumentParser(description="what the server answers")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--limit", type=int, help="ask so many questions only")
    parser.add_argument("--json", type=Path, help="append the results to this file")
    options = parser.parse_args()
    rows = [json.loads(line) for line in (bundled("prompts") / "eval.jsonl").open()]
    for bits in options.bits:
        with fl.load("demo", bits, resident=True) as engine, serving(engine) as client:
            tasks = Tasks.read(engine.encode, limit=options.limit)
            named = {q.name: rows[int(q.name.split(":")[1]) - 1] for q in tasks.questions}
            began = time.monotonic()
            good = sum(valid(client, row) for row in named.values())
            report(options, bits, "json_schema", good, len(named), began)
            began = time.monotonic()
            called = [q for q in tasks.questions if "call" in q.check or "calls" in q.check]
            good = sum(right_calls(client, named[q.name]) for q in called)
            alone = sum(
                judge(q.check, engine.generate(q.tokens, CALL_TOKENS).text).exact for q in called
            )
            report(options, bits, "tool_calls", good, len(called), began, engine_alone=alone)


def report(
    options: argparse.Namespace, bits: int, case: str, good: int, of: int, began: float, **more: Any
) -> None:
    """Print and keep one figure."""
    print(f"{case} at {bits} bits: {good} of {of} {more or ''} in {time.monotonic() - began:.0f} s",
          flush=True)  # fmt: skip
    record(options.json, benchmark="server_answers", case=case, variant=f"{bits} bits", value=good,
           unit="answers", repetitions=1, asked=of, **more)  # fmt: skip


if __name__ == "__main__":
    main()
