"""Tracer: follows a run and fills the tables of its trace.

In `flow` mode it looks at the clock where the run waits anyway and adds no wait of its own: after
each native call where the kernels are ours, and where the expert numbers and the logits come where
stages only build a graph. In `stages` mode it evaluates after every stage, so that
each stage's time is exact and the whole is slower. While a token is under way it only keeps
references and times; rows are made some tokens at a time (trace_rows.py), and that work is a span
of its own, "record".
"""

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.kernels import native_for
from flashmoe_lab.layer import Layer
from flashmoe_lab.model import Model
from flashmoe_lab.probes import Probe
from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.state import SequenceState
from flashmoe_lab.storage.page_cache import Residency, resident_bytes
from flashmoe_lab.trace import Recorder, Trace
from flashmoe_lab.trace.schema import LANES, STAGES
from flashmoe_lab.trace_rows import write_rows
from flashmoe_lab.watch import Watch

_clock = time.perf_counter_ns
_TOKENS_HELD = 32  # decode steps whose rows are made together
_PARTS = ("input_norm", "mixer", "post_norm", "router", "shared_expert", "fetch", "experts")


def code(layer: int, stage: str, lane: str) -> int:
    """Layer, stage and lane of a span in one number."""
    return (layer + 1) << 16 | STAGES.index(stage) << 8 | LANES.index(lane)


_RECORD = code(-1, "record", "host")


@dataclass(slots=True, kw_only=True)
class Chosen:
    """Which experts a layer fetched, and where the bytes were beforehand.

    Attributes:
        routed_ns: when the expert numbers were known.
        cached: expert -> whether the page cache held all of its block; of those that the bank did
            not hold. None where it was not asked, as for direct reads.
    """

    layer: int
    fetched: Fetched
    routed_ns: int
    cached: dict[int, bool] | None


@dataclass(slots=True, kw_only=True)
class Pass:
    """One pass of tokens through the model, before it is made rows of."""

    phase: str
    tokens: Sequence[int]
    position: int
    start_ns: int
    end_ns: int = 0
    logprobs: np.ndarray | None = None  # what its token was chosen from
    routings: list[tuple[int, Routing]] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)


