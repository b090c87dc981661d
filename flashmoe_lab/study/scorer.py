"""Judges one answer of the evaluation: text in, verdict out. Pure, and standard library only.

A check is a dictionary with one key that says what a right answer holds:
    call: {"name", "arguments"}   exactly this one tool call, every argument as text the same
                                  (as the template writes it: True, not true; JSON within objects)
    calls: [call, ...]            exactly these calls in this order
    ncalls: int                   this many tool calls
    json: value                   the first JSON value of the answer equals this one
    number: int                   the last integer of the answer is this one
    text: str                     the answer is this text, white space at its ends aside
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(
    r"<tool_call>\s*<function=([^>\n]+)>\s*(.*?)</function>\s*</tool_call>", re.DOTALL
)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\s*", re.DOTALL)
_ENDS = ("<|im_end|>", "<|endoftext|>")

Call = tuple[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer has the right form, is right as a whole, and names the right function.

    `parse` is None where any text has the right form, `name` where it is not about one call.
    """

    parse: bool | None
    exact: bool
    name: bool | None = None


def judge(check: dict[str, Any], text: str) -> Verdict:
    """The verdict on one answer."""
    answer = answer_part(text)
    if "call" in check:
        return _judge_call(check["call"], parse_calls(answer))
    if "calls" in check:
        found = parse_calls(answer)
        return Verdict(bool(found), found == [_written(call) for call in check["calls"]])
    if "ncalls" in check:
        found = parse_calls(answer)
        return Verdict(bool(found), len(found) == check["ncalls"])
    if "json" in check:
        try:
            value = first_json(answer)
        except ValueError:
            return Verdict(False, False)
        return Verdict(True, same_json(value, check["json"]))
    if "number" in check:
        numbers = re.findall(r"-?\d+", answer)
        return Verdict(bool(numbers), bool(numbers) and int(numbers[-1]) == check["number"])
    if "text" in check:
        return Verdict(None, answer.strip() == check["text"].strip())
    keys = "call, calls, ncalls, json, number or text"
    raise ValueError(f"a check should have the key {keys}; it has {sorted(check)}")


def answer_part(text: str) -> str:
    """What stands before the end of the turn and after the reasoning."""
    for end in _ENDS:
        text = text.split(end)[0]
    return text.split("</think>")[-1]


def parse_calls(text: str) -> list[Call]:
    """The tool calls of a text: names, and arguments as they are written.

    None at all where one of them is cut off, holds anything but parameters, or gives one twice.
    """
    calls: list[Call] = []
    for name, body in _CALL.findall(text):
        parameters = _PARAMETER.findall(body)
        if _PARAMETER.sub("", body).strip() or len(dict(parameters)) < len(parameters):
            return []
        calls.append((name, dict(parameters)))
    return calls if len(calls) == text.count("<tool_call>") else []


def first_json(text: str) -> Any:
    """The first JSON value of a text, from its first bracket on; ValueError if there is none, or
    one that names a key twice."""
    starts = [place for place in (text.find("{"), text.find("[")) if place >= 0]
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    return decoder.raw_decode(text[min(starts, default=0) :].lstrip())[0]


def same_json(one: Any, other: Any) -> bool:
    """Equality that tells True from 1, which Python's does not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def tally(verdicts: Iterable[tuple[str, Verdict]]) -> dict[str, dict[str, float]]:
    """For each kind, and for all under `ALL`: `n`, and the shares of `parse`, `exact` and `name`
    among the verdicts that have them."""
    groups: dict[str, list[Verdict]] = {"ALL": []}
    for kind, verdict in verdicts:
        groups.setdefault(kind, []).append(verdict)
        groups["ALL"].append(verdict)
    return {kind: _shares(groups[kind]) for kind in sorted(groups)}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _shares(verdicts: list[Verdict]) -> dict[str, float]:
    shares: dict[str, float] = {"n": len(verdicts)}
    for field in ("parse", "exact", "name"):
        given = [getattr(v, field) for v in verdicts if getattr(v, field) is not None]
        if given:
            shares[field] = round(sum(given) / len(given), 4)
    return shares


def _judge_call(wanted: dict[str, Any], found: list[Call]) -> Verdict:
    one = len(found) == 1
    name = bool(found) and found[0][0] == wanted["name"]
    return Verdict(one, one and found[0] == _written(wanted), name)


def _written(call: dict[str, Any]) -> Call:
    """A call as the chat template writes it."""
    return call["name"], {key: _as_text(value) for key, value in call["arguments"].items()}


def _as_text(value: object) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
