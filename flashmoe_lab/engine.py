"""Engine: an opened model with its bank, reader, tokenizer and thread. `load` makes one.

A notebook cell, a benchmark and a server run the same engine. It decides nothing about numbers:
exact by default (the model's own K, full prefill, no expert skipped), and every departure is an
argument that the run's summary names.
"""

import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.assembly import build_model
from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.config import ModelConfig, check_num_experts_per_tok
from flashmoe_lab.demo import Bits, open_checkpoint
from flashmoe_lab.engine_card import engine_card
from flashmoe_lab.engine_settings import EngineSettings
from flashmoe_lab.engine_thread import EngineThread, T
from flashmoe_lab.generation import PREFILL_CHUNK, GenerationRequest, generate_tokens
from flashmoe_lab.identity import state_identity
from flashmoe_lab.layer import Layer
from flashmoe_lab.model import Hook
from flashmoe_lab.reading import choose_reading
from flashmoe_lab.run import Run
from flashmoe_lab.run_summary import run_summary
from flashmoe_lab.sampling import Constraint, Sampling
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.stepping import Step, walk
from flashmoe_lab.storage.bank import ExpertBank
from flashmoe_lab.storage.ways import open_reader
from flashmoe_lab.tokenizer import Tokenizer
from flashmoe_lab.watch import NOBODY, Watch, watch_together
from flashmoe_lab.weights import Weights, activation_dtype

