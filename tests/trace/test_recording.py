"""A recorded run: the record is true, and the run is the same as without it."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import flashmoe_lab as fl
from flashmoe_lab import kernels, trace_notes
from flashmoe_lab.interventions import by_mass
from flashmoe_lab.storage.blocks import ReadError
from flashmoe_lab.storage.page_cache import evict, process_read_nbytes, warm
from flashmoe_lab.trace import Recorder
from flashmoe_lab.watch import NOBODY, Watch
from tests.trace.test_export import check_chrome

PROMPT = [5, 17, 301, 44, 8, 9]
MODES = ("flow", "stages")


def _run(engine, mode=None, tokens=8, **options):
    return engine.stream_generate(PROMPT, tokens, trace=mode, **options).wait()


def _evict(engine):
    for layer in engine.checkpoint.layers:
        if evict(layer.path):
            pytest.skip("this file system keeps its pages")


@pytest.mark.parametrize("mode", MODES)
def test_recording_changes_no_token_and_no_logit(open_engine, packed, kernel_set, mode):
    with open_engine(packed("golden/hf", 4), bank_gb=0.0) as engine:
        plain, traced = _run(engine), _run(engine, mode)
        assert traced.tokens == plain.tokens and plain.trace is None
        again = [r.logprobs for r in engine.stream_generate(PROMPT, 4, trace=mode)]
        right = [r.logprobs for r in engine.stream_generate(PROMPT, 4)]
        assert np.array_equal(again, right)


@pytest.mark.parametrize("mode", MODES)
def test_k_rows_for_every_token_and_layer(open_engine, packed, kernel_set, mode):
    with open_engine(packed("golden/hf", 4)) as engine:
        trace = _run(engine, mode, prefill_chunk=4).trace
    sizes = trace.routing.groupby(["token", "layer"]).size()
    assert len(sizes) == (6 + 7) * 4 and set(sizes) == {3}
    weights = trace.routing.groupby(["token", "layer"]).weight.sum()
    assert np.allclose(weights, 1, atol=1e-4)
    ranks = trace.routing.groupby(["token", "layer"])["rank"].apply(list)
    assert all(row == [0, 1, 2] for row in ranks)
    assert (trace.routing.margin > 0).all()


def test_tokens_are_the_runs(open_engine, packed):
    with open_engine(packed("golden/hf", 4)) as engine:
        run = _run(engine, "flow", prefill_chunk=4)
    tokens = run.trace.tokens
    assert tokens.token.tolist() == list(range(14))
    assert tokens["id"].tolist() == PROMPT + run.tokens
    assert tokens.phase.tolist() == ["prefill"] * 6 + ["decode"] * 8
    assert tokens.start_ns.nunique() == 2 + 7 + 1  # two chunks, seven steps, and none for the last
    assert tokens.end_ns.iloc[-1] == 0 and (tokens.end_ns[:-1] > tokens.start_ns[:-1]).all()


def test_log_probability_and_entropy_are_the_distributions(open_engine, packed):
    with open_engine(packed("golden/hf", 4)) as engine:
        run = engine.stream_generate(PROMPT, 5, trace="flow")
        steps = list(run)
    tokens = run.trace.tokens[6:]
    assert run.trace.tokens.logprob[:6].isna().all()
    assert tokens.logprob.tolist() == pytest.approx([s.logprobs[s.token] for s in steps])
    entropies = [-(np.exp(s.logprobs) * s.logprobs).sum() for s in steps]
    assert tokens.entropy.tolist() == pytest.approx(entropies, rel=1e-4)


def test_routing_is_what_the_reference_chooses(open_engine, packed):
    with open_engine(packed("golden/hf")) as engine:
        trace = _run(engine, "flow", prefill_chunk=4).trace
        ids = trace.tokens["id"].to_numpy()[:-1]
        x = engine.model.embed.reference(ids)
        for layer in engine.layers:
            h = x + layer.mixer.reference(layer.input_norm.reference(x))
            experts, weights = layer.router.reference(layer.post_norm.reference(h))
            mine = trace.routing[trace.routing.layer == layer.index].sort_values(["token", "rank"])
            assert mine.expert.to_numpy().reshape(experts.shape).tolist() == experts.tolist()
            assert np.allclose(mine.weight.to_numpy().reshape(weights.shape), weights, atol=1e-4)
            x = layer.reference(x)


@pytest.mark.parametrize("reader, cold, source", [
    ("direct", True, "ssd"), ("pread", True, "ssd"), ("pread", False, "page_cache"),
])  # fmt: skip
def test_source_agrees_with_residency(open_engine, packed, reader, cold, source):
    """No bank, and one read of each expert at most: every row must say the same.

    In a cold run the kernel's reading ahead may overtake a read that is on its way, whose bytes are
    then rightly said to come from the page cache: some runs in five go without.
    """
    path = packed("golden/hf", 4)
    for _ in range(5):
        with open_engine(path, bank_gb=0.0, reader=reader, num_experts_per_tok=8) as engine:
            _evict(engine) if cold else [warm(layer.path) for layer in engine.checkpoint.layers]
            run = engine.stream_generate([1], 1, trace="flow")
            before = process_read_nbytes()
            reads = run.wait().trace.reads
            after = process_read_nbytes()
        assert len(reads) == 4 * 8 and (reads.nbytes > 0).all()
        if before is not None and after is not None:  # what the kernel says that it fetched
            assert (after - before >= reads.nbytes.sum()) == (source == "ssd")
        if set(reads.source) == {source}:
            break
    assert set(reads.source) == {source}


def test_what_the_bank_holds_is_no_read(open_engine, packed):
    with open_engine(packed("golden/hf", 4), resident=True) as engine:
        trace = _run(engine, "flow").trace
    assert set(trace.reads.source) == {"bank"} and trace.reads.nbytes.sum() == 0
    assert set(trace.reads.thread) == {-1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bank_gb", [0.0, 0.0003])
def test_reads_are_all_there(open_engine, packed, kernel_set, mode, bank_gb):
    """Bytes, hits and misses equal the run's own counts, waves of a chunk included."""
    with open_engine(packed("golden/hf", 4), bank_gb=bank_gb, split=2) as engine:
        run = _run(engine, mode, tokens=20)
        reads, stats = run.trace.reads, run.stats
        files = {layer.layer: layer for layer in engine.checkpoint.layers}
    total = stats.prefill.read_nbytes + stats.decode.read_nbytes
    assert reads.nbytes.sum() == total > 0
    blocks = reads.drop_duplicates(["token", "layer", "expert"])
    assert (blocks.nbytes == 0).sum() == stats.prefill.hits + stats.decode.hits
    assert (blocks.nbytes > 0).sum() == stats.prefill.misses + stats.decode.misses
    asked = run.trace.routing.groupby(["token", "layer"]).expert.apply(set)
    steps = blocks[blocks.token >= 6].groupby(["token", "layer"]).expert.apply(set)
    assert (steps == asked[steps.index]).all() and len(steps) == 19 * 4
    for row in reads[reads.nbytes > 0].itertuples():
        begin = files[row.layer].offset(row.expert)
        end = begin + files[row.layer].layout.block_nbytes
        assert begin <= row.offset < row.offset + row.nbytes <= end
    assert (reads.submit_ns <= reads.start_ns).all() and (reads.start_ns <= reads.end_ns).all()


