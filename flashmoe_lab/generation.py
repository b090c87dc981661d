"""Prefill and decode: from token ids to tokens, one response at a time.

It runs in whatever thread calls it and knows nothing of queues or widgets; the engine puts it on
its own thread. Prefill goes layer by layer over a chunk of the prompt, so each chunk reads the
union of its experts once; no expert is skipped.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from flashmoe_lab.config import check_num_experts_per_tok
from flashmoe_lab.model import Cancelled, Model, check_ids
from flashmoe_lab.sampling import Constraint, Sampler, Sampling
from flashmoe_lab.state import SequenceState
from flashmoe_lab.storage.bank import ExpertBank
from flashmoe_lab.storage.page_cache import process_read_nbytes
from flashmoe_lab.tokenizer import TextStream, Tokenizer
from flashmoe_lab.watch import NOBODY, Watch

if TYPE_CHECKING:
    from flashmoe_lab.chat.prefix_cache import Prefix

PREFILL_CHUNK = 512  # tokens; a longer chunk reads each expert less often and takes more memory


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResponse:
    """One generated token, in mlx-lm's words.

    Attributes:
        text: what the token adds to the text; perhaps nothing yet.
        logprobs: float32 [vocab], of the distribution before temperature and cutting.
        prompt_tokens: with those that a prefix cache knew.
        prompt_tps, generation_tps: tokens per second of prefill, and of decode so far.
        peak_memory: GB that MLX held at most.
        finish_reason: None, or why this is the last: "stop" (an end token), "length", "cancelled".
    """

    text: str
    token: int
    logprobs: np.ndarray
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None


@dataclass(slots=True, kw_only=True)
class PhaseStats:
    """What one phase (prefill or decode) took.

    Attributes:
        tokens: prompt tokens read, or model steps taken (a generated token costs one, but the last
            none).
        read_nbytes: bytes that readers brought.
        os_read_nbytes: bytes that the operating system fetched from the disk for this process; None
            if unknown.
    """

    tokens: int = 0
    dur_ns: int = 0
    hits: int = 0
    misses: int = 0
    read_nbytes: int = 0
    os_read_nbytes: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens over time, 0 if there was none."""
        return self.tokens / (self.dur_ns / 1e9) if self.dur_ns else 0.0

    @property
    def read_nbytes_per_token(self) -> float:
        """Bytes read for a token on average."""
        return self.read_nbytes / self.tokens if self.tokens else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were in the bank."""
        total = self.hits + self.misses
        return self.hits / total if total else 0.0


class _Meter:
    """Adds what happens within its `with` blocks to a PhaseStats."""

    def __init__(self, stats: PhaseStats, bank: ExpertBank) -> None:
        self.stats, self.bank = stats, bank

    def __enter__(self) -> None:
        counts = self.bank.counts
        self._start = (counts.hits, counts.misses, counts.read_nbytes)
        self._os = process_read_nbytes()
        self._ns = time.perf_counter_ns()

    def __exit__(self, *exception: object) -> None:
        stats, counts = self.stats, self.bank.counts
        stats.dur_ns += time.perf_counter_ns() - self._ns
        hits, misses, nbytes = self._start
        stats.hits += counts.hits - hits
        stats.misses += counts.misses - misses
        stats.read_nbytes += counts.read_nbytes - nbytes
        now = process_read_nbytes()
        if now is not None and self._os is not None:
            stats.os_read_nbytes = (stats.os_read_nbytes or 0) + now - self._os


@dataclass(slots=True, kw_only=True)
class RunStats:
    """Both phases of a run, and how many tokens of its prompt a prefix cache knew."""

    prefill: PhaseStats = field(default_factory=PhaseStats)
    decode: PhaseStats = field(default_factory=PhaseStats)
    cached_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt so far, read or known."""
        return self.cached_tokens + self.prefill.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        prompt: token ids, at least one.
        num_experts_per_tok: K; None is the model's own.
        prefill_chunk: tokens of the prompt that go through the layers together.
        stop_ids: tokens that end the text.
        follow: tokens to go on with whatever the model says, as far as they reach: another run's,
            to compare with it.
        constraint: what the text must look like, for this run alone.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    follow: Sequence[int] = ()
    constraint: Constraint | None = None
    num_experts_per_tok: int | None = None
    prefill_chunk: int = PREFILL_CHUNK

    def check(self, model: Model, generates: bool = True) -> None:
        """ValueError where the model cannot do this; `generates` False asks for logits only."""
        config = model.config
        if not self.prompt:
            raise ValueError("the prompt is empty; it needs at least one token")
        if generates and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk is {self.prefill_chunk}; it must be at least 1")
        if self.follow and self.constraint:
            raise ValueError("follow and constraint exclude each other: both decide the tokens")
        if self.num_experts_per_tok is not None:
            check_num_experts_per_tok(self.num_experts_per_tok, config.num_experts)
        check_ids([*self.prompt, *self.follow], config.vocab_size)
        length = len(self.prompt) + self.max_tokens
        if length > config.max_position_embeddings:
            raise ValueError(
                f"prompt and max_tokens are {length} tokens together; "
                f"the model was made for {config.max_position_embeddings}"
            )