if TYPE_CHECKING:
    from flashmoe_lab.chat.prefix_cache import PrefixCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished text: what `generate` returns."""

    text: str
    tokens: list[int]
    finish_reason: str | None
    summary: str = field(repr=False)

    def __str__(self) -> str:
        return self.text


class Engine:
    """See the module.

    Attributes:
        config, model, tokenizer, bank, reader: the parts; `tokenizer` is None where there is no
            tokenizer.json.
        checkpoint: the packed checkpoint on disk.
        settings: how it was opened; `reading`, how it reads.
    """

    def __init__(self, checkpoint: PackedCheckpoint, settings: EngineSettings) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.config: ModelConfig = checkpoint.config
        self.num_experts_per_tok = check_num_experts_per_tok(
            self.config.num_experts_per_tok
            if settings.num_experts_per_tok is None
            else settings.num_experts_per_tok,
            self.config.num_experts,
        )
        self.tokenizer = _tokenizer(checkpoint.path)
        on_cpu = mx.default_device() == mx.cpu
        bank_nbytes = settings.bank_nbytes(checkpoint)
        named = settings.reader, settings.threads, settings.split
        self.reading = choose_reading(checkpoint, bank_nbytes, *named)
        self.reader = open_reader(
            self.reading.reader,
            {layer.layer: layer.path for layer in checkpoint.layers},
            threads=self.reading.threads,
            split=self.reading.split,
            staged=not on_cpu,
        )
        weights = Weights(checkpoint, activation_dtype(settings.dtype))
        self.resident_nbytes = weights.nbytes
        self.bank = ExpertBank(
            checkpoint.layers,
            bank_nbytes,
            workspace=self.num_experts_per_tok,
            policy=settings.policy,
            form="block" if on_cpu else "stacked",
        )
        self.model = build_model(
            checkpoint,
            weights,
            self.bank,
            self.reader,
            num_experts_per_tok=self.num_experts_per_tok,
            verify=settings.verify,
            prefetch=settings.prefetch,
        )
        if settings.checks:
            self.model.check = check_finite
        self._thread = EngineThread()
        if settings.resident:
            self._thread.call(self._fill_bank)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers; each is made of stages that can be called by hand."""
        return self.model.layers

    # Running

    def logits(
        self,
        tokens: Sequence[int],
        num_experts_per_tok: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> np.ndarray:
        """Logits of every position, float32 [T, vocab], from the empty state.

        Raises:
            ValueError: a token id or K out of range.
        """
        request = GenerationRequest(
            prompt=self.encode(tokens),
            max_tokens=0,
            sampling=Sampling(),
            stop_ids=frozenset(),
            num_experts_per_tok=num_experts_per_tok,
            prefill_chunk=prefill_chunk,
        )
        request.check(self.model, generates=False)
        left = threading.Event()  # by an interrupt: the engine is then free for the next call
        try:
            return self._thread.call(
                lambda: self._logits(request, lambda: left.is_set() or self._thread.closing)
            )
        except BaseException:
            left.set()
            raise

    def _logits(self, request: GenerationRequest, cancelled: Callable[[], bool]) -> np.ndarray:
        state, parts = self.model.empty_state(), list[np.ndarray]()
        for start in range(0, len(request.prompt), request.prefill_chunk):
            chunk = request.prompt[start : start + request.prefill_chunk]
            k = request.num_experts_per_tok
            parts.append(np.array(self.model(chunk, state, k, cancelled=cancelled)))
            state.evaluate()
        return np.concatenate(parts)

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        *,
        num_experts_per_tok: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        progress: Callable[[int, int], None] | None = None,
        trace: str | None = None,
        record: Sequence[str] = (),
        record_gb: float = 1.0,
        follow: Sequence[int] = (),
        watch: Watch = NOBODY,
        constraint: Constraint | None = None,
        cache: "PrefixCache | None" = None,
        **sampling: Any,
    ) -> Run:
        """Generate, giving each token as it is made: `for step in engine.stream_generate(...)`.

        Args:
            prompt: text, or token ids.
            max_tokens: tokens at the most.
            num_experts_per_tok: K of this run.
            prefill_chunk: prompt tokens that go through the layers together.
            progress: told (prompt tokens read, of how many), from the engine's thread.
            trace: "flow" or "stages" keeps a record, which is `run.trace` when the run is over.
            record: arrays that the record is to hold, by pattern: "layers.*.mixer.decay".
            record_gb: how much they may take, in 10**9 bytes; `run.record_nbytes` says how much.
            follow: tokens to go on with whatever the model says, as far as they reach.
            watch: who else follows the run, beside its record.
            constraint: what the text must look like, for this run alone; see chat/constraint.py.
            cache: of beginnings that were read before, which this run goes on from and adds to;
                `run.cached_tokens` says how far. Left alone where stages are intercepted.
            sampling: fields of `Sampling` (temperature, top_p, seed, ...); greedy without.

        Raises:
            ValueError: an argument out of range; at once, not with the first token.
        """
        request = GenerationRequest(
            prompt=self.encode(prompt),
            max_tokens=max_tokens,
            sampling=Sampling(**sampling),
            stop_ids=frozenset(self.config.eos_token_ids),
            num_experts_per_tok=num_experts_per_tok,
            prefill_chunk=prefill_chunk,
            follow=follow,
            constraint=constraint,
        )
        request.check(self.model)
        watches = [] if watch is NOBODY else [watch]
        if trace:
            # Only here: the tables' libraries take half a second to import.
            from flashmoe_lab.trace_setup import make_tracer

            watches.insert(0, make_tracer(self, request, trace, record, record_gb))
        elif record:
            raise ValueError(
                f"record={list(record)!r} without trace=: arrays are kept in a trace; "
                "give trace='flow' or 'stages'"
            )
        together = watch_together(watches)

        def work(run: Run) -> None:
            run.intercepted += self.model.intercepted
            prefix, begun = None, self.model.interventions_begun
            if cache is not None and not run.intercepted:
                prefix = cache.open(
                    self.identity(num_experts_per_tok),
                    request.prompt,
                    request.stop_ids,
                    valid=lambda: self.model.interventions_begun == begun,
                )
            responses = generate_tokens(
                self.model,
                self.bank,
                self.tokenizer,
                request,
                run.stats,
                progress,
                lambda: run.stopped or self._thread.closing,
                together,
                prefix,
            )
            if run.carry_out(responses, together) and run.prompt_tokens < len(request.prompt):
                run.finish_reason = "cancelled"  # no response could say so
            run.intercepted += self.model.intercepted

        def ended(run: Run) -> None:
            try:
                work(run)
            except BaseException as error:  # whoever waits for the run must hear of it
                run.put(error)
            finally:
                run.end()

        run = Run(lambda run: self._thread.submit(lambda: ended(run)) and None, num_experts_per_tok)
        run.record_nbytes = together.record_nbytes
        return run

    def generate(
        self, prompt: str | Sequence[int], max_tokens: int = 256, **options: Any
    ) -> Generation:
        """Generate to the end; arguments as for `stream_generate`."""
        run = self.stream_generate(prompt, max_tokens, **options).wait()
        return Generation(
            text=run.text,
            tokens=run.tokens,
            finish_reason=run.finish_reason,
            summary=self.summary(run),
        )

    def step(
        self, prompt: str | Sequence[int], num_experts_per_tok: int | None = None
    ) -> Generator[Step, None, mx.array]:
        """Go through the model stage by stage in the calling thread, stopping after each with its
        result, which shows itself as a card."""
        state = self.model.empty_state()
        steps = self.model.step(self.encode(prompt), state, num_experts_per_tok)
        return walk(steps, state, self.tokenizer)

    def call(self, fn: Callable[[], T]) -> T:
        """Run fn in the engine's thread, between runs, and return what it returns, evaluated: for
        threads that own no MLX stream, as a widget's."""
        return self._thread.call(fn)

    def intercept(self, pattern: str, fn: Hook) -> AbstractContextManager[None]:
        """Within the `with`, see and replace results of stages: see `Model.intercept`."""
        return self.model.intercept(pattern, fn)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; ids are taken as they are."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ValueError(
                f"{self.checkpoint.path}: there is no tokenizer.json; give the prompt as token ids"
            )
        return self.tokenizer.encode(prompt)

    # Saying what was done

    def identity(self, num_experts_per_tok: int | None = None) -> str:
        """What a state of this engine depends on: only an engine of the same can go on from it."""
        k = num_experts_per_tok or self.num_experts_per_tok
        return state_identity(self.checkpoint, self.model.dtype, k)

    def lossy(self, num_experts_per_tok: int | None = None) -> list[str]:
        """What makes a run differ from the packed model's own mathematics, in words; empty if
        nothing does."""
        k, own = num_experts_per_tok or self.num_experts_per_tok, self.config.num_experts_per_tok
        found = [f"K={k} of the model's {own}"] if k < own else []
        if self.model.dtype not in (mx.float32, activation_dtype(None)):
            found.append(f"activations {self.model.dtype}")
        return found

    def summary(self, run: Run) -> str:
        """One honest line: speed, bytes, hits, and under what conditions."""
        return run_summary(self, run)

    def _repr_html_(self) -> str:
        return engine_card(self)

    # Ending

    def close(self) -> None:
        """Stop what is under way and free threads and files."""
        self._thread.close()
        with self.bank.lock:
            self.bank.settle()
        self.reader.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fill_bank(self) -> None:
        for layer in self.layers:
            layer.fetch.preload()


def load(path: str | Path, bits: Bits | None = None, **settings: Any) -> Engine:
    """Open a packed checkpoint, or the bundled model by its name, "demo".

    Args:
        path: a directory made by `flashmoe-lab pack`, or "demo".
        bits: for "demo" alone: what its experts are packed to, 2 to 8 or "none"; 4 without.
        settings: the fields of `EngineSettings`.

    Raises:
        FileNotFoundError, ValueError: what is wrong, naming the file, layer and value.
        MemoryError: the bank does not fit.
    """
    opened_as = EngineSettings(**settings)
    return Engine(open_checkpoint(path, bits), opened_as)


def check_finite(result: Any, path: str) -> None:
    """For `intercept("*", check_finite)`: FloatingPointError at the first stage that gives NaN or
    infinity."""
    if isinstance(result, Routing):
        result = result.weights
    if isinstance(result, mx.array) and not mx.isfinite(result).all().item():
        raise FloatingPointError(f"{path} gave NaN or infinity")


def _tokenizer(path: Path) -> Tokenizer | None:
    if not (path / "tokenizer.json").exists():
        warnings.warn(f"{path}: no tokenizer.json; prompts must be token ids", stacklevel=4)
        return None
    return Tokenizer(path)
