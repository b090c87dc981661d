"""Spans: what the run's thread was at is booked as what it was."""

import time

import pytest

from flashmoe_lab.probes import Probe

PROMPT = [5, 17, 301, 44, 8, 9]
MODES = ("flow", "stages")


def _trace(engine, mode, tokens=8, **options):
    return engine.stream_generate(PROMPT, tokens, trace=mode, **options).wait().trace


class _Slow:
    """Reads that come late."""

    slept_ns = 0

    def __init__(self, pending):
        self._pending = pending
        self._late = True

    def _sleep(self):
        if self._late:
            start, self._late = time.perf_counter_ns(), False
            time.sleep(0.004)
            _Slow.slept_ns += time.perf_counter_ns() - start

    @property
    def done(self):
        return self._pending.done

    def wait(self):
        self._sleep()
        return self._pending.wait()

    def landed(self, least=1):
        self._sleep()
        yield from self._pending.landed(least)


@pytest.mark.parametrize("mode", MODES)
def test_waiting_for_reads_is_io(open_engine, packed, kernel_set, mode, monkeypatch):
    """Also where a layer's experts come in waves, and with computing between."""
    with open_engine(packed("golden/hf", 4), bank_gb=0.0) as engine:
        submit = engine.reader.submit
        monkeypatch.setattr(engine.reader, "submit", lambda reads: _Slow(submit(reads)))
        _Slow.slept_ns = 0
        trace = _trace(engine, mode)
    spans = trace.spans
    assert _Slow.slept_ns > 8 * 4 * 4_000_000
    assert trace.lane_ns["io"] >= _Slow.slept_ns
    assert (spans[spans.lane == "io"].stage == "fetch").all()
    starts, ends = spans.start_ns.to_numpy(), spans.end_ns.to_numpy()
    assert (starts[1:] >= ends[:-1]).all() and (ends >= starts).all()
    work = spans[spans.layer >= 0]
    dur = (work.end_ns - work.start_ns)[work.stage == "experts"]
    assert dur.median() < 4_000_000


def _stages(trace):
    """The stages of a layer's spans at each token, as sets of sequences by layer."""
    spans = trace.spans[(trace.spans.layer >= 0) & (trace.spans.stage != "record")]
    found: dict[int, set[tuple[str, ...]]] = {}
    for (_, layer), group in spans.groupby(["token", "layer"]):
        found.setdefault(layer, set()).add(tuple(group.stage))
    return found


_NATIVE = ("to_router", "fetch", "experts")
_STAGED = ("to_router", "shared_expert", "fetch", "experts")


def test_a_layer_that_somebody_else_steps_through_has_true_names(open_engine, packed, use_kernels):
    use_kernels("native")
    with open_engine(packed("golden/hf", 4), resident=True) as engine:
        assert _stages(_trace(engine, "flow")) == {n: {_NATIVE} for n in range(4)}
        with engine.intercept("layers.1.mixer", lambda result, path: None):
            trace = _trace(engine, "flow")
    assert _stages(trace) == {0: {_NATIVE}, 1: {_STAGED}, 2: {_NATIVE}, 3: {_NATIVE}}
    assert trace.facts["intercepted"] == "layers.1.mixer"


@pytest.mark.parametrize("mode", MODES)
def test_what_probes_take_is_recording(open_engine, packed, kernel_set, mode, monkeypatch):
    rows, slept = Probe.rows, []

    def late(*arguments):
        found, start = rows(*arguments), time.perf_counter_ns()
        time.sleep(0.004)
        slept.append(time.perf_counter_ns() - start)
        return found

    monkeypatch.setattr(Probe, "rows", late)
    record = ["layers.1.mixer.output", "layers.2.router.logits", "lm_head.logits"]
    with open_engine(packed("golden/hf", 4), resident=True) as engine:
        trace = _trace(engine, mode, record=record)
        plain = _stages(_trace(engine, mode))
    spans = trace.spans
    dur = spans.end_ns - spans.start_ns
    assert dur[spans.stage == "record"].sum() >= sum(slept) and len(slept) == 3 * 8
    assert trace.facts["record_ns"] >= sum(slept)
    assert dur[(spans.stage != "record") & (spans.layer >= 0)].median() < 4_000_000
    assert trace.facts["arrays"] == 3 and "3 arrays kept" in trace.summary()
    # Layers that nobody probes run as they do without a probe.
    assert {n: _stages(trace)[n] for n in (0, 3)} == {n: plain[n] for n in (0, 3)}


def test_nothing_lies_between_spans(open_engine, packed, kernel_set):
    with open_engine(packed("golden/hf", 4), bank_gb=0.0) as engine:
        trace = _trace(engine, "flow", tokens=80)
    starts, ends = trace.spans.start_ns.to_numpy(), trace.spans.end_ns.to_numpy()
    assert (starts[1:] == ends[:-1]).all() and starts[0] == trace.facts["start_ns"]
    assert trace.closure > 0.95