@pytest.mark.parametrize("mode", MODES)
def test_spans_lie_in_the_run_one_after_another(open_engine, packed, kernel_set, mode):
    with open_engine(packed("golden/hf", 4), bank_gb=0.0) as engine:
        trace = _run(engine, mode, tokens=80).trace
    spans, facts = trace.spans, trace.facts
    assert (spans.start_ns.to_numpy()[1:] >= spans.end_ns.to_numpy()[:-1]).all()
    assert (spans.end_ns >= spans.start_ns).all()
    assert facts["start_ns"] <= spans.start_ns.min() and spans.end_ns.max() <= facts["end_ns"]
    assert trace.closure > 0.95 and facts["mode"] == mode
    check_chrome(fl.trace.export.chrome_events(trace))


def test_stages_mode_times_every_stage(open_engine, packed, kernel_set):
    with open_engine(packed("golden/hf", 4)) as engine:
        trace = _run(engine, "stages").trace
    spans = trace.spans[(trace.spans.layer >= 0) & (trace.spans.stage != "record")]
    names = ["input_norm", "mixer", "post_norm", "router", "shared_expert"]
    names += ["fetch", "experts", "residual"]
    for _, group in spans.groupby(["token", "layer"]):
        assert group.stage.tolist() == names
    outside = trace.spans[trace.spans.layer < 0].stage.value_counts()
    # Choosing a token and handing it over; between them its surprise is worked out for the record.
    assert outside["embed"] == outside["norm"] == 8 and outside["sample"] == 2 * 8


