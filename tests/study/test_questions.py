"""What the evaluation asks, and in which order."""

import json
from collections import Counter
from pathlib import Path

import pytest

from flashmoe_lab.bundled import bundled
from flashmoe_lab.study.questions import Passages, Question, Tasks, in_fair_order
from flashmoe_lab.study.scorer import judge

KINDS = {"tool": 40, "json": 30, "list": 20, "arith": 10}


def _encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"kind": kind, "prompt": "x" * (10 + n), "check": {"number": n}}
        for kind, count in KINDS.items()
        for n in range(count)
    ]
    texts = [
        {"part": part, "segments": [["ab" * 100, False], ["c" * 100, True]]}
        for part in ("tales", "tools")
        for _ in range(10)
    ]
    for name, lines in (("eval", rows), ("loss", texts)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(content)
    return tmp_path


def test_everything_is_asked_once(prompts: Path) -> None:
    tasks = Tasks.read(_encode, prompts)
    assert Counter(q.kind for q in tasks.questions) == KINDS
    assert len({q.name for q in tasks.questions}) == 100
    texts = [text for passages in tasks.passages for text in passages.texts]
    assert len(texts) == 20
    assert all(len(ids) == len(trained) == 300 and sum(trained) == 100 for ids, trained in texts)
    assert sorted(len(p.texts) for p in tasks.passages) == [1, 1, 3, 3, 3, 3, 3, 3]
    order = tasks.in_order()
    assert sorted(t.name for t in order) == sorted(
        t.name for t in (*tasks.questions, *tasks.passages)
    )


def test_every_beginning_is_a_fair_sample(prompts: Path) -> None:
    order = Tasks.read(_encode, prompts).in_order()
    total = sum(task.work for task in order)
    for share in (0.25, 0.5, 0.75):
        part = order[: round(len(order) * share)]
        assert abs(sum(task.work for task in part) / total - share) < 0.05
        kinds = Counter(task.kind for task in part if isinstance(task, Question))
        for kind, count in KINDS.items():
            assert abs(kinds[kind] - share * count) <= 2


def test_limit(prompts: Path) -> None:
    few, all_of_them = Tasks.read(_encode, prompts, 10), Tasks.read(_encode, prompts, 1000)
    kinds = Counter(q.kind for q in few.questions)
    assert kinds.total() == 10
    assert all(abs(kinds[kind] - count / 10) <= 1 for kind, count in KINDS.items())
    assert {p.part for p in few.passages} == {"tales", "tools"}
    assert sum(len(p.texts) for p in few.passages) == 2
    assert few.digest == all_of_them.digest
    assert len(all_of_them.questions) == 100
    names = {q.name: q for q in all_of_them.questions}
    assert all(names[q.name] == q for q in few.questions)
    with pytest.raises(ValueError, match="limit is 0; it must be at least 1"):
        Tasks.read(_encode, prompts, 0)


def test_the_digest_tells_files_apart(prompts: Path) -> None:
    before = Tasks.read(_encode, prompts).digest
    file = prompts / "loss.jsonl"
    file.write_text(file.read_text().replace("ccc", "ccd", 1))
    assert Tasks.read(_encode, prompts).digest != before


def test_fair_order_does_not_depend_on_the_files_order(prompts: Path) -> None:
    questions = Tasks.read(_encode, prompts).questions
    assert in_fair_order(questions[::-1]) == in_fair_order(questions)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "eval.jsonl: is empty"),
        ('{"kind": "a", "prompt": "b", "check": {}}\n{"kind": 1}\n', "line 2 is not an object"),
        ("[1]\n", "line 1 is not an object with kind, prompt, check"),
        ("nothing\n", "line 1 is not"),
    ],
)
def test_damaged_files(prompts: Path, content: str, words: str) -> None:
    (prompts / "eval.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words):
        Tasks.read(_encode, prompts)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="eval.jsonl: no such file"):
        Tasks.read(_encode, tmp_path)


def test_the_bundled_prompts() -> None:
    place = bundled("prompts")
    if not (place / "eval.jsonl").exists():
        pytest.skip(f"the prompts are not in {place}")
    tasks = Tasks.read(_encode, place)
    assert len(tasks.questions) == 500
    assert len({bytes(question.tokens) for question in tasks.questions}) == 500
    kinds = {question.kind for question in tasks.questions}
    assert kinds == {"tool", "tool_parallel", "tool_chain", "json", "list", "arith", "memory"}
    for question in tasks.questions:
        assert not judge(question.check, "").exact
        assert bytes(question.tokens).endswith(b"<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert len({passages.part for passages in tasks.passages}) > 10
    assert all(any(trained) for passages in tasks.passages for _, trained in passages.texts)


def test_work_is_counted_in_tokens() -> None:
    assert Passages(name="p", part="a", texts=[([1, 2], [True, True]), ([3], [True])]).work == 3
    assert Question(name="q", kind="a", tokens=[1, 2], check={}).work > 2
