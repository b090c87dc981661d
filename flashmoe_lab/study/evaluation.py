"""How good a model is, by the bits of its experts and by K: exact answers and held-out loss.

Everything runs through the engine that generates: greedy answers to the bundled questions, judged
by `scorer`, and the loss of the bundled passages. Figures of two settings differ by the settings
alone; `conditions` says under what they were made.
"""

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.checkpoint.packed import MANIFEST, PackedCheckpoint
from flashmoe_lab.checkpoint.source import Source
from flashmoe_lab.config import check_num_experts_per_tok
from flashmoe_lab.demo import DEFAULT_BITS, NAME, Bits, demo_directory, is_demo, packed_at
from flashmoe_lab.engine import Engine, EngineSettings
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.study.figures import figures
from flashmoe_lab.study.journal import Journal
from flashmoe_lab.study.questions import Passages, Question, Task, Tasks
from flashmoe_lab.tokenizer import Tokenizer
from flashmoe_lab.version import __version__
from flashmoe_lab.weights import activation_dtype

MAX_TOKENS = 160  # of an answer
_LOSS_ROWS = 256  # rows of logits that float64 takes at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One line of the table: which experts, and how many of them a token uses."""

    bits: Bits
    num_experts_per_tok: int

    def __str__(self) -> str:
        words = "experts as published" if self.bits == "none" else f"{self.bits} bits"
        return f"{words}, K={self.num_experts_per_tok}"