def prefill(
    model: Model,
    tokens: Sequence[int],
    state: SequenceState,
    num_experts_per_tok: int | None = None,
    chunk: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    watch: Watch = NOBODY,
    prefix: "Prefix | None" = None,
) -> np.ndarray | None:
    """Read what the state lacks of the tokens into it and return the last one's logits float32
    [vocab]; None if cancelled, which may be in the midst of a chunk: the state is then of no more
    use.

    Args:
        progress: told (tokens read, tokens in all) after each chunk.
        prefix: is to keep the state at its marks; a chunk ends there too.
    """
    logits = None
    marks = prefix.marks if prefix else frozenset()
    while (start := state.length) < len(tokens):
        end = min([start + chunk, len(tokens), *(mark for mark in marks if mark > start)])
        watch.pass_begins("prefill", part := tokens[start:end], state)
        try:
            logits = model(
                part, state, num_experts_per_tok, last_only=True, cancelled=cancelled, watch=watch
            )
        except Cancelled:
            return None
        state.evaluate()
        if end == len(tokens):
            mx.eval(logits)
        watch.pass_ends()
        if prefix and end in marks:
            prefix.keep(state)
        if progress is not None:
            progress(end, len(tokens))
    return None if logits is None else np.array(logits[0])


def generate_tokens(
    model: Model,
    bank: ExpertBank,
    tokenizer: Tokenizer | None,
    request: GenerationRequest,
    stats: RunStats,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    watch: Watch = NOBODY,
    prefix: "Prefix | None" = None,
) -> Iterator[GenerationResponse]:
    """Generate one response after another; `stats` grows along. `prefix` gives what it knows of the
    prompt and keeps what is new.

    `cancelled` is asked before every token, and in the prompt between stages; the response in hand
    then is the last.
    """
    request.check(model)
    state, k = model.empty_state(), request.num_experts_per_tok
    vocabulary = min(tokenizer.size, model.config.vocab_size) if tokenizer else None
    vocabulary = vocabulary or model.config.vocab_size
    sampler = Sampler(request.sampling, vocabulary, request.constraint)
    text = tokenizer.stream() if tokenizer else None
    chunk = request.prefill_chunk
    with _Meter(stats.prefill, bank):
        if prefix:
            prefix.restore(state)
        stats.cached_tokens = state.length
        logits = prefill(model, request.prompt, state, k, chunk, progress, cancelled, watch, prefix)
        stats.prefill.tokens = state.length - stats.cached_tokens
    if logits is None:
        return
    recent = list(request.prompt)
    for count in range(1, request.max_tokens + 1):
        token, logprobs = sampler(logits, recent)
        if count <= len(request.follow):
            token = request.follow[count - 1]
        recent.append(token)
        watch.token_chosen(token, logprobs)
        reason = _finish_reason(token, count, request, cancelled)
        yield _response(token, logprobs, count, text, stats, reason)
        if reason:
            if prefix:
                prefix.keep(state)
            return
        with _Meter(stats.decode, bank):
            watch.pass_begins("decode", [token], state)
            logits = np.array(model([token], state, k, watch=watch))[0]
            watch.pass_ends()
            stats.decode.tokens += 1


def _finish_reason(
    token: int, count: int, request: GenerationRequest, cancelled: Callable[[], bool]
) -> str | None:
    if token in request.stop_ids:
        return "stop"
    if count == request.max_tokens:
        return "length"
    return "cancelled" if cancelled() else None


def _text(token: int, text: TextStream, reason: str | None) -> str:
    added = text.add(token) if reason != "stop" else ""
    return added + text.rest() if reason and not added else added


def _response(
    token: int,
    logprobs: np.ndarray,
    count: int,
    text: TextStream | None,
    stats: RunStats,
    reason: str | None,
) -> GenerationResponse:
    return GenerationResponse(
        # An end token ends the text, it is not part of it.
        text=_text(token, text, reason) if text else "",
        token=token,
        logprobs=logprobs,
        prompt_tokens=stats.prompt_tokens,
        prompt_tps=stats.prefill.tokens_per_second,
        generation_tokens=count,
        generation_tps=stats.decode.tokens_per_second,
        peak_memory=mx.get_peak_memory() / 1e9,
        finish_reason=reason,
    )
