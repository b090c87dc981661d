"""Stepping through a token by hand: each stage's result with its time, and a card that shows it.

Every result is evaluated before the next stage begins, so its time is its own. What a card shows
comes from the result alone; nothing here computes a model.
"""

from base64 import b64encode
from collections.abc import Generator
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.cards import card
from flashmoe_lab.model import StageResult
from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.state import SequenceState
from flashmoe_lab.tokenizer import Tokenizer
from flashmoe_lab.units import format_nbytes
from flashmoe_lab.watch import finish

_LIKELY = 5  # tokens that the head's card names


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(StageResult):
    """One stage's result.

    Attributes:
        dur_ns: time that the stage took, its result evaluated.
        tokenizer: for the words of the head's card.
    """

    dur_ns: int
    tokenizer: Tokenizer | None = None

    def rows(self) -> dict[str, object]:
        """What the card says."""
        time: dict[str, object] = {"time": f"{self.dur_ns / 1e3:,.0f} us"}
        result = self.result
        if isinstance(result, Routing):
            return time | _routing_rows(result)
        if isinstance(result, Fetched):
            return time | _fetched_rows(result)
        if isinstance(result, mx.array):
            rows = time | _array_rows(result)
            return rows | self._words() if self.path == "lm_head" else rows
        return time | {"result": type(result).__name__}

    def _words(self) -> dict[str, object]:
        p = _softmax(_numbers(self.result)[-1])
        best = np.argsort(-p, kind="stable")[:_LIKELY].tolist()
        names = [repr(self.tokenizer.decode([n])) if self.tokenizer else str(n) for n in best]
        words = (f"{name} {p[n]:.1%}" for name, n in zip(names, best, strict=True))
        return {"most probable next": ", ".join(words)}

    def __repr__(self) -> str:
        return f"<{self.path}: {type(self.result).__name__}, {self.dur_ns / 1e3:,.0f} us>"

    def _repr_html_(self) -> str:
        return card(self.path, self.rows()) + _picture(self.path, self.result)


def walk(
    steps: Generator[StageResult, None, mx.array],
    state: SequenceState,
    tokenizer: Tokenizer | None,
) -> Generator[Step, None, mx.array]:
    """The same steps, each evaluated and timed; `state` is the one that they move on."""
    while True:
        start = perf_counter_ns()
        try:
            step = next(steps)
        except StopIteration as stop:
            return stop.value
        finish(step.result)
        if step.path.endswith(".mixer"):  # what it keeps for later tokens is its own work too
            finish(state[int(step.path.split(".")[1])])
        dur_ns = perf_counter_ns() - start
        yield Step(path=step.path, result=step.result, dur_ns=dur_ns, tokenizer=tokenizer)


def _array_rows(array: mx.array) -> dict[str, object]:
    values = _numbers(array)
    last = values[-1]
    at = int(np.abs(last).argmax())
    return {
        "shape": f"{list(array.shape)} {str(array.dtype).removeprefix('mlx.core.')}",
        "bytes": format_nbytes(array.nbytes),
        "root mean square": f"{np.sqrt((last.astype(np.float64) ** 2).mean()):.4g} (last token)",
        "largest": f"{last[at]:.4g} at {at}",
    }


def _routing_rows(routing: Routing) -> dict[str, object]:
    experts, weights = _numbers(routing.experts)[-1], _numbers(routing.weights)[-1]
    p = _numbers(routing.probabilities)[-1]
    pairs = (f"{e} ({w:.3f})" for e, w in zip(experts.tolist(), weights.tolist(), strict=True))
    rest = np.delete(p, experts)
    margin = f"{p[experts].min() - rest.max():.2g}" if len(rest) else "none left out"
    return {
        "experts of the last token": ", ".join(pairs),
        "probability covered": f"{p[experts].sum():.1%}",
        "margin to the first left out": margin,
        "tokens, K, experts": f"{len(routing.experts)}, {len(experts)}, {len(p)}",
    }


def _fetched_rows(fetched: Fetched) -> dict[str, object]:
    reads = fetched.reads.table
    rows: dict[str, object] = {
        "experts": len(np.unique(fetched.experts)),
        "found in the bank": fetched.hits,
        "read": f"{fetched.misses}, {format_nbytes(fetched.read_nbytes)}",
    }
    if len(reads):
        took = (reads["end_ns"].max() - reads["submit_ns"].min()) / 1e3
        rows["reads took"] = f"{took:,.0f} us, {len(set(reads['thread'].tolist()))} threads"
    return rows


def _numbers(array: mx.array) -> np.ndarray:
    kind = mx.int32 if array.dtype == mx.int32 else mx.float32
    numbers = np.array(array.astype(kind))
    return numbers.reshape(-1, numbers.shape[-1])


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


def _picture(path: str, result: Any) -> str:
    from flashmoe_lab.plots.small import sorted_probabilities, values_strip

    if isinstance(result, Routing):
        words = "probability of every expert, largest first; the chosen in colour"
        chosen = _numbers(result.experts)[-1]
        png = sorted_probabilities(_numbers(result.probabilities)[-1], chosen)
    elif path == "lm_head":
        words = "the 40 most probable tokens, largest first; the first in colour"
        p = np.sort(_softmax(_numbers(result)[-1]))[::-1][:40]
        png = sorted_probabilities(p, np.array([0]))
    elif isinstance(result, mx.array):
        words, png = "values of the last token", values_strip(_numbers(result)[-1])
    else:
        return ""
    return f'<img alt="{words}" title="{words}" width="320" src="{_inline(png)}">'


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