class Evaluation:
    """A model, what it is asked, and in which settings.

    Args:
        model: "demo", a published checkpoint (packed to the user's cache at each of the bits), or a
            packed one.
        bits: of the experts, as `load("demo", bits)` takes them; none for a packed checkpoint. By
            default 4, or what the checkpoint has already.
        num_experts_per_tok: further Ks, at the first of `bits`. The others use the model's own K.
        prompts: the directory of the questions; the bundled ones without.
        limit: ask this many questions only.
        quiet: no progress of packing on standard error.

    Attributes:
        settings: all of them, each once.
        tasks: what is asked.
    """

    def __init__(
        self,
        model: str | Path,
        bits: Sequence[Bits] = (),
        num_experts_per_tok: Sequence[int] = (),
        *,
        prompts: str | Path | None = None,
        limit: int | None = None,
        quiet: bool = False,
    ) -> None:
        self._model, self._quiet = model, quiet
        path = demo_directory() if is_demo(model) else Path(model)
        packed = PackedCheckpoint(path) if (path / MANIFEST).exists() else None
        self._source = packed or Source(path)
        if packed and bits:
            raise ValueError(f"{model}: is packed; it can be evaluated at its own bits only")
        self._bits = tuple(dict.fromkeys(bits)) or (_own_bits(self._source),)
        config = self._source.config
        self._own_k = config.num_experts_per_tok
        self._ks = [
            check_num_experts_per_tok(k, config.num_experts)
            for k in dict.fromkeys(num_experts_per_tok)
        ]
        ks = [(self._bits[0], k) for k in self._ks]
        pairs = dict.fromkeys([*((b, self._own_k) for b in self._bits), *ks])
        # By bits, so that each engine is opened once.
        pairs = sorted(pairs, key=lambda pair: self._bits.index(pair[0]))
        self.settings = [Setting(bits=bits, num_experts_per_tok=k) for bits, k in pairs]
        self.tasks = Tasks.read(Tokenizer(path).encode, prompts, limit)
        self._figures: dict[Setting, dict[str, Any]] = {}

    @property
    def work(self) -> int:
        """Tokens that all settings take, about; `progress` is told of these."""
        return len(self.settings) * sum(task.work for task in self.tasks.in_order())

    def run(
        self, journal: Journal, progress: Callable[[Setting, Task, bool], None]
    ) -> Iterator[tuple[Setting, dict[str, Any]]]:
        """Go through all settings and give the figures of each as it is done.

        Args:
            journal: has what an interrupted run did, and takes what this one does.
            progress: told of each task that is done, and whether it was done before.
        """
        for bits in self._bits:
            checkpoint = self._open(bits)
            identity = _identity(checkpoint)
            with Engine(checkpoint, EngineSettings()) as engine:
                for setting in self.settings:
                    if setting.bits != bits:
                        continue
                    results: dict[str, dict[str, Any]] = {}
                    for task in self.tasks.in_order():
                        key = f"{identity} K={setting.num_experts_per_tok} {task.name}"
                        result = journal.get(key)
                        known = result is not None
                        if result is None:
                            result = _do(engine, task, setting.num_experts_per_tok)
                            journal.add(key, result)
                        results[task.name] = result
                        progress(setting, task, known)
                    found = figures(self.tasks, results)
                    found["read_nbytes_per_token"] = setting.num_experts_per_tok * sum(
                        layer.layout.block_nbytes for layer in checkpoint.layers
                    )
                    found["stored_as"] = checkpoint.label
                    self._figures[setting] = found
                    yield setting, found

    def report(self) -> dict[str, Any]:
        """Figures by bits and by K, None where they are not done, and the conditions."""

        def done(bits: Bits, k: int) -> dict[str, Any] | None:
            return self._figures.get(Setting(bits=bits, num_experts_per_tok=k))

        by_bits = {str(bits): done(bits, self._own_k) for bits in self._bits}
        by_k = {str(k): done(self._bits[0], k) for k in self._ks}
        conditions = {"date": time.strftime("%Y-%m-%d"), **self.conditions()}
        return {"bits": by_bits, "num_experts_per_tok": by_k, "conditions": conditions}

    def conditions(self) -> dict[str, Any]:
        """What the figures depend on besides the settings."""
        cpu = f"{_cpu()}, {os.cpu_count()} cores"
        return {
            "model": str(self._model),
            "weights": _source_identity(self._source),
            "num_experts_per_tok_at_bits": str(self._bits[0]),
            "prompts": self.tasks.digest,
            "questions": len(self.tasks.questions),
            "passages": sum(len(p.texts) for p in self.tasks.passages),
            "max_tokens": MAX_TOKENS,
            "sampling": "greedy",
            "machine": f"{cpu}, {platform.system()} {platform.machine()}",
            "device": str(mx.default_device()),
            "kernels": _kernels(),
            "activations": str(activation_dtype(None)).removeprefix("mlx.core."),
            "versions": {
                "flashmoe_lab": __version__,
                "mlx": version("mlx"),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def _open(self, bits: Bits) -> PackedCheckpoint:
        if isinstance(self._source, PackedCheckpoint):
            return self._source
        name = NAME if is_demo(self._model) else self._source.path.resolve().name
        return packed_at(self._source, name, bits, self._quiet)


def _do(engine: Engine, task: Task, k: int) -> dict[str, Any]:
    start = time.monotonic()
    result = _answer(engine, task, k) if isinstance(task, Question) else _loss(engine, task, k)
    return {**result, "dur_s": round(time.monotonic() - start, 4)}


def _answer(engine: Engine, question: Question, k: int) -> dict[str, Any]:
    done = engine.generate(question.tokens, MAX_TOKENS, num_experts_per_tok=k)
    return {"text": done.text, "tokens": done.tokens}


def _loss(engine: Engine, passages: Passages, k: int) -> dict[str, Any]:
    """Summed loss of the tokens that are measured, how many, and how often each expert was
    chosen."""
    config = engine.config
    chosen = np.zeros((config.num_hidden_layers, config.num_experts), np.int64)

    def count(routing: Routing, path: str) -> None:
        experts = np.array(routing.experts).ravel()
        chosen[int(path.split(".")[1])] += np.bincount(experts, minlength=config.num_experts)

    total, measured = 0.0, 0
    with engine.intercept("layers.*.router", count):
        for ids, trained in passages.texts:
            logits = engine.logits(ids, k)
            places = np.flatnonzero(trained[1:])
            for start in range(0, len(places), _LOSS_ROWS):
                rows = places[start : start + _LOSS_ROWS]
                total += float(_cross_entropy(logits[rows], np.array(ids)[rows + 1]).sum())
            measured += len(places)
    return {"loss": total, "measured": measured, "chosen": chosen.tolist()}


def _cross_entropy(logits: np.ndarray, right: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(right)), right]


def _own_bits(source: Source | PackedCheckpoint) -> Bits:
    if isinstance(source, Source):
        return "none" if source.expert_quantization(0) else DEFAULT_BITS
    found = {layer.layout.quantization for layer in source.layers}
    if len(found) > 1:
        return source.label
    quantization = found.pop()
    return quantization.bits if quantization else "none"


def _source_identity(source: Source | PackedCheckpoint) -> str:
    return source.identity[:16] if isinstance(source, Source) else _identity(source)


def _identity(checkpoint: PackedCheckpoint) -> str:
    """Tells a packed checkpoint from others: its source and how it is stored."""
    digest = hashlib.sha256((checkpoint.path / MANIFEST).read_bytes())
    digest.update((checkpoint.path / "tokenizer.json").read_bytes())
    return digest.hexdigest()[:16]


def _kernels() -> str:
    if mx.default_device() != mx.cpu:
        return "mlx"
    used = kernels.used()
    return used if used == "mlx" else f"{used}, {native.isa()}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
