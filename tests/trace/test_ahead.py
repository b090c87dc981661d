"""What is read before a layer's router has spoken, in the record: who it was for, and whether that
was right."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import native
from flashmoe_lab.stages.expert_fetch import ExpertFetch
from flashmoe_lab.storage.blocks import ReadError
from flashmoe_lab.storage.page_cache import warm
from flashmoe_lab.trace.export import chrome_events, requests

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu or not native.available, reason="native on a CPU only"
)
PROMPT = [5, 17, 301, 44, 8, 9]


def traced(engine, mode="flow", tokens=30):
    return engine.stream_generate(PROMPT, tokens, trace=mode).wait()


@pytest.mark.parametrize(
    "reader, bits", [("pread", 4), ("direct", 4), ("mmap", 4), ("pread", None)]
)
@pytest.mark.parametrize("split", [1, 2])
def test_every_read_is_told_with_what_became_of_it(open_engine, packed, reader, bits, split):
    settings = {"bank_gb": 0.0004 if bits else 0.002, "reader": reader, "split": split}
    with open_engine(packed("golden/hf", bits), prefetch=2, **settings) as engine:
        [warm(layer.path) for layer in engine.checkpoint.layers]
        run = traced(engine)
        block = engine.checkpoint.layers[0].layout.block_nbytes
    trace, stats = run.trace, run.stats
    reads = trace.reads
    assert trace.facts["prefetch"] == 2
    assert reads.nbytes.sum() == stats.prefill.read_nbytes + stats.decode.read_nbytes
    ahead = reads[reads.wanted == "prefetch"]
    assert set(ahead.layer) == {1, 2, 3} and set(ahead.used) == {True, False}
    assert reads[reads.wanted == "demand"].used.all()
    assert ahead.groupby(["token", "layer"]).expert.nunique().max() <= 2
    assert (ahead.groupby(["token", "layer", "expert"]).nbytes.sum() == block).all()
    assert (
        set(reads.source) <= {"bank", "ssd"}
        if reader == "direct"
        else "page_cache" in set(ahead.source)
    )
    named = trace.routing.groupby(["token", "layer"]).expert.apply(set)
    used = reads[reads.used & (reads.token >= 6)].groupby(["token", "layer"]).expert.apply(set)
    assert (used == named[used.index]).all() and len(used) == 29 * 4
    for row in ahead[~ahead.used].itertuples():
        assert row.expert not in named[row.token, row.layer]
    asked = requests(trace)
    assert asked.hit.sum() == stats.prefill.hits + stats.decode.hits
    assert (~asked.hit).sum() == stats.prefill.misses + stats.decode.misses


def test_it_begins_before_the_router_has_spoken(open_engine, packed):
    with open_engine(packed("golden/hf", 4), bank_gb=0.0004, prefetch=2) as engine:
        trace = traced(engine).trace
    routed = trace.spans[trace.spans.stage == "to_router"].set_index(["token", "layer"]).end_ns
    reads = trace.reads[(trace.reads.token >= 6) & (trace.reads.nbytes > 0)]
    before = reads.submit_ns.to_numpy() < routed[list(zip(reads.token, reads.layer, strict=True))]
    assert (before.to_numpy() == (reads.wanted == "prefetch").to_numpy()).all()
    assert before.any() and not before.all()


def test_no_number_is_another(open_engine, packed):
    traces = []
    for prefetch in (0, 3):
        with open_engine(packed("golden/hf", 4), bank_gb=0.0004, prefetch=prefetch) as engine:
            traces.append(traced(engine).trace)
    assert traces[0].routing.equals(traces[1].routing)
    np.testing.assert_array_equal(traces[0].tokens.logprob, traces[1].tokens.logprob)
    assert requests(traces[0]).drop(columns="hit").equals(requests(traces[1]).drop(columns="hit"))


def test_stage_by_stage_nothing_is_read_ahead(open_engine, packed):
    with open_engine(packed("golden/hf", 4), bank_gb=0.0004, prefetch=2) as engine:
        trace = traced(engine, "stages").trace
    assert set(trace.reads.wanted) == {"demand"} and trace.reads.used.all()


def test_no_two_events_of_a_track_overlap(open_engine, packed):
    with open_engine(packed("golden/hf", 4), bank_gb=0.0004, prefetch=2) as engine:
        events = chrome_events(traced(engine).trace)
    ends = {}
    for event in events:
        if event["ph"] == "X":
            track = event["pid"], event["tid"]
            assert event["ts"] >= ends.get(track, 0)
            ends[track] = event["ts"] + event["dur"] - 0.001


def test_a_read_that_failed_for_nothing_is_not_told(open_engine, packed, monkeypatch):
    with open_engine(packed("golden/hf", 4), bank_gb=0.0004, prefetch=2) as engine:
        fetch = type(engine.layers[0].fetch)
        begin_ahead, begun = fetch.begin_ahead, []

        def failing(self, *arguments):
            with monkeypatch.context() as patch:
                submit = engine.reader.submit

                def submitted(reads):
                    begun.append(reads.layer)
                    if len(begun) % 3 == 0:
                        raise ReadError(5, "the disk is gone")
                    return submit(reads)

                patch.setattr(engine.reader, "submit", submitted)
                return begin_ahead(self, *arguments)

        monkeypatch.setattr(fetch, "begin_ahead", failing)
        trace = traced(engine).trace
    ahead = trace.reads[trace.reads.wanted == "prefetch"]
    assert len(ahead) == len(begun) - len(begun) // 3 > 20


def test_what_others_have_waited_for_is_told_once(open_engine, packed, monkeypatch):
    """Its expert is then found in the bank; the reads are told as nobody's."""
    with open_engine(packed("golden/hf", 4), bank_gb=0.0004, prefetch=2) as engine:
        of = ExpertFetch.of

        def settled(self, experts, early=()):
            if early:
                self.bank.settle()
            return of(self, experts, early)

        monkeypatch.setattr(ExpertFetch, "of", settled)
        run = traced(engine)
    trace, stats = run.trace, run.stats
    reads = trace.reads
    named = trace.routing.groupby(["token", "layer"]).expert.apply(sorted)
    used = reads[reads.used & (reads.token >= 6)].groupby(["token", "layer"]).expert.apply(sorted)
    assert (used == named[used.index]).all() and len(used) == 29 * 4
    assert not reads[reads.wanted == "prefetch"].used.any()
    assert reads.nbytes.sum() == stats.prefill.read_nbytes + stats.decode.read_nbytes
    assert requests(trace).hit.sum() == stats.prefill.hits + stats.decode.hits


