"""Makes renderings.json.xz and mlx_lm_calls.json.xz: what transformers renders and mlx-lm parses.

    python tests/chat/make_fixtures.py [FOLDER OF MORE TEMPLATES]

Runs in an environment with transformers, jinja2 and mlx-lm; imports nothing of flashmoe_lab. The
templates under templates/ are of models under the Apache License 2.0 (templates/LICENSE); they come
as they lie in llama-cpp-python 0.3.36, vendor/llama.cpp/models/templates. Of templates in the
folder that is named only hashes of what they render are kept.
"""

# pyright: reportMissingImports=false
import hashlib
import json
import lzma
import random
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NOW = datetime(2026, 3, 5, 14, 7, 9)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
WORDS = [
    "please", "tell", "me", "the", "weather in", "Zürich", "<b>now</b>", "&", "then;", "naïve",
    "東京", "🙂", "{{ x }}", "{% if %}", '"quoted"', "it's", "5", "True", "null", "</think>",
    "<|im_end|>", "\\n", "tab\t", "new\nline", "مرحبا", "e\u0301", "\u00a0", "<tool_call>", "1.50",
]  # fmt: skip
TYPES: list[dict[str, Any]] = [
    {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"},
    {"type": "array", "items": {"type": "string"}},
    {"type": "object", "properties": {"a": {"type": "integer"}}},
    {"type": "string", "enum": ["°C", "°F"]}, {"type": ["integer", "null"]},
    {"anyOf": [{"type": "number"}, {"type": "null"}]},
]  # fmt: skip


def words(draw: random.Random, most: int = 12) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(0, most)))


def tool(draw: random.Random, number: int) -> dict[str, Any]:
    names = draw.sample(["city", "größe", "when", "n", "unit", "items", "text"], draw.randint(0, 4))
    properties = {
        name: {**draw.choice(TYPES), "description": words(draw, 5) or "?"} for name in names
    }
    return {"type": "function", "function": {
        "name": f"tool_{number}", "description": words(draw, 8) or "?",
        "parameters": {"type": "object", "properties": properties,
                       "required": names[: draw.randint(0, len(names))]}}}  # fmt: skip


def value(draw: random.Random, schema: dict[str, Any]) -> Any:
    kind = (
        draw.choice([c["type"] for c in schema["anyOf"]]) if "anyOf" in schema else schema["type"]
    )
    if isinstance(kind, list):
        kind = draw.choice(kind)
    if "enum" in schema:
        return draw.choice(schema["enum"])
    return {
        "string": lambda: words(draw),
        "integer": lambda: draw.choice([0, -7, 12, 10**6, draw.randint(-99, 99)]),
        "number": lambda: draw.choice([0.5, -2.25, 3, 1e-7, 1e20, 7]),
        "boolean": lambda: draw.random() < 0.5,
        "array": lambda: [words(draw, 3) for _ in range(draw.randint(0, 3))],
        "object": lambda: {"a": draw.randint(0, 9), "b": [None, True, {"c": "ü<"}]},
        "null": lambda: None,
    }[kind]()


def arguments(draw: random.Random, schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema["function"]["parameters"]["properties"]
    return {name: value(draw, inner) for name, inner in properties.items()}


def conversation(draw: random.Random) -> dict[str, Any]:
    tools = [tool(draw, n) for n in range(draw.choice([0, 0, 1, 2, 4]))]
    messages: list[dict[str, Any]] = []
    if draw.random() < 0.5:
        messages.append({"role": "system", "content": words(draw, 20)})
    for _ in range(draw.randint(1, 4)):
        content: Any = draw.choice([words(draw, 20), words(draw, 20), "", "  \n padded \n "])
        if draw.random() < 0.05:
            content = [{"type": "text", "text": words(draw)}, {"type": "text", "text": "more"}]
        messages.append({"role": "user", "content": content})
        if tools and draw.random() < 0.6:
            calls = [draw.choice(tools) for _ in range(draw.choice([1, 1, 2, 3]))]
            messages.append({
                "role": "assistant", "content": draw.choice(["", None, words(draw, 6)]),
                "tool_calls": [{"id": f"call{n:05}", "type": "function", "function": {
                    "name": c["function"]["name"], "arguments": arguments(draw, c)}}
                    for n, c in enumerate(calls)]})  # fmt: skip
            messages += [
                {"role": "tool", "name": c["function"]["name"], "tool_call_id": f"call{n:05}",
                 "content": draw.choice(["", words(draw), json.dumps({"t": words(draw)})])}
                for n, c in enumerate(calls)]  # fmt: skip
        if draw.random() < 0.8:
            answer: dict[str, Any] = {"role": "assistant", "content": words(draw, 15)}
            if draw.random() < 0.4:
                answer["reasoning_content"] = words(draw, 9)
            elif draw.random() < 0.3:
                answer["content"] = f"<think>\n{words(draw)}\n</think>\n\n{answer['content']}"
            messages.append(answer)
    made = {"messages": messages, "tools": tools or None,
            "add_generation_prompt": draw.random() < 0.7}  # fmt: skip
    if draw.random() < 0.7:
        made["enable_thinking"] = draw.random() < 0.5
    return made


def rendered(tokenizer: Any, template: str, given: dict[str, Any]) -> dict[str, str]:
    given = dict(given)
    messages = given.pop("messages")
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **given
        )
    except Exception as error:  # the template's own words, or what it ran into
        return {"error": " ".join(str(error).split())[:100]}
    return {"text": text}