def test_flow_mode_waits_only_where_the_run_does(open_engine, packed, use_kernels):
    use_kernels("mlx")
    with open_engine(packed("golden/hf", 4)) as engine:
        spans = _run(engine, "flow").trace.spans
    waits = spans[spans.lane == "wait"]
    assert (waits.stage == "router").sum() == 8 * 4 and (waits.stage == "lm_head").sum() == 8
    assert "compute" not in set(spans.lane)  # nothing says when the device was at what


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_other_kernels_midway_lose_nothing(open_engine, packed, kernel_set, mode, watched):
    """`watched`: by somebody else too."""
    if not kernels.native.available:
        pytest.skip("there is one set")
    other = "mlx" if kernel_set == "native" else "native"

    def choose(done, total):  # between one part of the prompt and the next
        kernels.use(other if done == 2 else kernel_set)

    watch = Watch() if watched else NOBODY
    with open_engine(packed("golden/hf", 4)) as engine:
        trace = _run(engine, mode, prefill_chunk=2, progress=choose, watch=watch).trace
    sizes = trace.routing.groupby(["token", "layer"]).size()
    assert len(sizes) == (6 + 7) * 4 and set(sizes) == {3}


def test_a_stopped_run_keeps_its_record(open_engine, packed):
    with open_engine(packed("golden/hf", 4)) as engine:
        run = engine.stream_generate(PROMPT, 200, trace="flow")
        for count, _ in enumerate(run):
            if count == 3:
                break
    tokens = run.trace.tokens
    assert 4 <= len(tokens) - 6 < 200 and tokens["id"][:6].tolist() == PROMPT
    assert run.trace.facts["finish_reason"] == "cancelled" and not run.trace.facts["error"]


def test_an_error_is_raised_and_the_record_kept(open_engine, packed):
    def fail(result, path):
        if engine.model.state.length == 8:
            raise FloatingPointError("enough")

    with open_engine(packed("golden/hf", 4)) as engine:
        run = engine.stream_generate(PROMPT, 50, trace="flow")
        with engine.intercept("layers.2.router", fail), pytest.raises(FloatingPointError):
            run.wait()
    trace, stats = run.trace, run.stats
    assert len(trace.tokens) == 6 + 3 and set(trace.routing.token) == set(range(8))
    assert trace.facts["finish_reason"] == "error" and trace.facts["intercepted"]
    assert trace.facts["error"] == "FloatingPointError: enough"
    # What the token in hand had done before it is there too.
    assert set(trace.reads[trace.reads.token == 8].layer) == {0, 1}
    assert trace.reads.nbytes.sum() == stats.prefill.read_nbytes + stats.decode.read_nbytes > 0
    assert set(trace.spans[trace.spans.token == 8].layer) == {-1, 0, 1}


def test_a_hook_may_give_other_types(open_engine, packed, kernel_set):
    def other(routing, path):
        logits = routing.logits.astype(mx.float16) if kernel_set == "mlx" else routing.logits
        return replace(routing, experts=routing.experts.astype(mx.int64), logits=logits)

    with open_engine(packed("golden/hf", 4)) as engine:
        right = _run(engine, "flow").trace.routing
        with engine.intercept("layers.2.router", other):
            run = _run(engine, "flow")
            assert run.tokens == _run(engine).tokens
    found = run.trace.routing
    first = right.token < 6  # later ones may go elsewhere: the weights are rounded
    assert found[first].expert.tolist() == right[first].expert.tolist()
    assert np.allclose(found[first].weight, right[first].weight, atol=1e-3)


def test_places_that_an_intervention_leaves_empty_have_no_rows(open_engine, packed):
    counts = []

    def fewer(routing, path):
        left = by_mass(0.6)(routing, path)
        counts.extend((np.array(left.weights) > 0).sum(-1).tolist())
        return left

    with open_engine(packed("golden/hf", 4)) as engine:
        with engine.intercept("layers.1.router", fewer):
            routing = engine.stream_generate(PROMPT, 1, trace="flow").wait().trace.routing
    layer = routing[routing.layer == 1].groupby("token")
    assert set(counts) == {1, 2} and layer.size().tolist() == counts
    assert (layer.expert.nunique() == layer.size()).all()
    assert np.allclose(layer.weight.sum(), 1, atol=1e-4) and (routing.weight > 0).all()


