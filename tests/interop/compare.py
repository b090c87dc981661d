"""How many of our greedy answers are transformers', token for token.

    python tests/interop/compare.py MODEL EVAL.jsonl ANSWERS.jsonl [--keep FILE]

MODEL is the published checkpoint; it is packed with its experts as they are. ANSWERS.jsonl comes
from transformers_answers.py. Where an answer differs, the gap between transformers' two best logits
at the first token that does tells a near tie from a mistake. What is done is kept beside ANSWERS,
so an interrupted comparison goes on.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import flashmoe_lab as fl
from flashmoe_lab import kernels
from flashmoe_lab.demo import packed_at
from flashmoe_lab.study.journal import Journal
from flashmoe_lab.study.scorer import judge

NEAR_TIE = 0.01  # of logits; float32 sums in another order move them by some 1e-4


def main() -> int:
    """The command line; 1 if less than 99 % are the same or a difference is no near tie."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--keep", type=Path, help="write some answers to this file")
    given = parser.parse_args()
    lines = given.questions.read_text("utf-8").splitlines()
    questions = {number: json.loads(line) for number, line in enumerate(lines, 1)}
    rows = [json.loads(line) for line in given.answers.read_text("utf-8").splitlines()]
    source = fl.Source(given.model)
    path = packed_at(source, given.model.resolve().name, "none").path
    with fl.load(path, dtype="float32") as engine:
        ours = _ours(engine, rows, given.answers, source.identity)
        same, bad, encoded, verdicts = 0, 0, 0, 0
        for row in rows:
            question, mine = questions[row["line"]], ours[row["line"]]
            assert engine.tokenizer is not None
            encoded += engine.tokenizer.encode(question["prompt"]) == row["prompt"]
            same += mine == row["answer"]
            texts = [engine.tokenizer.decode(ids) for ids in (mine, row["answer"])]
            exact = [judge(question["check"], text).exact for text in texts]
            verdicts += exact[0] == exact[1]
            if mine != row["answer"]:
                bad += _explain(row, mine, texts, exact)
        print(f"{encoded} of {len(rows)} prompts have the same ids")
        print(
            f"{same} of {len(rows)} answers are the same token for token ({same / len(rows):.1%})"
        )
        print(f"{verdicts} of {len(rows)} verdicts are the same; {bad} differences are no near tie")
    if given.keep:
        _keep(given.keep, rows, questions, source.identity)
    return int(bad > 0 or same < 0.99 * len(rows) or encoded < len(rows))


def _ours(
    engine: fl.Engine, rows: list[dict[str, Any]], answers: Path, identity: str
) -> dict[int, list[int]]:
    ours: dict[int, list[int]] = {}
    conditions = {"source": identity, "kernels": kernels.used()}
    journal = Journal(answers.with_name(answers.name + ".ours"), conditions)
    with journal:
        for count, row in enumerate(rows, 1):
            key = str(row["line"])
            if journal.get(key) is None:
                journal.add(key, engine.generate(row["prompt"], 160).tokens)
            ours[row["line"]] = journal.get(key)
            print(f"{count} of {len(rows)} answered", end="\r", file=sys.stderr, flush=True)
    return ours


def _explain(row: dict[str, Any], mine: list[int], texts: list[str], exact: list[bool]) -> bool:
    """Print where an answer parts from transformers'; whether that is no near tie."""
    pairs = enumerate(zip(mine, row["answer"], strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(mine), len(row["answer"])))
    gap = row["gaps"][min(at, len(row["gaps"]) - 1)]
    print(f"line {row['line']}: other from token {at} on, gap of the two best logits {gap}")
    for name, text, right in zip(("ours", "theirs"), texts, exact, strict=True):
        print(f"    {name} ({'right' if right else 'wrong'}): {text!r}")
    return gap > NEAR_TIE


def _keep(
    file: Path, rows: list[dict[str, Any]], questions: dict[int, dict[str, Any]], identity: str
) -> None:
    """Three answers of each kind, those whose nearest tie is farthest."""
    kept: list[dict[str, Any]] = []
    for kind in dict.fromkeys(question["kind"] for question in questions.values()):
        some = [row for row in rows if questions[row["line"]]["kind"] == kind]
        some = sorted(some, key=lambda row: -min(row["gaps"]))[:3]
        kept += [{"kind": kind, "prompt": r["prompt"], "answer": r["answer"]} for r in some]
    content = {"source": identity, "answers": kept}
    file.write_text(json.dumps(content, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
