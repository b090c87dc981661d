"""Spans: what the run's thread was at is booked as what it was."""

import time

import numpy as np
import pytest

from flashmoe_lab import kernels

PROMPT = [5, 17, 301, 44, 8, 9]
MODES = ("flow", "stages")


@pytest.fixture(params=["native", "mlx"])
def kernel_set(request):
    """Both sets: stages that compute at once, and stages that build a graph."""
    before = kernels.used()
    try:
        kernels.use(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    kernels.use(before)


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
