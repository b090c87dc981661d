"""Evaluating a tiny model of random weights: the figures, going on, and the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe_lab as fl
from flashmoe_lab import kernels
from flashmoe_lab.bundled import bundled
from flashmoe_lab.cli import main
from flashmoe_lab.study import evaluation as module
from flashmoe_lab.study.evaluation import Evaluation
from flashmoe_lab.study.figures import figures
from flashmoe_lab.study.journal import Journal
from flashmoe_lab.study.questions import Passages, Question, Tasks
from flashmoe_lab.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "data" / "tiny.json"
QUESTIONS = [
    {"kind": "arith", "prompt": "one and one", "check": {"number": 2}},
    {"kind": "list", "prompt": "sort b a", "check": {"text": "a b"}},
    {"kind": "tool", "prompt": "time?", "check": {"call": {"name": "now", "arguments": {}}}},
    {"kind": "json", "prompt": "{}?", "check": {"json": {}}},
]
PASSAGES = [
    {"part": "tales", "segments": [["Once upon a time", True]]},
    {"part": "tales", "segments": [["The end", True]]},
    {"part": "tools", "segments": [["question ", False], ["answer", True]]},
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "tiny"
    arguments = ["synth", str(TINY), str(path), "--layers", "4", "--bits", "none", "--quiet"]
    assert main(arguments) == 0
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts")
    for name, rows in (("eval", QUESTIONS), ("loss", PASSAGES)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 4)
    cache = tmp_path_factory.getbasetemp() / "cache"  # shared: packing is not what is tested here
    monkeypatch.setenv("FLASHMOE_CACHE", str(cache))


def _timeless(report: dict[str, Any]) -> dict[str, Any]:
    for group in ("bits", "num_experts_per_tok"):
        for found in report[group].values():
            found.pop("dur_s", None)  # one setting may stand in both
    return report


def _run(evaluation: Evaluation, file: Path) -> dict[str, Any]:
    with Journal(file, evaluation.conditions()) as journal:
        list(evaluation.run(journal, lambda *told: None))
    return _timeless(evaluation.report())


def test_figures_are_those_of_the_engine(published: Path, prompts: Path, tmp_path: Path) -> None:
    evaluation = Evaluation(published, [4, "none"], [2, 8], prompts=prompts, quiet=True)
    assert [str(setting) for setting in evaluation.settings] == [
        "4 bits, K=8",
        "4 bits, K=2",
        "experts as published, K=8",
    ]
    report = _run(evaluation, tmp_path / "journal")
    assert list(report["bits"]) == ["4", "none"]
    assert list(report["num_experts_per_tok"]) == ["2", "8"]
    assert report["bits"]["4"] == report["num_experts_per_tok"]["8"]
    assert report["bits"]["4"]["read_nbytes_per_token"] == 4 * 8 * 65536
    assert report["num_experts_per_tok"]["2"]["read_nbytes_per_token"] == 4 * 2 * 65536
    assert report["bits"]["4"]["stored_as"].startswith("4 bits")
    assert report["bits"]["none"]["stored_as"] == "BF16"
    tokenizer = Tokenizer(published)
    with fl.load(module.packed_at(fl.Source(published), "tiny", 4, True).path) as engine:
        for k, found in ((8, report["bits"]["4"]), (2, report["num_experts_per_tok"]["2"])):
            losses = []
            for row in PASSAGES:
                parts = [tokenizer.encode(text) for text, _ in row["segments"]]
                ids = sum(parts, [])
                logits = engine.model.reference(ids, k)
                logits -= logits.max(-1, keepdims=True)
                logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                untrained = 1 if len(parts) == 1 else len(parts[0])
                places = range(untrained, len(ids))
                losses.append([-logp[t - 1, ids[t]] for t in places])
            tales, tools = np.mean(losses[0] + losses[1]), np.mean(losses[2])
            assert found["loss_by_part"]["tales"] == pytest.approx(tales, abs=1e-3)
            assert found["loss_by_part"]["tools"] == pytest.approx(tools, abs=1e-3)
            assert found["loss"] == pytest.approx((tales + tools) / 2, abs=1e-3)


def test_answers_are_those_of_the_engine(
    published: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[dict[str, Any], str]] = []
    judge = module.figures.__globals__["scorer"].judge

    def listen(check: dict[str, Any], text: str) -> Any:
        judged.append((check, text))
        return judge(check, text)

    monkeypatch.setattr("flashmoe_lab.study.scorer.judge", listen)
    evaluation = Evaluation(published, prompts=prompts, quiet=True)
    _run(evaluation, tmp_path / "journal")
    with fl.load(module.packed_at(fl.Source(published), "tiny", 4, True).path) as engine:
        for row in QUESTIONS:
            assert (row["check"], engine.generate(row["prompt"], 4).text) in judged
    assert len(judged) == len(QUESTIONS)


@pytest.mark.parametrize("after", [1, 5, 8])
def test_goes_on_where_it_was_interrupted(
    published: Path, prompts: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> Evaluation:
        return Evaluation(published, [4], [2], prompts=prompts, quiet=True)

    right = _run(make(), tmp_path / "whole")
    done = 0

    def interrupt(*told: object) -> None:
        nonlocal done
        done += 1
        if done == after:
            raise KeyboardInterrupt

    with Journal(tmp_path / "journal", make().conditions()) as journal:
        with pytest.raises(KeyboardInterrupt):
            list(make().run(journal, interrupt))
    do, asked = module._do, 0

    def count(*arguments: Any) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return do(*arguments)

    monkeypatch.setattr(module, "_do", count)
    evaluation = make()
    assert _run(evaluation, tmp_path / "journal") == right
    assert asked == 2 * len(evaluation.tasks.in_order()) - after


def test_figures_of_known_results() -> None:
    call = {"call": {"name": "now", "arguments": {}}}
    written = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    answers = {
        "tool": (call, [written, written + " " + written]),
        "tool_chain": (call, ["no"]),
        "json": ({"json": [1]}, ["[1]", "[2]", "[", "[1]"]),
        "memory": ({"text": "x"}, ["x", "y"]),
        "arith": ({"number": 3}, ["1 + 2 = 3"]),
    }
    questions, results = [], dict[str, Any]()
    for kind, (check, texts) in answers.items():
        for n, text in enumerate(texts):
            questions.append(Question(name=f"{kind}{n}", kind=kind, tokens=[1], check=check))
            results[f"{kind}{n}"] = {"text": text, "tokens": [1, 2], "dur_s": 0.5}
    chosen = [[[4, 0, 0, 0, 2, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]], [[0] * 8, [0] * 8]]
    passages = []
    for n, part in enumerate(("b", "b", "a")):
        passages.append(Passages(name=f"p{n}", part=part, texts=[]))
        loss = {"loss": 6.0 + n, "measured": 2, "chosen": chosen[n > 0], "dur_s": 1.0}
        results[f"p{n}"] = loss
    tasks = Tasks(questions=tuple(questions), passages=tuple(passages), digest="")
    found = figures(tasks, results)
    assert found["tool_call_parse"] == found["tool_call_valid"] == 0.3333
    assert (found["json_parse"], found["json_exact"]) == (0.75, 0.5)
    assert (found["memory"], found["list"], found["arith"]) == (0.5, None, 1.0)
    assert found["loss_by_part"] == {"a": 4.0, "b": 3.25}
    assert found["loss"] == 3.625
    assert found["unused_experts"] == 4
    assert found["top_quarter_share"] == [0.75, 0.25]
    assert found["answer_tokens"] == 20
    assert found["dur_s"] == 8.0


# The command


@pytest.fixture
def evaluate(published: Path, prompts: Path) -> Callable[..., int]:
    return lambda *options: main(
        ["evaluate", str(published), "--prompts", str(prompts), *map(str, options)]
    )


def test_command(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "eval.json"
    assert evaluate("--bits", "none", "4", "-K", 1, 8, "--json", file) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    headings = "bits K loss call parse call exact JSON parse JSON exact memory list arith"
    assert " ".join(lines[0].split()) == f"{headings} asked/token"
    assert [line.split()[:2] for line in lines[1:]] == [["none", "8"], ["none", "1"], ["4", "8"]]
    assert len({len(line) for line in lines}) == 1
    assert captured.err.splitlines()[-1].startswith("evaluate 4 bits, K=8 (3 of 3)  100%  in 0:")
    report = json.loads(file.read_text())
    assert list(report["bits"]) == ["none", "4"]
    assert list(report["num_experts_per_tok"]) == ["1", "8"]
    assert report["conditions"]["questions"] == 4
    assert report["conditions"]["passages"] == 3
    assert report["conditions"]["kernels"].split(",")[0] in kernels.KERNELS
    assert report["conditions"]["versions"]["flashmoe_lab"] == fl.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_command_interrupted(
    evaluate: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(engine: fl.Engine, task: object, k: int) -> None:
        if isinstance(task, Passages):
            raise KeyboardInterrupt

        return do(engine, task, k)  # pyright: ignore

    do = module._do
    for options, place in (
        (("--json", tmp_path / "eval.json"), tmp_path / "eval.json.partial"),
        ((), None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_do", interrupted)
            assert evaluate(*options) == 130
        assert "interrupted; run the same command to go on" in capsys.readouterr().err
        assert place is None or place.exists()
        assert evaluate(*options) == 0
        assert "going on after" in capsys.readouterr().err
        assert evaluate(*options) == 0  # measured anew
        assert "going on after" not in capsys.readouterr().err
        assert place is None or not place.exists()


def test_packed_model(
    published: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert main(["pack", str(published), str(packed), "--bits", "3", "--quiet"]) == 0
    capsys.readouterr()
    arguments = ["evaluate", str(packed), "--prompts", str(prompts), "--quiet"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split()[:2] == ["3", "8"]
    assert captured.err == ""
    assert main([*arguments, "--bits", "4"]) == 2
    assert "is packed; it can be evaluated at its own bits only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-K", 65), "between 1 and 64"),
        (("--limit", 0), "limit is 0"),
        (("--json", "/nowhere/x.json"), "no such directory for --json"),
        (("--prompts", "/nowhere"), "/nowhere/eval.jsonl: no such file"),
    ],
)
def test_bad_options(
    evaluate: Callable[..., int],
    options: tuple[object, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(*options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_the_bundled_model_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, prompts = bundled("demo_model"), bundled("prompts")
    if not (weights / "model.safetensors.index.json").exists():
        pytest.skip(f"the weights are not in {weights}")
    if not (prompts / "eval.jsonl").exists():
        pytest.skip(f"the prompts are not in {prompts}")
    monkeypatch.setattr(module, "MAX_TOKENS", 160)
    file = tmp_path / "eval.json"
    assert main(["evaluate", "demo", "--limit", "8", "--json", str(file), "--quiet"]) == 0
    found = json.loads(file.read_text())["bits"]["4"]
    assert found["kinds"]["ALL"]["exact"] >= 0.3
    assert found["loss"] < 3
