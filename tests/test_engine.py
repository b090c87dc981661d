"""The engine: numbers, what a run tells, text, and stages by hand beside runs."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

import flashmoe_lab as fl
from tests.saying import IDS, on_cpu, saying, tokens_of


@pytest.fixture
def copied(packed, tmp_path):
    """A packed directory that a test may change."""
    return shutil.copytree(packed("golden/hf"), tmp_path / "copied")


@pytest.fixture
def text_engine(copied, write_tokenizer, open_engine):
    write_tokenizer(copied)
    return open_engine(copied)


# Numbers


@on_cpu
def test_greedy_is_the_argmax_of_logits(engine):
    tokens = tokens_of(engine, 8)
    found = engine.logits(IDS + tokens[:-1])[len(IDS) - 1 :]
    assert tokens == found.argmax(-1).tolist()


@pytest.mark.parametrize("as_ids", [list, tuple, np.array, range], ids=lambda kind: kind.__name__)
def test_ids_of_every_kind(engine, as_ids):
    ids = range(5, 25) if as_ids is range else as_ids(IDS)
    np.testing.assert_array_equal(engine.logits(ids), engine.logits(IDS))
    assert engine.generate(ids, 2).tokens == tokens_of(engine, 2)


def test_logits_of_a_full_context(copied, open_engine):
    config = json.loads((copied / "config.json").read_text())
    config.get("text_config", config)["max_position_embeddings"] = 10
    (copied / "config.json").write_text(json.dumps(config))
    engine = open_engine(copied)
    assert engine.logits(IDS[:10]).shape == (10, 512)
    with pytest.raises(ValueError, match="11 tokens.* the model was made for 10"):
        engine.logits(IDS[:11])


@on_cpu
@pytest.mark.parametrize("k", range(1, 9))
def test_every_k_works_and_is_named(engine, k):
    generation = engine.generate(IDS, 3, num_experts_per_tok=k)
    found = engine.logits(IDS + generation.tokens[:-1], num_experts_per_tok=k)
    assert generation.tokens == found[len(IDS) - 1 :].argmax(-1).tolist()
    assert f"K={k}" in generation.summary
    assert ("[lossy: " in generation.summary) == (k < 3)
    assert ("the model's own)" in generation.summary) == (k == 3)
    assert bool(engine.lossy(k)) == (k < 3)


def test_k_of_an_engine(packed, open_engine, engine):
    two = open_engine(packed("golden/hf"), num_experts_per_tok=2)
    np.testing.assert_array_equal(two.logits(IDS), engine.logits(IDS, num_experts_per_tok=2))
    assert two.lossy() == ["K=2 of the model's 3"]
    assert "K=2 [lossy: K=2 of the model's 3]" in two.generate(IDS, 2).summary
    assert two.lossy(3) == []


def test_sampling_is_repeatable(engine):
    options = dict(temperature=1.5, top_p=0.9, seed=7)
    assert tokens_of(engine, 12, **options) == tokens_of(engine, 12, **options)
    assert tokens_of(engine, 12, **options) != tokens_of(engine, 12, **options | {"seed": 8})


def test_prefill_chunk_and_progress(engine):
    told = []
    tokens = tokens_of(engine, 3, prefill_chunk=8, progress=lambda *at: told.append(at))
    assert told == [(8, 20), (16, 20), (20, 20)]
    assert tokens == tokens_of(engine, 3)


# What a run tells


def test_generation(engine):
    generation = engine.generate(IDS, 4)
    assert (generation.finish_reason, len(generation.tokens)) == ("length", 4)
    assert "summary" not in repr(generation)
    assert str(generation) == generation.text


@pytest.mark.parametrize("slots", [0, 3, 8])
def test_bytes_and_hits(packed, open_engine, slots):
    block = fl.PackedCheckpoint(packed("golden/hf")).layers[0].layout.block_nbytes
    engine = open_engine(packed("golden/hf"), bank_gb=slots * block / 1e9)
    fetched = []
    with engine.intercept("*.fetch", lambda result, path: fetched.append(result)):
        run = engine.stream_generate(IDS, 6).wait()
    prefill, decode = run.stats.prefill, run.stats.decode
    assert decode.hits + decode.misses == 5 * 4 * 3  # steps, layers, K
    wanted = [len(np.unique(f.experts)) for f in fetched]
    assert prefill.hits + prefill.misses == sum(wanted[:4])
    assert prefill.misses + decode.misses == sum(f.misses for f in fetched)
    for phase in (prefill, decode):
        assert phase.read_nbytes == phase.misses * block
    assert prefill.read_nbytes + decode.read_nbytes == sum(f.read_nbytes for f in fetched)
    if slots == 0:
        assert decode.hits == 0


def test_resident_engine_reads_nothing(packed, open_engine):
    engine = open_engine(packed("golden/hf"), resident=True)
    assert len(engine.bank.contents()) == 32
    before = engine.bank.counts.read_nbytes
    run = engine.stream_generate(IDS, 4).wait()
    stats = (run.stats.prefill, run.stats.decode)
    assert [phase.misses + phase.read_nbytes for phase in stats] == [0, 0]
    assert engine.bank.counts.read_nbytes == before
    assert "resident, all experts" in engine.summary(run)
    assert run.stats.decode.hit_rate == 1


def test_resident_engine_does_not_grow(packed, open_engine):
    engine = open_engine(packed("golden/hf"), resident=True)
    engine.generate(IDS, 100)
    before = mx.get_active_memory()
    engine.generate(IDS, 100)
    # 4 layers, 99 steps, 3 experts of 512 bytes would be 600 kB.
    assert mx.get_active_memory() - before < 200_000


def test_summary_names_the_conditions(packed, open_engine):
    engine = open_engine(packed("golden/mlx4"), bank_gb=0, reader="mmap", threads=3, split=2)
    summary = engine.generate(IDS, 3).summary
    for words in (
        "prefill 20 tokens",
        "decode 2 at",
        "bank hits 0.0%",
        "K=3 (the model's own)",
        "experts 4 bits, group 64",
        "reader mmap (3 threads, split 2)",
        "bank 0 (nothing kept",
    ):
        assert words in summary
    engine = open_engine(packed("golden/mlx4"), bank_gb=0.001, reader="pread", prefetch=2)
    some = engine.generate(IDS, 3).summary
    assert "slots, lru)" in some and "split 1), prefetch 2; bank" in some


@pytest.mark.parametrize(
    "dtype", ["float16", pytest.param("bfloat16", marks=on_cpu)]
)  # bfloat16 is a GPU's own
@pytest.mark.parametrize("name", ["golden/hf", "golden/mlx4"])
def test_lossy_activations_work_and_are_named(packed, open_engine, name, dtype):
    engine = open_engine(packed(name), dtype=dtype)
    assert engine.lossy() == [f"activations mlx.core.{dtype}"]
    assert len(engine.generate(IDS, 3).tokens) == 3


def test_summary_is_of_the_run(engine):
    run = engine.stream_generate(IDS, 3, num_experts_per_tok=2).wait()
    assert "K=2 [lossy: K=2 of the model's 3]" in engine.summary(run)
    with engine.intercept("layers.*.router", fl.ban([1])):
        run = engine.stream_generate(IDS, 3).wait()
    assert "K=3 [lossy: intercepted layers.*.router]" in engine.summary(run)
    assert "lossy" not in engine.generate(IDS, 3).summary


def test_card(engine):
    html = engine._repr_html_()
    assert "Engine (qwen3_5_moe_text)" in html and "8 a layer, 3 a token" in html


# Text


def test_text_prompt_without_a_tokenizer(packed):
    with pytest.warns(UserWarning, match="no tokenizer.json; prompts must be token ids"):
        engine = fl.load(packed("golden/hf"))
    with engine, pytest.raises(ValueError, match="there is no tokenizer.json; give .* token ids"):
        engine.generate("hello")


def test_text_in_and_out(text_engine):
    assert text_engine.encode("hey") == text_engine.tokenizer.encode("hey")
    generation = text_engine.generate("hey", 6)
    assert generation.text == text_engine.tokenizer.decode(generation.tokens)
    assert max(generation.tokens) < 258  # ids 258 to 511 are padding
    with pytest.raises(ValueError, match="the prompt is empty"):
        text_engine.generate("")


def test_characters_over_several_tokens(text_engine):
    tokens = text_engine.encode("a🙂b")
    with text_engine.intercept("lm_head", saying(tokens)):
        pieces = [step.text for step in text_engine.stream_generate("x", len(tokens))]
    assert pieces == ["a", "", "", "", "🙂", "b"]


def test_stop_token_adds_no_text(text_engine):
    (stop,) = text_engine.config.eos_token_ids
    a, b = text_engine.encode("ab")
    with text_engine.intercept("lm_head", saying([a, b, stop, a])):
        generation = text_engine.generate("x", 10)
    assert (generation.text, generation.finish_reason) == ("ab", "stop")
    assert generation.tokens == [a, b, stop]


# By hand, beside runs


def test_step_by_hand(engine):
    steps = list(engine.step(IDS))
    assert [step.path for step in steps] == engine.model.paths()
    np.testing.assert_array_equal(np.array(steps[-1].result), engine.logits(IDS))


def test_run_after_a_step_that_was_left(packed, open_engine):
    """The cell's thread has products that were never evaluated; the engine's reads over them."""
    engine = open_engine(packed("golden/hf"), bank_gb=0)
    for step in engine.step(IDS):
        if step.path == "layers.1.experts":
            break
    assert engine.logits(IDS).shape == (20, 512)


def test_run_after_a_stage_by_hand(packed, open_engine):
    engine = open_engine(packed("golden/hf"), bank_gb=0)
    layer = engine.layers[1]
    x = mx.ones((1, 128))
    routing = layer.router(x)
    product = layer.experts(x, routing, layer.fetch(routing))
    assert engine.logits(IDS).shape == (20, 512)
    fetch = layer.fetch.reference
    weights = np.array(routing.weights).astype(np.float64)
    expected = layer.experts.reference(np.ones((1, 128)), np.array(routing.experts), weights, fetch)
    np.testing.assert_allclose(np.array(product), expected, rtol=0, atol=1e-5)


def test_intercept_in_a_run(engine):
    expected, seen = tokens_of(engine), []

    def note(routing, path):
        seen.extend(np.array(routing.experts).ravel().tolist())

    with engine.intercept("layers.3.router", fl.ban([0, 1])):
        with engine.intercept("layers.3.router", note):
            tokens_of(engine)
    assert seen and not {0, 1}.intersection(seen)
    assert tokens_of(engine) == expected