class Tracer(Watch):
    """Records one run.

    Attributes:
        trace: the record, once the run is over.

    Args:
        text: gives what a token adds to the text, token after token.
        facts: what the table `run` is to say beside times.
        probes: arrays to keep.
    """

    def __init__(
        self,
        model: Model,
        recorder: Recorder,
        text: Callable[[int], str],
        facts: dict[str, Any],
        probes: Sequence[Probe] = (),
    ) -> None:
        self.model, self.recorder, self.text = model, recorder, text
        self.trace: Trace | None = None
        self.every_stage = recorder.facts["mode"] == "stages"
        self.listeners = self._listeners()
        self._facts, self.record_nbytes = facts, facts.get("record_nbytes", 0)
        self._spans = array("q")  # position, code, start and end of one after another
        self._passes: list[Pass] = []
        self._pass = Pass(phase="", tokens=(), position=0, start_ns=0)
        self._state: SequenceState | None = None
        self._picked: tuple[int, np.ndarray] | None = None
        self._since = self._routed_ns = self._record_ns = self._length = 0
        self._cached: dict[int, bool] | None = None
        self._askers = {layer.index: _asker(layer) for layer in model.layers}
        self._normed: mx.array | None = None
        self._add_probes(probes)

    # What it listens to

    def _listeners(self) -> dict[str, Callable[[Any], None]]:
        if self.every_stage:
            return self._by_stage()
        return self._by_call() if native_for(self.model.dtype) else self._by_wait()

    def _by_call(self) -> dict[str, Callable[[Any], None]]:
        """Where a layer is two native calls, with the fetch between them."""
        found: dict[str, Callable[[Any], None]] = {
            name: partial(self._span, code(-1, name, "compute"))
            for name in ("embed", "norm", "lm_head")
        }
        for layer in self.model.layers:
            path, index = f"layers.{layer.index}", layer.index
            found[f"{path}.router"] = partial(
                self._chose, code(index, "to_router", "compute"), layer
            )
            found[f"{path}.fetch"] = partial(self._fetched, layer)
            found[f"{path}.block"] = partial(self._span, code(index, "experts", "compute"))
        return found

    def _by_wait(self) -> dict[str, Callable[[Any], None]]:
        found: dict[str, Callable[[Any], None]] = {
            "lm_head": partial(self._span, code(-1, "submit", "host"))
        }
        for layer in self.model.layers:
            path = f"layers.{layer.index}"
            found[f"{path}.router"] = partial(self._decided, layer)
            found[f"{path}.shared_expert"] = partial(self._submitted, layer)
            found[f"{path}.fetch"] = partial(self._fetched, layer)
            found[f"{path}.experts"] = partial(self._span, code(layer.index, "experts", "host"))
        return found

    def _by_stage(self) -> dict[str, Callable[[Any], None]]:
        found = {
            name: partial(self._evaluated, code(-1, name, "compute"), None)
            for name in ("embed", "norm", "lm_head")
        }
        for layer in self.model.layers:
            for name in _PARTS:
                here = code(layer.index, name, "compute")
                found[f"layers.{layer.index}.{name}"] = partial(self._evaluated, here, layer)
            found[f"layers.{layer.index}.router"] = partial(self._evaluated_router, layer)
            found[f"layers.{layer.index}.fetch"] = partial(self._fetched, layer)
        return found

    def _span(self, code: int, result: object) -> None:
        """Something ended now."""
        self._spans.extend((self._pass.position, code, self._since, _clock()))
        self._since = _clock()

    def _decided(self, layer: Layer, routing: Routing) -> None:
        self._pass.routings.append((layer.index, routing))

    def _submitted(self, layer: Layer, result: object) -> None:
        """All that the layer can do without its experts is under way: what the run does next is to
        wait for their numbers, so waiting here adds nothing."""
        self._span(code(layer.index, "submit", "host"), None)
        mx.eval(self._pass.routings[-1][1].experts)
        self._span(code(layer.index, "router", "wait"), None)
        self._ask(layer)

    def _ask(self, layer: Layer) -> None:
        self._routed_ns = self._since
        asker = self._askers[layer.index]
        experts: Any = self._pass.routings[-1][1].experts.tolist()
        self._cached = asker(experts[0] if len(experts) == 1 else set().union(*experts))
        if self._cached:
            self._recorded(self._since)
        else:
            self._since = _clock()

    def _fetched(self, layer: Layer, fetched: Fetched) -> None:
        if self.every_stage:
            fetched.wait()
        self._span(code(layer.index, "fetch", "io"), None)
        self._pass.chosen.append(
            Chosen(
                layer=layer.index,
                fetched=fetched,
                routed_ns=self._routed_ns,
                cached=self._cached,
            )
        )

    def _evaluated(self, code: int, layer: Layer | None, result: Any) -> None:
        self._evaluate(layer, result)
        self._span(code, None)

    def _evaluate(self, layer: Layer | None, result: Any) -> None:
        arrays = [result] if isinstance(result, mx.array) else []
        if layer is not None and self._state is not None:
            state = self._state[layer.index]
            names = ("keys", "values", "conv", "recurrent")
            arrays += [getattr(state, name) for name in names if hasattr(state, name)]
        mx.eval([array for array in arrays if isinstance(array, mx.array)])

    def _evaluated_router(self, layer: Layer, routing: Routing) -> None:
        mx.eval(routing.experts, routing.weights, routing.logits)
        self._chose(code(layer.index, "router", "compute"), layer, routing)

    def _chose(self, code: int, layer: Layer, routing: Routing) -> None:
        self._span(code, None)
        self._decided(layer, routing)
        self._ask(layer)

    def _add_probes(self, probes: Sequence[Probe]) -> None:
        by_path: dict[str, list[Probe]] = {}
        for probe in probes:
            if probe.layer is not None:
                by_path.setdefault(f"layers.{probe.layer}.input_norm", [])
            by_path.setdefault(probe.path, []).append(probe)
        for path, found in by_path.items():
            listener = self.listeners.get(path, lambda result: None)
            is_input = path.endswith(".input_norm")
            self.listeners[path] = partial(self._probed, listener, found, is_input)

    def _probed(
        self,
        listener: Callable[[Any], None],
        probes: Sequence[Probe],
        is_input: bool,
        result: Any,
    ) -> None:
        listener(result)
        since = self._since
        if is_input:
            self._normed = result
        end = self._pass.position + len(self._pass.tokens)
        for probe in probes:
            state = self._state[probe.layer] if self._state and probe.layer is not None else None
            rows = probe.rows(result, self._normed, state)
            self.recorder.keep(probe.name, np.arange(end - len(rows), end), rows)
        if self.every_stage:
            self._recorded(since)  # stages are timed one by one, and this belongs to none

    # The run's own moments

    def run_begins(self) -> None:
        """Start the clock."""
        held = [_resident(layer) for layer in self.model.layers]
        total = None if None in held else sum(n for n in held if n is not None)
        self.recorder.begin(**self._facts, page_cache_nbytes=total)
        self._since = _clock()

    def pass_begins(self, phase: str, tokens: Sequence[int], state: SequenceState) -> None:
        """Close the sampler's span and open a pass."""
        now, self._state = _clock(), state
        self._pass = Pass(phase=phase, tokens=tokens, position=state.length, start_ns=now)
        if self._picked is not None:
            self._spans.extend((state.length, code(-1, "sample", "host"), self._since, now))
            _, self._pass.logprobs = self._picked
            self._picked = None
        self._length = state.length + len(tokens)
        self._since = _clock()

    def pass_ends(self) -> None:
        """Keep the pass; make rows once there are enough."""
        done = self._pass
        self._span(code(-1, "lm_head", "wait"), None)
        done.end_ns = self._since
        self._passes.append(done)
        if done.phase == "prefill" or len(self._passes) >= _TOKENS_HELD:
            self._flush()

    def token_chosen(self, token: int, logprobs: np.ndarray) -> None:
        """Remember it; what it is worth is worked out when its pass begins."""
        self._picked = token, logprobs

    def run_ends(self) -> None:
        """Make the last rows, and the trace."""
        last: list[Pass] = []
        if self._pass.tokens and not self._pass.end_ns:  # an error or a stop in its midst
            last = [replace(self._pass, start_ns=0, routings=[], chosen=[])]
        elif self._picked is not None:  # a last token never goes through the model
            token, logprobs = self._picked
            self._span(code(-1, "sample", "host"), None)
            last = [Pass(phase="decode", tokens=[token], position=self._length, start_ns=0)]
            last[0].logprobs = logprobs
        self._flush()
        write_rows(self.recorder, last, self._taken(), self.text)
        self.trace = self.recorder.finish(record_ns=self._record_ns)

    def _flush(self) -> None:
        start, passes, spans = _clock(), self._passes, self._taken()
        self._passes = []
        self._record_ns += _between(spans)
        write_rows(self.recorder, passes, spans, self.text)
        self._recorded(start)

    def _taken(self) -> np.ndarray:
        """The spans so far, [n, 4]; from now on new ones are kept."""
        spans, self._spans = self._spans, array("q")
        return np.frombuffer(spans, np.int64).reshape(-1, 4)

    def _recorded(self, start: int) -> None:
        """What was done since `start` was for the record alone."""
        now = _clock()
        self._spans.extend((self._pass.position, _RECORD, start, now))
        self._record_ns += now - start
        self._since = _clock()


def _between(spans: np.ndarray) -> int:
    """Time from each span's end to the next one's start: what listening took."""
    return int((spans[1:, 2] - spans[:-1, 3]).sum())


def _asker(layer: Layer) -> Callable[[Iterable[int]], dict[int, bool] | None]:
    """Gives, for each of a layer's experts that the bank does not hold, whether the page cache
    holds all of it; None if the system will not tell, or the reads go past the page cache."""
    file, bank, index = layer.fetch.file, layer.fetch.bank, layer.index
    if layer.fetch.reader.name == "direct":
        return lambda experts: None
    try:
        holds = Residency(file.path).holds
    except (NotImplementedError, PermissionError):
        return lambda experts: None
    offsets, nbytes = [file.offset(n) for n in range(file.num_experts)], file.layout.block_nbytes

    def ask(experts: Iterable[int]) -> dict[int, bool]:
        missing = [n for n in experts if not (bank.keeps and (index, n) in bank)]
        return {n: holds(offsets[n], nbytes) for n in missing}

    return ask


def _resident(layer: Layer) -> int | None:
    try:
        return resident_bytes(layer.fetch.file.path)
    except (NotImplementedError, PermissionError):
        return None