def test_of_a_read_that_fails_the_others_are_kept(open_engine, packed, monkeypatch):
    """A prompt's layer comes in three waves; the second cannot be read."""
    with open_engine(packed("golden/hf", 4), bank_gb=0.0) as engine:
        submit, asked = engine.reader.submit, []

        def second_fails(reads):
            asked.append([read.expert for read in reads])
            pending = submit(reads)
            if len(asked) == 2:

                def wait():
                    raise ReadError(5, "the disk is gone")

                monkeypatch.setattr(pending, "wait", wait)
            return pending

        monkeypatch.setattr(engine.reader, "submit", second_fails)
        run = engine.stream_generate(PROMPT, 5, trace="flow")
        with pytest.raises(ReadError):
            run.wait()
    reads = run.trace.reads
    assert reads.expert.tolist() == asked[0] and (reads.source != "bank").all()
    assert len(asked) == 2 and len(asked[0]) == 3


@pytest.mark.parametrize("limit", ["rows in memory", "what is held for rows"])
def test_a_long_run_is_bounded_and_loses_nothing(open_engine, packed, monkeypatch, limit):
    with open_engine(packed("golden/hf", 4)) as engine:
        right = _run(engine, "flow", tokens=60).trace
        if limit == "rows in memory":
            monkeypatch.setattr(Recorder.__init__, "__defaults__", ("flow", 100))
            assert Recorder().tables["routing"].max_rows == 100
        else:
            monkeypatch.setattr(trace_notes, "_HELD_NBYTES", 5_000)
        bounded = _run(engine, "flow", tokens=60).trace
    columns = ["token", "layer", "rank", "expert", "probability", "weight", "margin"]
    assert bounded.routing[columns].equals(right.routing[columns])
    same = ["token", "id", "phase", "logprob", "entropy"]
    assert bounded.tokens[same].equals(right.tokens[same])
    assert len(bounded.reads.drop_duplicates(["token", "layer", "expert"])) == len(right.reads)
    spans = bounded.spans
    assert (spans.start_ns.to_numpy()[1:] >= spans.end_ns.to_numpy()[:-1]).all()
    flushes = (spans.stage == "record").sum() - 60  # a token's surprise is recording too
    assert (flushes > 3) == (limit != "rows in memory")


def test_run_says_its_conditions(open_engine, packed):
    with open_engine(packed("golden/hf", 4), bank_gb=0.0, threads=3) as engine:
        run = engine.stream_generate(
            PROMPT, 3, trace="flow", num_experts_per_tok=2, seed=9, temperature=0.5
        ).wait()
        words = engine.summary(run)
        dtype, conv = engine.model.dtype, engine.config.recurrent_nbytes(4)
        kv = engine.config.kv_nbytes_per_token(4) * 256  # buffers grow by that many tokens
    facts = run.trace.facts
    assert facts["finish_reason"] == "length" and facts["lossy"] == "K=2 of the model's 3"
    assert facts["kernels"] == kernels.used() and f"mlx.core.{facts['activations']}" == str(dtype)
    assert facts["kv_nbytes"] == kv and facts["recurrent_nbytes"] == conv
    assert facts["intercepted"] == ""
    assert facts["num_experts_per_tok"] == 2 and facts["model_num_experts_per_tok"] == 3
    assert facts["seed"] == 9 and facts["threads"] == 3 and not facts["bank_keeps"]
    assert facts["prompt_tokens"] == 6 and facts["experts"] == "4 bits, group 64"
    assert "trace (flow): 9 tokens" in words and "spans explain" in words


def test_the_bank_is_asked_when_the_run_begins(open_engine, packed, monkeypatch):
    """Not by who asks for the run, while another may be changing it."""
    with open_engine(packed("golden/hf", 4)) as engine:
        contents, owned = engine.bank.contents, []

        def watched():
            owned.append(engine.bank.lock._is_owned())  # pyright: ignore
            return contents()

        monkeypatch.setattr(engine.bank, "contents", watched)
        run = engine.stream_generate(PROMPT, 3, trace="flow")
        assert owned == []
        engine.generate(PROMPT, 3)
        held = len(contents())
        assert held > 0 and run.wait().trace.facts["bank_held"] == held
    assert owned == [True]


def test_trace_modes_are_checked_at_once(engine):
    with pytest.raises(ValueError, match="trace is 'quick'; it must be one of 'flow', 'stages'"):
        engine.stream_generate(PROMPT, 3, trace="quick")


def test_follow_goes_over_another_runs_tokens(open_engine, packed):
    with open_engine(packed("golden/hf", 4)) as engine:
        run = _run(engine, None, tokens=6, follow=[1, 3, 4])
        assert run.tokens[:3] == [1, 3, 4]
        expected = engine.logits([*PROMPT, *run.tokens])[len(PROMPT) - 1 :]
        assert run.tokens[3:] == expected[3:6].argmax(-1).tolist()
        with pytest.raises(ValueError, match="token id 512: ids are 0 to 511"):
            _run(engine, None, follow=[512])
