"""A run in one honest line: speed, bytes, hits, and under what conditions."""

from typing import TYPE_CHECKING

from flashmoe_lab.run import Run
from flashmoe_lab.storage.bank import ExpertBank
from flashmoe_lab.units import format_nbytes

if TYPE_CHECKING:
    from flashmoe_lab.engine import Engine


def run_summary(engine: "Engine", run: Run) -> str:
    """The line of one run of an engine."""
    prefill, decode = run.stats.prefill, run.stats.decode
    k = run.num_experts_per_tok or engine.num_experts_per_tok
    own_k = engine.config.num_experts_per_tok
    lossy = engine.lossy(run.num_experts_per_tok)
    lossy += [f"intercepted {pattern}" for pattern in dict.fromkeys(run.intercepted)]
    own = "the model's own" + (f" is {own_k}" if k != own_k else "")
    known = f" after {run.cached_tokens} known" if run.cached_tokens else ""
    parts = [
        f"prefill {prefill.tokens} tokens{known} at {prefill.tokens_per_second:.2f} tok/s",
        f"decode {decode.tokens} at {decode.tokens_per_second:.2f} tok/s",
        f"read {format_nbytes(decode.read_nbytes_per_token)} per token",
        f"bank hits {decode.hit_rate:.1%} in decode",
        f"K={k}" + (f" [lossy: {', '.join(lossy)}]" if lossy else f" ({own})"),
        f"experts {engine.checkpoint.label}",
        f"reader {engine.reading}{_ahead_words(engine.settings.prefetch)}",
        _bank_words(engine.bank, engine.settings.resident),
    ]
    if run.trace is not None:
        parts.append(run.trace.summary())
    return "; ".join(parts)


def _ahead_words(prefetch: int) -> str:
    return f", prefetch {prefetch}" if prefetch else ""


def _bank_words(bank: ExpertBank, resident: bool) -> str:
    if not bank.keeps:
        return f"bank 0 (nothing kept; {format_nbytes(bank.nbytes)} workspace)"
    how = "resident, all experts" if resident else bank.policy_name
    return f"bank {format_nbytes(bank.nbytes)} ({bank.slots} slots, {how})"
