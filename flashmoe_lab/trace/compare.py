"""Two runs side by side: what one lost in quality, and what it saved in bytes and time.

Both must have gone over the same tokens and kept their logits:

    options = dict(trace="flow", record=["lm_head.logits"])
    a = engine.stream_generate(prompt, **options).wait()
    with engine.intercept("layers.3.router", fl.ban([17])):
        b = engine.stream_generate(prompt, follow=a.tokens, **options).wait()
    fl.compare(a, b)
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from flashmoe_lab.trace.trace import Trace

_LOGITS = "lm_head.logits"


class _Traced(Protocol):
    trace: Trace | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What b differs in from a.

    Attributes:
        tokens: one row a prediction: its phase (the last of a prompt's chunk is prefill), kl_nats
            of b's distribution from a's, top1 agreement, and bytes and time of the pass that made
            it.
        summary: one row: quality over all predictions; bytes and time a token over decode, NaN if
            there was none.
    """

    tokens: pd.DataFrame
    summary: pd.DataFrame

    def __repr__(self) -> str:
        return self.summary.T.to_string(header=False)

    def _repr_html_(self) -> str:
        return self.summary.T.to_html(header=False)


def compare(run_a: "_Traced | Trace", run_b: "_Traced | Trace") -> Comparison:
    """KL divergence and top-1 agreement of each prediction, and what was read and waited.

    Raises:
        ValueError: a run was not traced, kept no logits, or they went over different tokens.
    """
    a, b = _trace(run_a, "first"), _trace(run_b, "second")
    common = _common(a, b)
    tables = [_passes(trace, common) for trace in (a, b)]
    logits = [_log_softmax(_rows(trace, common)) for trace in (a, b)]
    tokens = pd.DataFrame(
        {
            "token": common,
            "phase": a.tokens.set_index("token").phase[common].astype(str).to_numpy(),
            "text": a.tokens.set_index("token").text[common].to_numpy(),
            "kl_nats": _kl(*logits),
            "top1_agrees": logits[0].argmax(-1) == logits[1].argmax(-1),
            "nbytes_a": tables[0].nbytes.to_numpy(),
            "nbytes_b": tables[1].nbytes.to_numpy(),
            "ms_a": tables[0].ms.to_numpy(),
            "ms_b": tables[1].ms.to_numpy(),
        }
    )
    return Comparison(tokens=tokens, summary=_summary(tokens))


def _summary(tokens: pd.DataFrame) -> pd.DataFrame:
    steps = tokens[tokens.phase == "decode"]
    nbytes, ms = (steps[[f"{name}_a", f"{name}_b"]].mean() for name in ("nbytes", "ms"))
    row = {
        "predictions": len(tokens),
        "kl_nats_mean": tokens.kl_nats.mean(),
        "kl_nats_max": tokens.kl_nats.max(),
        "top1_agreement": tokens.top1_agrees.mean(),
        "nbytes_per_token_a": nbytes.iloc[0],
        "nbytes_per_token_b": nbytes.iloc[1],
        "nbytes_saved": _saved(*nbytes),
        "ms_per_token_a": ms.iloc[0],
        "ms_per_token_b": ms.iloc[1],
        "ms_saved": _saved(*ms),
    }
    return pd.DataFrame([row])


def _saved(a: float, b: float) -> float:
    """Share of a that b does without; negative if it needs more."""
    return 1 - b / a if a else 0.0


def _trace(run: Any, which: str) -> Trace:
    trace = run if isinstance(run, Trace) else run.trace
    if trace is None:
        raise ValueError(f"the {which} run has no trace; generate with trace='flow'")
    if _LOGITS not in trace.arrays:
        raise ValueError(f"the {which} run kept no logits; generate with record=[{_LOGITS!r}]")
    return trace


def _common(a: Trace, b: Trace) -> np.ndarray:
    """Positions that both predicted from, with the same tokens up to there."""
    ids = [trace.tokens.set_index("token")["id"] for trace in (a, b)]
    length = min(len(ids[0]), len(ids[1]))
    same = ids[0].to_numpy()[:length] == ids[1].to_numpy()[:length]
    reach = length if same.all() else int(same.argmin())
    both = np.intersect1d(a.arrays[_LOGITS][0], b.arrays[_LOGITS][0])
    common = both[both < reach]
    if not len(common):
        raise ValueError(
            "the runs went over different tokens; generate the second with follow=run_a.tokens"
        )
    return common


def _rows(trace: Trace, positions: np.ndarray) -> np.ndarray:
    held, rows = trace.arrays[_LOGITS]
    return rows[np.searchsorted(held, positions)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divergence of b from a in nats, of each row of log-probabilities."""
    can_be = np.isfinite(a)
    apart = np.subtract(a, b, where=can_be, out=np.zeros_like(a))
    return np.maximum((np.exp(a) * apart).sum(-1), 0.0)  # rounding may leave less than nothing


def _passes(trace: Trace, positions: np.ndarray) -> pd.DataFrame:
    """nbytes and ms of the passes that ended at these positions."""
    tokens = trace.tokens.set_index("token")
    start, end = tokens.start_ns[positions], tokens.end_ns[positions]
    # A chunk's reads bear its first position.
    first = tokens.reset_index().groupby("start_ns").token.min()
    sums = trace.reads.groupby("token").nbytes.sum()
    nbytes = start.map(first).map(sums).fillna(0)
    return pd.DataFrame({"nbytes": nbytes, "ms": (end - start) / 1e6})