def digest(answer: dict[str, str]) -> str:
    """Of a text; errors count as the same."""
    return hashlib.sha256(answer.get("text", "error").encode()).hexdigest()[:8]


def renderings(more: Path | None) -> dict[str, Any]:
    import transformers.utils.chat_template_utils as chat
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class Clock:
        now = staticmethod(lambda: NOW)

    chat.datetime = Clock
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)
    draw = random.Random(20260305)
    conversations = [conversation(draw) for _ in range(200)]
    files = [
        ROOT / "data" / "demo_model" / "chat_template.jinja",
        *sorted(HERE.glob("templates/*.jinja")),
    ]
    answers = {
        file.relative_to(ROOT).as_posix(): [
            rendered(tokenizer, file.read_text("utf-8"), given) for given in conversations
        ]
        for file in files
    }
    known = {file.name for file in files}
    hashes = {}
    for file in sorted(more.glob("*.jinja")) if more else []:
        if file.name not in known:
            text = file.read_text("utf-8")
            found = [digest(rendered(tokenizer, text, given)) for given in conversations]
            hashes[file.name] = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "of": found}
    return {"now": NOW.isoformat(), "tokens": TOKENS, "conversations": conversations,
            "answers": answers, "hashes": hashes}  # fmt: skip


def written(name: str, given: dict[str, Any], draw: random.Random) -> str:
    """A call as models write it: mostly as the template does, sometimes more loosely."""
    style = draw.choice(["template"] * 4 + ["one line"])
    parts = [f"<tool_call>\n<function={name}>\n"]
    for key, item in given.items():
        is_json = isinstance(item, dict | list)
        text = json.dumps(item, ensure_ascii=False) if is_json else str(item)
        if style == "one line" and text == text.strip():
            parts.append(f"<parameter={key}>{text}</parameter>")
        else:
            parts.append(f"<parameter={key}>\n{text}\n</parameter>\n")
    return "".join([*parts, "</function>\n</tool_call>"])


def odd_text(draw: random.Random) -> str:
    """Text that is easily taken for something else."""
    return draw.choice([
        words(draw), "5", "True", "null", "None", "[1, 2]", '{"a": 1}', "1e5", "", "\n", " a\n\nb ",
        "if (a < b && c > d) {}", "<div>\n  <p>x</p>\n</div>", "say </parameter> here",
        "a </tool_call> b", "x <function=y> z", "<parameter", "</", "😀\n" * 3,
    ])  # fmt: skip


def calls() -> list[dict[str, Any]]:
    from mlx_lm.tool_parsers.qwen3_coder import parse_tool_call

    draw, made = random.Random(77), []
    for _ in range(1000):
        tools = [tool(draw, n) for n in range(draw.randint(1, 3))]
        text, truth, theirs = draw.choice(["", "I look.\n\n"]), [], []
        for number in range(draw.choice([1, 1, 2, 3])):
            chosen = draw.choice(tools)
            given = arguments(draw, chosen)
            for name, schema in chosen["function"]["parameters"]["properties"].items():
                if schema == {"type": "string", "description": schema["description"]}:
                    given[name] = odd_text(draw)
            block = written(chosen["function"]["name"], given, draw)
            text += ("\n" if number else "") + block
            truth.append({"name": chosen["function"]["name"], "arguments": given})
            inner = block.removeprefix("<tool_call>").split("</tool_call>")[0].strip()
            try:
                theirs.append(parse_tool_call(inner, tools))
            except Exception:  # its callers catch what it raises, too
                theirs.append(None)
        made.append({"tools": tools, "text": text, "truth": truth, "mlx_lm": theirs})
    return made


def keep(name: str, content: Any) -> None:
    data = lzma.compress(json.dumps(content, ensure_ascii=False).encode(), preset=9)
    (HERE / name).write_bytes(data)
    print(f"{name}: {len(data)} bytes")


if __name__ == "__main__":
    keep("renderings.json.xz", renderings(Path(sys.argv[1]) if sys.argv[1:] else None))
    keep("mlx_lm_calls.json.xz", calls())
