"""Tracer: follows a run and fills the tables of its trace.

In `flow` mode it looks at the clock where the run waits anyway and adds no wait of its own: after
each native call where the kernels are ours, and where the expert numbers and the logits come where
stages only build a graph. A single token that goes through native layers notes its moments itself,
in its memory, which the tracer copies when it is through. In `stages` mode it evaluates after every
stage, so that each stage's time is exact and the whole is slower. Rows are made when the run is
over, or when what is held for them becomes much; that work is a span of its own, "record".
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from timeit import timeit
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.kernels import native_for, used
from flashmoe_lab.layer import Layer
from flashmoe_lab.model import Model
from flashmoe_lab.probes import Probe
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.state import AttentionState, SequenceState
from flashmoe_lab.token_memory import TokenMemory
from flashmoe_lab.trace import Recorder, Trace
from flashmoe_lab.trace_batch import Batch
from flashmoe_lab.trace_notes import (
    RECORD,
    SAMPLE,
    SETUP,
    Asker,
    Cached,
    Listener,
    Notes,
    clock,
    code,
)
from flashmoe_lab.trace_rows import Rows
from flashmoe_lab.trace_sources import asker, resident
from flashmoe_lab.watch import Watch, finish

_HEAD_WAITED = code(-1, "lm_head", "wait")
_OUTSIDE = ("embed", "norm", "lm_head")
_PARTS = ("input_norm", "mixer", "post_norm", "shared_expert", "experts")


class Tracer(Watch):
    """Records one run.

    Attributes:
        trace: the record, once the run is over.

    Args:
        text: gives what a token adds to the text, token after token.
        conditions: tells what the table `run` is to say beside times; asked when the run begins.
        probes: arrays to keep.
    """

    def __init__(
        self,
        model: Model,
        recorder: Recorder,
        text: Callable[[int], str],
        conditions: Callable[[], dict[str, Any]],
        probes: Sequence[Probe] = (),
    ) -> None:
        self.model, self.recorder = model, recorder
        self.trace: Trace | None = None
        self._conditions, self._probes = conditions, probes
        self.every_stage = self._exact = recorder.facts["mode"] == "stages"
        self._notes = Notes()
        self._rows = Rows(recorder, text)
        self._askers: list[Asker] = []
        self._kernels = ""
        self._state: SequenceState | None = None
        self._length = 0
        self._normed: mx.array | None = None
        self._intercepted: dict[str, None] = {}

    @cached_property
    def layers_by_stage(self) -> frozenset[int]:
        """Those that are probed: their stages must not hide in a native call. Elsewhere it takes
        whatever is told."""
        return frozenset(probe.layer for probe in self._probes if probe.layer is not None)

    @cached_property
    def layers_heard(self) -> frozenset[int]:
        """The same: of the others a token's memory says enough."""
        return self.layers_by_stage

    # What it listens to

    def _listeners(self, native: bool) -> dict[str, Listener]:
        found: dict[str, Listener] = {}
        for name in _OUTSIDE:
            mark = self._notes.mark(code(-1, name, "compute"))
            found[name] = self._after_evaluating(mark) if self._exact else mark
        if not (self._exact or native):
            found = {"lm_head": self._notes.mark(code(-1, "submit", "host"))}
        for layer in self.model.layers:
            by = self._by_stage if self._exact else self._by_call if native else self._by_wait
            found |= {f"layers.{layer.index}.{name}": fn for name, fn in by(layer).items()}
        return found

    def _by_call(self, layer: Layer) -> dict[str, Listener]:
        """Where a layer is two native calls, with the fetch between them, or, if somebody else
        wants its stages, computes each at once."""
        notes, index = self._notes, layer.index
        return {
            "router": notes.routed(code(index, "to_router", "compute"), index, self._askers[index]),
            "shared_expert": notes.mark(code(index, "shared_expert", "compute")),
            "fetch": notes.fetched(code(index, "fetch", "io"), index),
            "block": notes.mark(code(index, "experts", "compute")),
        }

    def _by_wait(self, layer: Layer) -> dict[str, Listener]:
        """Where stages build a graph. Once all is under way that the layer can do without its
        experts, the run waits for their numbers; waiting for them here adds nothing."""
        notes, index = self._notes, layer.index
        submitted = notes.mark(code(index, "submit", "host"))
        routed = notes.routed(code(index, "router", "wait"), index, self._askers[index])
        held: list[Routing] = []

        def wait(result: object) -> None:
            submitted(None)
            routing = held.pop()
            mx.eval(routing.experts)
            routed(routing)

        return {
            "router": held.append,
            "shared_expert": wait,
            "fetch": notes.fetched(code(index, "fetch", "io"), index),
            "experts": notes.mark(code(index, "experts", "host")),
        }

    def _by_stage(self, layer: Layer) -> dict[str, Listener]:
        """After every stage, evaluated."""
        notes, index = self._notes, layer.index
        marks = {name: notes.mark(code(index, name, "compute")) for name in _PARTS}
        listeners = {name: self._after_evaluating(mark) for name, mark in marks.items()}
        residual = notes.mark(code(index, "residual", "compute"))
        listeners["block"] = self._after_evaluating(residual)
        listeners["mixer"] = self._after_evaluating(marks["mixer"], layer)
        routed = notes.routed(code(index, "router", "compute"), index, self._askers[index])
        listeners["router"] = self._after_evaluating(routed)
        listeners["fetch"] = self._after_evaluating(
            notes.fetched(code(index, "fetch", "io"), index)
        )
        return listeners

    def _after_evaluating(self, listener: Listener, mixer_of: Layer | None = None) -> Listener:
        def evaluated(result: Any) -> None:
            finish(result)
            if mixer_of is not None and self._state is not None:
                finish(self._state[mixer_of.index])
            listener(result)

        return evaluated

    def _add_probes(self, native: bool) -> None:
        by_path: dict[str, list[Probe]] = {}
        for probe in self._probes:
            if probe.layer is not None:
                by_path.setdefault(f"layers.{probe.layer}.input_norm", [])
            by_path.setdefault(probe.path, []).append(probe)
        for path, found in by_path.items():
            listener = self._before_probes(path, bool(found), native or self._exact)
            self.listeners[path] = partial(self._probed, path, listener, found)

    def _before_probes(self, path: str, probed: bool, at_once: bool) -> Listener:
        """Closes the span of a stage, so that what its probes take can be told apart."""
        *parts, stage = path.split(".")
        index = int(parts[-1]) if parts else -1
        span = ("submit", "host") if not at_once else (stage, "compute")
        told = self.listeners.get(path) or self._notes.mark(code(index, *span))
        if at_once or not probed:
            return told
        waited = self._notes.mark(code(index, stage, "wait"))
        mixer_of = self.model.layers[index] if stage == "mixer" else None
        evaluated = self._after_evaluating(waited, mixer_of)

        def listener(result: object) -> None:
            told(result)
            evaluated(result)

        return listener

    def _probed(self, path: str, listener: Listener, probes: Sequence[Probe], result: Any) -> None:
        listener(result)
        if path.endswith(".input_norm"):
            self._normed = result
        for probe in probes:
            state = self._state[probe.layer] if self._state and probe.layer is not None else None
            rows = probe.rows(result, self._normed, state)
            self.recorder.keep(probe.name, np.arange(self._length - len(rows), self._length), rows)
        if probes:
            self._notes.mark(RECORD)(None)

    # The run's own moments

    def run_begins(self) -> None:
        """Note the conditions and start the clock."""
        held = [resident(layer) for layer in self.model.layers]
        total = None if None in held else sum(n for n in held if n is not None)
        self.recorder.begin(**self._conditions(), page_cache_nbytes=total)
        self._rows.since_ns = self.recorder.facts["start_ns"]
        k = self.recorder.facts["num_experts_per_tok"]
        self._askers = [asker(layer, k) for layer in self.model.layers]
        self._listen()

    def _listen(self) -> None:
        """Listen to what the kernels of the next pass show; others may be chosen midway."""
        self._kernels = used()
        native = native_for(self.model.dtype)
        self.listeners = self._listeners(native)
        self._add_probes(native)

    def pass_begins(self, phase: str, tokens: Sequence[int], state: SequenceState) -> None:
        """Close the sampler's span, or set-up's, and open a pass."""
        notes, intercepted = self._notes, self.model.intercepted
        if used() != self._kernels:
            self._listen()
        if intercepted:
            self._intercepted |= dict.fromkeys(intercepted)
        notes.plain = len(tokens) == 1 and not intercepted
        self._state, position = state, len(state.tokens)
        self._length = position + len(tokens)
        if phase == "decode":  # its token was chosen: it is open
            now = clock()
            notes.starts.append(now)
            notes.marks += (SAMPLE, now)
            return
        notes.open(phase, position, tokens)
        notes.marks += (SETUP, clock())
        self._bound()
        notes.starts.append(clock())

    def token_begins(self, memory: TokenMemory) -> None:
        """Have it noted what the token does."""
        notes = self._notes
        if not notes.fits(memory):
            if notes.rows:
                self._flush()
            notes.make_room(memory)
        notes.take(memory, self._ask)

    def token_ends(self) -> None:
        """Keep what it left."""
        self._notes.leave()

    def _ask(self, layer: int, experts: Sequence[int]) -> Cached:
        return self._askers[layer].ask(experts)

    def pass_ends(self) -> None:
        """Keep the pass."""
        notes, now = self._notes, clock()
        notes.marks += (_HEAD_WAITED, now)
        notes.ends.append(now)

    def token_chosen(self, token: int, logprobs: np.ndarray) -> None:
        """Note how surprising it is; the numbers are still at hand."""
        notes, now = self._notes, clock()
        surprise = float(logprobs[token]), _entropy(logprobs)
        notes.open("decode", self._length, [token], surprise)
        notes.marks += (SAMPLE, now, RECORD, clock())
        self._bound()

    def _bound(self) -> None:
        """Make rows of all passes that are over once they are many."""
        if self._notes.are_many:
            self._flush()
            self._notes.marks += (RECORD, clock())

    def _flush(self) -> None:
        if self._notes.ends:
            self._rows.add(Batch.of(self._notes))
            self._notes.clear()

    def run_ends(self, finish_reason: str, error: str = "") -> None:
        """Make the last rows, and the trace."""
        self._notes.break_off()
        note_ns = _note_ns()
        self._flush()
        self._rows.record_until(clock(), self._length)
        self.trace = self.recorder.finish(
            finish_reason=finish_reason,
            error=error,
            intercepted=",".join(self._intercepted),
            # Notes were taken while tokens were under way: their number by the time of one.
            record_ns=self._rows.record_ns + round(note_ns * self.recorder.tables["spans"].rows),
            **_held_by(self._state),
        )


def _entropy(logprobs: np.ndarray) -> float:
    """In nats; tokens that cannot be have minus infinity, and nothing times that is nothing."""
    finite = logprobs if logprobs.min() > -100 else np.maximum(logprobs, -100)
    return -float(np.exp(finite) @ finite)


def _note_ns() -> float:
    """What one note takes, measured here."""
    listener = Notes().mark(RECORD)
    return timeit(lambda: listener(None), number=100) * 1e7


def _held_by(state: SequenceState | None) -> dict[str, int]:
    """Bytes that a sequence holds at its end, with the room that its buffers have left."""
    if state is None:
        return {}
    kept = [layer for layer in state.layers if isinstance(layer, AttentionState)]
    kv_nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept)
    return {"kv_nbytes": kv_nbytes, "recurrent_nbytes": state.nbytes - kv_nbytes}
