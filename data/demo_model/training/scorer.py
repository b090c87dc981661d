"""Judges one answer of the evaluation: text in, verdict out. Pure, and standard library only.

A check is a dictionary with one key that says what a right answer holds:
    call: {"name", "arguments"}   exactly this one tool call, every argument as text the same
                                  (as the template writes it: True, not true; JSON within objects)
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
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>", re.DOTALL)
_ENDS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer has the right form, names the right function, and is right as a whole."""

    parse: bool
    exact: bool
    name: bool | None = None


@dataclass(slots=True)
class Score:
    """Counts of the verdicts of one kind."""

    n: int = 0
    parse: int = 0
    exact: int = 0
    name: int | None = None

    def add(self, verdict: Verdict) -> None:
        """Counts one more verdict."""
        self.n += 1
        self.parse += verdict.parse
        self.exact += verdict.exact
        if verdict.name is not None:
            self.name = (self.name or 0) + verdict.name

    def shares(self) -> dict[str, float]:
        """`n`, and the shares of `parse`, `exact` and, for calls, `name`."""
        counts = {"parse": self.parse, "exact": self.exact, "name": self.name}
        given = {key: round(c / self.n, 4) for key, c in counts.items() if c is not None}
        return {"n": self.n, **given}


def answer_part(text: str) -> str:
    """What stands before the end of the turn and after the reasoning."""
    for end in _ENDS:
        text = text.split(end)[0]
    return text.split("</think>")[-1]


def parse_calls(text: str) -> list[tuple[str, dict[str, str]]]:
    """The complete tool calls of a text: names, and arguments as they are written."""
    return [(name, dict(_PARAMETER.findall(body))) for name, body in _CALL.findall(text)]


def first_json(text: str) -> Any:
    """The first JSON value of a text, from its first bracket on; ValueError if there is none."""
    starts = [place for place in (text.find("{"), text.find("[")) if place >= 0]
    return json.JSONDecoder().raw_decode(text[min(starts, default=0) :].lstrip())[0]


def judge(check: dict[str, Any], text: str) -> Verdict:
    """The verdict on one answer."""
    answer = answer_part(text)
    if "call" in check:
        return _judge_call(check["call"], parse_calls(answer))
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
        return Verdict(True, answer.strip() == check["text"].strip())
    keys = "call, ncalls, json, number or text"
    raise ValueError(f"a check should have the key {keys}; it has {sorted(check)}")


def same_json(one: Any, other: Any) -> bool:
    """Equality that tells True from 1, which Python's does not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def tally(verdicts: Iterable[tuple[str, Verdict]]) -> dict[str, dict[str, float]]:
    """Shares for each kind, and for all under `ALL`."""
    scores: dict[str, Score] = {}
    for kind, verdict in verdicts:
        scores.setdefault(kind, Score()).add(verdict)
        everything = Verdict(verdict.parse, verdict.exact)
        scores.setdefault("ALL", Score()).add(everything)
    return {kind: scores[kind].shares() for kind in sorted(scores)}


def _judge_call(wanted: dict[str, Any], found: list[tuple[str, dict[str, str]]]) -> Verdict:
    arguments = {key: _as_written(value) for key, value in wanted["arguments"].items()}
    one = len(found) == 1
    name = bool(found) and found[0][0] == wanted["name"]
    return Verdict(one, one and name and found[0][1] == arguments, name)


def _as_written(value: object) -> str:
    """An argument as the chat template writes it."""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
