"""What the evaluation asks: questions with checks, and passages whose loss is measured.

Both come from files of JSON lines that lie with the package. They are put into one order in which
every beginning is a fair sample of the whole, so that a part of them is an evaluation too, and the
time that is left can be told.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, TypeVar

from flashmoe_lab.bundled import bundled

_PASSAGE_TOKENS = 1000  # short passages of one part are measured together, up to this
_GOLDEN = (sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt and what a right answer holds (see `scorer`).

    Attributes:
        name: tells it from all others in a file of results.
        kind: "tool", "json", "list" ...
        tokens: the prompt's ids.
    """

    name: str
    kind: str
    tokens: list[int]
    check: dict[str, Any]

    @property
    def work(self) -> int:
        """Tokens that it takes, about."""
        return len(self.tokens) + 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Passages:
    """Some texts of one part ("tales", "tools" ...).

    Attributes:
        texts: of each, ids and whether each of them was trained on; only those are measured.
    """

    name: str
    part: str
    texts: list[tuple[list[int], list[bool]]]

    @property
    def work(self) -> int:
        """Tokens that they take."""
        return sum(len(ids) for ids, _ in self.texts)


Task = Question | Passages
_Some = TypeVar("_Some", Question, Passages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """All that is asked, in a fair order.

    Attributes:
        digest: of the files that it was read from.
    """

    questions: tuple[Question, ...]
    passages: tuple[Passages, ...]
    digest: str

    @classmethod
    def read(
        cls,
        encode: Callable[[str], list[int]],
        directory: str | Path | None = None,
        limit: int | None = None,
    ) -> "Tasks":
        """Read eval.jsonl and loss.jsonl.

        Args:
            encode: text to ids.
            directory: where they lie; the bundled ones without.
            limit: this many questions at the most, and as large a share of the passages.

        Raises:
            FileNotFoundError, ValueError: what is wrong, naming the file and line.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; it must be at least 1")
        place = bundled("prompts") if directory is None else Path(directory)
        asked, digest = _read_lines(place / "eval.jsonl", ("kind", "prompt", "check"))
        told, other = _read_lines(place / "loss.jsonl", ("part", "segments"))
        questions = [
            Question(
                name=f"eval.jsonl:{number}",
                kind=row["kind"],
                tokens=encode(row["prompt"]),
                check=row["check"],
            )
            for number, row in asked.items()
        ]
        share = min(1.0, (limit or len(questions)) / len(questions))
        questions = in_fair_order(questions)[: limit or len(questions)]
        passages = _passages(told, encode, share)
        return cls(
            questions=tuple(in_fair_order(questions)),
            passages=tuple(in_fair_order(passages)),
            digest=hashlib.sha256(digest + other).hexdigest()[:16],
        )

    def in_order(self) -> list[Task]:
        """Questions and passages mixed, so that every beginning is a fair sample of the work."""
        places: list[tuple[float, Task]] = []
        for group in (self.questions, self.passages):
            places += [((i + 0.5) / len(group), task) for i, task in enumerate(group)]
        return [task for _, task in sorted(places, key=lambda place: place[0])]


def in_fair_order(tasks: Sequence[_Some]) -> list[_Some]:
    """Sorted by kind and length, then taken at steps of the golden ratio."""

    def group(task: Task) -> str:
        return task.kind if isinstance(task, Question) else task.part

    ranked = sorted(tasks, key=lambda task: (group(task), task.work, task.name))
    steps = sorted(range(len(ranked)), key=lambda i: i * _GOLDEN % 1)
    return [ranked[i] for i in steps]


def _passages(
    rows: dict[int, dict[str, Any]], encode: Callable[[str], list[int]], share: float
) -> list[Passages]:
    """Passages in groups; of each part the share asked for, and one group at the least."""
    together = _PASSAGE_TOKENS * share
    found: list[Passages] = []
    for number, row in rows.items():
        ids: list[int] = []
        trained: list[bool] = []
        for text, has_loss in row["segments"]:
            part = encode(text)
            ids += part
            trained += [bool(has_loss)] * len(part)
        last = found[-1] if found else None
        if last and last.part == row["part"] and last.work + len(ids) <= together:
            last.texts.append((ids, trained))
        else:
            name = f"loss.jsonl:{number}"
            found.append(Passages(name=name, part=row["part"], texts=[(ids, trained)]))
    kept: list[Passages] = []
    for part in dict.fromkeys(group.part for group in found):
        groups = in_fair_order([group for group in found if group.part == part])
        kept += groups[: max(1, round(len(groups) * share))]
    return kept


def _read_lines(file: Path, keys: tuple[str, ...]) -> tuple[dict[int, dict[str, Any]], bytes]:
    """Line number -> object, and a digest of the file."""
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; it holds what the evaluation asks")
    content, rows = file.read_bytes(), dict[int, dict[str, Any]]()
    for number, line in enumerate(content.splitlines(), 1):
        try:
            rows[number] = json.loads(line)
            for key in keys:
                rows[number][key]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}: line {number} is not an object with {', '.join(keys)} ({error!r})"
            ) from None
    if not rows:
        raise ValueError(f"{file}: is empty")
    return rows, hashlib.sha256(content).digest()
