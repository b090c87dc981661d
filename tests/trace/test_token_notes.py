"""What a token leaves in its memory tells of it what listeners would be told."""

import gc
import time
import weakref

import mlx.core as mx
import pytest

from flashmoe_lab import native
from flashmoe_lab.storage.blocks import ReadError
from flashmoe_lab.storage.page_cache import warm
from flashmoe_lab.trace_batch import Batch
from flashmoe_lab.watch import NOBODY, Watch

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu or not native.available, reason="native on a CPU only"
)
PROMPT = [5, 17, 301, 44, 8, 9]


class Listening(Watch):
    """Wants to be told of every layer's router, so that no token goes unheard."""

    def __init__(self):
        self.listeners = {f"layers.{n}.router": lambda result: None for n in range(4)}


@pytest.mark.parametrize("reader", ["pread", "direct", "mmap"])
@pytest.mark.parametrize("bank_gb", [0.0, 0.0001, 0.0003, None])
def test_what_tokens_leave_in_memory_is_what_listeners_hear(
    open_engine, packed, use_kernels, bank_gb, reader
):
    use_kernels("native")
    path = packed("golden/hf", 4)

    def traces_of_both():
        for watch in (NOBODY, Listening()):
            with open_engine(path, bank_gb=bank_gb, reader=reader, split=2) as engine:
                [warm(layer.path) for layer in engine.checkpoint.layers]
                yield engine.stream_generate(PROMPT, 30, trace="flow", watch=watch).wait().trace

    for _ in range(3):  # a page that the kernel is moving counts as the SSD's: not three times
        traces = list(traces_of_both())
        if traces[0].reads.source.equals(traces[1].reads.source):
            break
    memory, heard = traces
    assert memory.routing.equals(heard.routing)
    place = ["token", "layer", "expert", "offset"]
    same = [*place, "nbytes", "source", "wanted", "used"]
    reads = [trace.reads.sort_values(place, ignore_index=True)[same] for trace in traces]
    assert reads[0].equals(reads[1])
    spans = [
        trace.spans[trace.spans.stage.isin(["to_router", "experts"])]
        .groupby(["token", "layer", "stage"], observed=True)
        .size()
        .index.to_list()
        for trace in traces
    ]
    assert spans[0] == spans[1] and len(spans[0]) == 30 * 4 * 2


def test_a_token_whose_read_fails_claims_nothing_of_it(open_engine, packed, monkeypatch):
    """Neither that the bank held those experts, nor that the layer was computed."""
    with open_engine(packed("golden/hf", 4), bank_gb=0.0) as engine:
        submit, asked = engine.reader.submit, []

        def sixth_fails(reads):
            asked.append(reads.layer)
            if len(asked) == 4 + 6:
                raise ReadError(5, "the disk is gone")
            return submit(reads)

        monkeypatch.setattr(engine.reader, "submit", sixth_fails)
        run = engine.stream_generate([5], 5, trace="flow")  # one wave a layer
        with pytest.raises(ReadError):
            run.wait()
    trace = run.trace
    assert set(trace.reads.token) == {0, 1, 2} and set(trace.routing.token) == {0, 1}
    last = trace.reads[trace.reads.token == 2]
    assert last.layer.tolist() == [0] * 3 and (last.nbytes > 0).all()
    spans = trace.spans[(trace.spans.token == 2) & (trace.spans.layer == 1)]
    assert spans.stage.tolist() == ["to_router"]


def test_routers_that_get_another_k_midway(open_engine, packed):
    """Rows are those of the K that ran."""

    class Changing(Watch):
        passes = 0

        def pass_begins(self, phase, tokens, state):
            self.passes += 1
            if self.passes == 4:
                for layer in engine.layers:
                    layer.router.num_experts_per_tok = 2

    with open_engine(packed("golden/hf", 4)) as engine:
        trace = engine.stream_generate(PROMPT, 8, trace="flow", watch=Changing()).wait().trace
    sizes = trace.routing.groupby(["token", "layer"]).size()
    assert [set(sizes[token]) for token in range(6 + 7)] == [{3}] * 8 + [{2}] * 5
    assert set(trace.reads.groupby("token").size().loc[8:]) == {2 * 4}
    assert trace.tokens.token.tolist() == list(range(6 + 8)) and trace.closure > 0.9


def test_a_record_that_nobody_holds_is_gone(open_engine, packed):
    """Its memory and its folder do not wait for the engine's next run."""
    with open_engine(packed("golden/hf", 4)) as engine:
        run = engine.stream_generate(PROMPT, 4, trace="flow").wait()
        folder, trace = run.trace._keep.path, weakref.ref(run.trace)
        assert folder.exists()
        del run
        engine.call(gc.collect)
        assert trace() is None and not folder.exists()


def test_a_pass_within_a_pass_has_memory_of_its_own(open_engine, packed):
    """A hook may run the model on something else while a token is on its way, which is no part of
    the record."""
    within = []

    def another(result, path):
        if len(within) % 2 == 0:  # the one within is intercepted too
            within.append(path)
            engine.model([3], engine.model.empty_state())
            within.append(path)

    with open_engine(packed("golden/hf", 4)) as engine:
        expected = engine.stream_generate(PROMPT, 6, trace="flow").wait()
        with engine.intercept("layers.1.mixer", another):
            found = engine.stream_generate(PROMPT, 6, trace="flow").wait()
    assert len(within) == 2 * 6 and found.tokens == expected.tokens
    assert found.trace.routing.equals(expected.trace.routing)
    asked = ["token", "layer", "expert"]
    found, expected = (run.trace.reads.sort_values(asked)[asked] for run in (found, expected))
    assert found.to_numpy().tolist() == expected.to_numpy().tolist()


def test_moments_are_of_the_clock_that_the_trace_has(open_engine, packed):
    """The kernels ask the system themselves."""

    class Looking(Watch):
        def token_begins(self, memory):
            self.memory, self.before = memory, time.perf_counter_ns()

        def token_ends(self):
            moments = self.memory.parts.moments.ravel().tolist()
            seen.append([self.before, *moments, time.perf_counter_ns()])

    seen = []
    with open_engine(packed("golden/hf", 4), resident=True) as engine:
        engine.stream_generate(PROMPT, 4, watch=Looking()).wait()
    assert len(seen) == 3 and all(moments == sorted(moments) for moments in seen)
    assert all(len(moments) == 1 + 4 * len(engine.layers) + 1 for moments in seen)


def test_a_token_leaves_nothing_for_pythons_collector(open_engine, packed, monkeypatch):
    """It would walk over it in the midst of a later token."""
    kept, of = [], Batch.of

    def looked_at(notes):
        parts = notes.opened, notes.surprise, notes.ids, notes.starts, notes.ends, notes.marks
        kept.append([*map(len, parts)])
        assert not any(gc.is_tracked(number) for part in parts for number in part)
        assert len(notes.routings) == len(notes.chosen) == len(engine.layers)  # of the prompt
        return of(notes)

    monkeypatch.setattr(Batch, "of", looked_at)
    with open_engine(packed("golden/hf", 4), resident=True) as engine:
        engine.stream_generate(PROMPT, 9, trace="flow").wait()
    assert len(kept) == 1 and kept[0][2:5] == [6 + 9, 1 + 9, 1 + 9]