@pytest.mark.parametrize("at_once", [False, True])
def test_a_pass_that_fails_is_told_as_far_as_it_came(open_engine, packed, monkeypatch, at_once):
    with open_engine(packed("golden/hf", 4), bank_gb=0.0004, prefetch=2) as engine:
        submit, asked = engine.reader.submit, []

        class Failed:
            done = at_once

            def wait(self):
                raise ReadError(5, "the disk is gone")

            def landed(self, least=1):
                return iter(())

        def failing(reads):
            asked.append((reads.layer, len(reads)))
            return Failed() if len(asked) > 60 and reads.layer == 1 else submit(reads)

        monkeypatch.setattr(engine.reader, "submit", failing)
        run = engine.stream_generate(PROMPT, 30, trace="flow")
        with pytest.raises(ReadError, match="the disk is gone"):
            run.wait()
        spans = run.trace.spans
        assert (spans.end_ns >= spans.start_ns).all()
        assert (spans.start_ns.to_numpy()[1:] == spans.end_ns.to_numpy()[:-1]).all()
        monkeypatch.setattr(engine.reader, "submit", submit)
        again = traced(engine)
    reads, stats = again.trace.reads, again.stats
    assert reads.nbytes.sum() == stats.prefill.read_nbytes + stats.decode.read_nbytes


def test_looking_ahead_has_a_span_of_its_own(open_engine, packed):
    """After the fetch has handed over, and before experts are computed with; of all layers but the
    last."""
    with open_engine(packed("golden/hf", 4), bank_gb=0.0004, prefetch=2) as engine:
        trace = traced(engine).trace
    spans = trace.spans[(trace.spans.token >= 6) & (trace.spans.layer >= 0)]
    looked = spans[spans.stage == "look_ahead"]
    assert set(looked.lane) == {"compute"} and set(looked.layer) == {0, 1, 2}
    assert len(looked) == 29 * 3
    begins = spans[~spans.stage.isin(["record"])].drop_duplicates(["token", "layer", "stage"])
    stages = begins.groupby(["token", "layer"]).stage.apply(list)
    for (_, layer), found in stages.items():
        ahead = ["look_ahead"] if layer < 3 else []
        assert found == ["to_router", "fetch", *ahead, "experts"]
    assert trace.closure > 0.9
    with open_engine(packed("golden/hf", 4), prefetch=2) as engine:
        engine.generate(PROMPT, 60)
        if len(engine.bank.contents()) == 32:  # nothing is left to be read
            spans = traced(engine).trace.spans
            assert "look_ahead" not in set(spans.stage)
