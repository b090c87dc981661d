"""From an evaluation's results to its figures: pure arithmetic over what was answered."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flashmoe_lab.study import scorer
from flashmoe_lab.study.questions import Tasks

_CALLS = ("tool", "tool_parallel", "tool_chain")


def figures(tasks: Tasks, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one setting, from the result of each task by its name.

    `loss` is the mean of the parts' losses, each in nats per measured token. `tool_call_valid` and
    the other shares are of exact answers, unless they say `parse`. `unused_experts` counts, over
    all layers, those that no token of the passages chose; `top_quarter_share` is, layer by layer,
    the share of choices that fell on the most chosen quarter.
    """
    verdicts = [(q.kind, scorer.judge(q.check, results[q.name]["text"])) for q in tasks.questions]
    kinds = scorer.tally(verdicts)
    calls = scorer.tally(("call", v) for kind, v in verdicts if kind in _CALLS).get("call", {})
    losses = _losses(tasks, results)
    chosen = np.sum([results[p.name]["chosen"] for p in tasks.passages], axis=0)
    ranked = -np.sort(-chosen, axis=1)
    quarter = ranked[:, : max(1, chosen.shape[1] // 4)].sum(1) / ranked.sum(1)
    answered = [results[q.name] for q in tasks.questions]
    return {
        "loss": round(sum(losses.values()) / len(losses), 4),
        "loss_by_part": {part: round(loss, 4) for part, loss in losses.items()},
        "tool_call_parse": calls.get("parse"),
        "tool_call_valid": calls.get("exact"),
        "json_parse": kinds.get("json", {}).get("parse"),
        "json_exact": kinds.get("json", {}).get("exact"),
        **{kind: kinds.get(kind, {}).get("exact") for kind in ("memory", "list", "arith")},
        "kinds": kinds,
        "unused_experts": int((chosen == 0).sum()),
        "top_quarter_share": [round(float(share), 3) for share in quarter],
        "answer_tokens": sum(len(answer["tokens"]) for answer in answered),
        "dur_s": round(sum(result["dur_s"] for result in results.values()), 1),
    }


def _losses(tasks: Tasks, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for passages in sorted(tasks.passages, key=lambda passages: passages.part):
        total = sums.setdefault(passages.part, [0.0, 0.0])
        total[0] += results[passages.name]["loss"]
        total[1] += results[passages.name]["measured"]
    return {part: loss / max(count, 1) for part, (loss, count) in sums.items()}
