"""The command that says how good a model is: evaluate."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from flashmoe_lab.checkpoint.packed import write_whole
from flashmoe_lab.cli.options import Commands, add_quiet, demo_bits
from flashmoe_lab.progress import ProgressLine
from flashmoe_lab.study.evaluation import Evaluation, Setting
from flashmoe_lab.study.journal import Journal
from flashmoe_lab.study.questions import Task
from flashmoe_lab.units import format_nbytes
from flashmoe_lab.user_cache import make_directory, user_cache_directory

_SHARES = {  # heading -> figure
    "call parse": "tool_call_parse",
    "call exact": "tool_call_valid",
    "JSON parse": "json_parse",
    "JSON exact": "json_exact",
    "memory": "memory",
    "list": "list",
    "arith": "arith",
}


def _add_evaluate(commands: Commands) -> None:
    command = commands.add_parser(
        "evaluate",
        help="measure exact answers and held-out loss, by bits and by experts of a token",
    )
    command.add_argument("model", help="demo, a published checkpoint, or a packed one")
    command.add_argument(
        "--bits",
        nargs="+",
        type=demo_bits,
        default=[],
        help="of the experts, one or several: 2, 3, 4, 5, 6, 8, none (default 4)",
    )
    command.add_argument(
        "-K",
        "--num-experts-per-tok",
        nargs="+",
        type=int,
        default=[],
        help="also with these, at the first of --bits",
    )
    command.add_argument("--json", type=Path, help="write all figures to this file")
    command.add_argument("--limit", type=int, help="ask a fair sample of this many questions")
    command.add_argument(
        "--prompts", type=Path, help="directory of eval.jsonl and loss.jsonl (default: bundled)"
    )
    add_quiet(command)
    command.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    if options.json and not options.json.absolute().parent.is_dir():
        raise FileNotFoundError(f"{options.json}: there is no such directory for --json")
    evaluation = Evaluation(
        options.model,
        options.bits,
        options.num_experts_per_tok,
        prompts=options.prompts,
        limit=options.limit,
        quiet=options.quiet,
    )
    conditions = evaluation.conditions()
    rows: list[Sequence[str]] = []
    with Journal(_journal_file(options.json, conditions), conditions) as journal:
        if journal.found and not options.quiet:
            print(f"going on after {journal.found} results of {journal.file}", file=sys.stderr)
        line = _Line(evaluation, options.quiet)
        with line:
            for setting, figures in evaluation.run(journal, line.told):
                rows.append(_row(setting, figures))
    print(_table(rows))
    if options.json:
        write_whole(options.json, json.dumps(evaluation.report(), indent=1).encode() + b"\n")
    journal.remove()
    return 0


def _journal_file(json_file: Path | None, conditions: dict[str, Any]) -> Path:
    if json_file:
        return json_file.with_name(json_file.name + ".partial")
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    return make_directory(user_cache_directory() / "evaluate") / f"{key}.partial"


class _Line(ProgressLine):
    """The progress of an evaluation: tokens of work in the place of bytes."""

    def __init__(self, evaluation: Evaluation, quiet: bool) -> None:
        super().__init__("evaluate", evaluation.work, quiet)
        self._of = len(evaluation.settings)
        self._settings: list[Setting] = []
        self._known = 0

    def told(self, setting: Setting, task: Task, known: bool) -> None:
        if setting not in self._settings:
            self._settings.append(setting)
        self._known += task.work if known else 0
        self(task.work)

    def text(self) -> str:
        done, total = self.done_nbytes, self.total_nbytes
        seconds = time.monotonic() - self._start
        words = f"{self._settings[-1]} ({len(self._settings)} of {self._of})"
        here = done - self._known
        left = seconds * (total - done) / here if here else 0.0
        when = f"{_clock(left)} left" if done < total else f"in {_clock(seconds)}"
        return f"evaluate {words}  {done / total:4.0%}  {when}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _row(setting: Setting, figures: dict[str, Any]) -> list[str]:
    shares = [figures[name] for name in _SHARES.values()]
    return [
        str(setting.bits),
        str(setting.num_experts_per_tok),
        f"{figures['loss']:.3f}",
        *("-" if share is None else f"{share:.3f}" for share in shares),
        format_nbytes(figures["read_nbytes_per_token"]),
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    headings = ["bits", "K", "loss", *_SHARES, "asked/token"]
    lines = [headings, *rows]
    wide = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, wide, strict=True))
        for line in lines
    )


COMMANDS = (_add_evaluate,)
