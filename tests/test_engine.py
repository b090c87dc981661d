"""The engine: what a user meets, and that nothing a user does leaves it unusable."""

import asyncio
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import groupby

import mlx.core as mx
import numpy as np
import pytest

import flashmoe_lab as fl
from flashmoe_lab import native
from flashmoe_lab.stages.router import route

on_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="bitwise on a CPU only")
IDS = list(range(5, 25))


def tokens_of(engine, count=5, **options):
    return engine.generate(IDS, count, **options).tokens


def saying(tokens):
    """A hook that makes the head say these tokens, one a call."""
    left = iter(tokens)

    def say(result, path):
        wanted = mx.arange(result.shape[-1]) == next(left)
        return mx.where(wanted, 10.0, mx.zeros(result.shape))

    return say


def at_call(number, do):
    """A hook that does something at its n-th call."""
    calls = []

    def hook(result, path):
        calls.append(path)
        if len(calls) == number:
            do()

    return hook


def fail():
    raise ZeroDivisionError("in a hook")


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
    some = open_engine(packed("golden/mlx4"), bank_gb=0.001).generate(IDS, 3).summary
    assert "slots, lru)" in some


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


# Streaming, stopping, errors


def test_tokens_arrive_while_the_run_goes_on(engine):
    arrived = threading.Event()
    waited = []
    with engine.intercept("lm_head", at_call(2, lambda: waited.append(arrived.wait(30)))):
        for _ in engine.stream_generate(IDS, 3):
            arrived.set()
    assert waited == [True]


def test_tokens_arrive_while_the_run_goes_on_async(engine):
    arrived, ticked, waited = threading.Event(), threading.Event(), []

    async def main():
        run = engine.stream_generate(IDS, 3)
        async for _ in run:
            if len(run.tokens) == 1:
                assert not run.done
                arrived.set()
                asyncio.get_running_loop().call_soon(ticked.set)
        return run.tokens

    def wait():
        waited.append(arrived.wait(30) and ticked.wait(30))

    expected = tokens_of(engine, 3)
    with engine.intercept("lm_head", at_call(2, wait)):
        assert asyncio.run(main()) == expected
    assert waited == [True]


def test_break_frees_the_engine(engine):
    for _ in range(3):
        run = engine.stream_generate(IDS, 1000)
        for _ in run:
            break
        assert run.done and len(run.tokens) == 1
    assert tokens_of(engine) == engine.generate(IDS, 5).tokens


def test_break_frees_the_engine_async(engine):
    async def main():
        run = engine.stream_generate(IDS, 1000)
        async for _ in run:
            break
        return run

    run = asyncio.run(main())
    assert run.done
    assert len(tokens_of(engine)) == 5


def test_stop_by_the_consumer(engine):
    run = engine.stream_generate(IDS, 1000)
    for _ in run:
        if len(run.tokens) == 3:
            run.stop()
    assert run.done and 3 <= len(run.tokens) < 1000
    assert run.finish_reason == "cancelled"
    assert run.tokens[:3] == tokens_of(engine, 3)


def test_stop_by_another_thread(engine):
    run = engine.stream_generate(IDS, 1000)
    thread = threading.Thread(target=run.wait)
    with engine.intercept("lm_head", at_call(3, run.stop)):
        thread.start()
        thread.join(60)
    assert run.done and run.finish_reason == "cancelled"
    assert len(run.tokens) == 3


def test_stop_while_the_prompt_is_read(engine):
    run = engine.stream_generate(IDS, 5, prefill_chunk=1, progress=lambda at, of: run.stop())
    run.wait()
    assert (run.tokens, run.stats.prefill.tokens) == ([], 1)
    assert run.finish_reason == "cancelled"


def test_stop_within_a_chunk(engine):
    run, paths = engine.stream_generate(IDS, 5), []

    def stop(result, path):
        paths.append(path)
        run.stop()

    with engine.intercept("layers.*.router", stop):
        run.wait()
    assert paths == ["layers.0.router"]
    assert (run.tokens, run.finish_reason) == ([], "cancelled")
    assert len(tokens_of(engine)) == 5


def test_interrupted_logits_free_the_engine(engine):
    paths, left = [], threading.Event()

    def interrupt(result, path):
        paths.append(path)
        if len(paths) == 1:
            time.sleep(0.2)  # until the main thread waits: a signal just before would not wake it
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            left.wait(30)

    with engine.intercept("layers.*.router", interrupt):
        with pytest.raises(KeyboardInterrupt):
            engine.logits(IDS)
        left.set()
        engine._thread.call(lambda: None)
    assert paths == ["layers.0.router"]


def test_error_in_a_hook_reaches_the_consumer(engine):
    expected = tokens_of(engine)
    run = engine.stream_generate(IDS, 5)
    with engine.intercept("layers.2.router", at_call(3, fail)):
        with pytest.raises(ZeroDivisionError, match="in a hook"):
            run.wait()
    assert run.done and run.tokens == expected[:2]
    assert tokens_of(engine) == expected


def test_error_in_progress_reaches_the_consumer(engine):
    with pytest.raises(ZeroDivisionError):
        engine.generate(IDS, 5, progress=lambda at, of: fail())


def test_interrupt_in_the_loop(engine):
    run = engine.stream_generate(IDS, 1000)
    with pytest.raises(KeyboardInterrupt):
        for _ in run:
            raise KeyboardInterrupt
    assert run.done and len(run.tokens) == 1
    assert len(tokens_of(engine)) == 5


def test_interrupt_while_waiting(engine):
    """Ctrl-C as the terminal sends it, while the consumer waits for a token."""

    def interrupt():
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    run = engine.stream_generate(IDS, 2000)
    with engine.intercept("lm_head", at_call(3, interrupt)):
        with pytest.raises(KeyboardInterrupt):
            run.wait()
    assert run.done and len(run.tokens) < 2000
    assert len(tokens_of(engine)) == 5


def test_two_runs_at_once_come_one_after_the_other(engine):
    other_ids, log, results = IDS[::-1], [], {}
    expected = [tokens_of(engine), engine.generate(other_ids, 5).tokens]

    def generate(name, ids):
        def progress(at, of):
            log.append(name)

        results[name] = engine.generate(ids, 5, prefill_chunk=1, progress=progress).tokens

    threads = [threading.Thread(target=generate, args=pair) for pair in enumerate((IDS, other_ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[0], results[1]] == expected
    assert [len(list(group)) for _, group in groupby(log)] == [20, 20]


def test_run_iterated_twice(engine):
    run = engine.stream_generate(IDS, 2).wait()
    with pytest.raises(RuntimeError, match="iterated once"):
        run.wait()


def test_run_that_is_never_iterated_costs_nothing(engine):
    run = engine.stream_generate(IDS, 2)
    assert len(tokens_of(engine)) == 5
    assert not run.done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=[]), "the prompt is empty"),
        (dict(prompt=[512]), "token id 512: ids are 0 to 511"),
        (dict(prompt=[-1]), "token id -1"),
        (dict(prompt=IDS, max_tokens=4090), "4110 tokens together"),
        (dict(prompt=IDS, max_tokens=0), "max_tokens is 0"),
        (dict(prompt=IDS, num_experts_per_tok=0), "num_experts_per_tok is 0; .* between 1 and 8"),
        (dict(prompt=IDS, num_experts_per_tok=9), "num_experts_per_tok is 9; .* between 1 and 8"),
        (dict(prompt=IDS, temperature=-1), "temperature is -1"),
        (dict(prompt=IDS, prefill_chunk=0), "prefill_chunk is 0"),
    ],
)
def test_refused_at_once(engine, arguments, message):
    with pytest.raises(ValueError, match=message):
        engine.stream_generate(**arguments)


def test_unknown_sampling_setting(engine):
    with pytest.raises(TypeError, match="topp"):
        engine.stream_generate(IDS, topp=0.5)


@pytest.mark.parametrize("k", [0, 9])
def test_logits_refuses_k(engine, k):
    with pytest.raises(ValueError, match=f"num_experts_per_tok is {k}; .* between 1 and 8"):
        engine.logits(IDS, num_experts_per_tok=k)


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


# Checks


def nan(result, path):
    if isinstance(result, mx.array):
        return result * float("nan")
    return route(result.logits * float("nan"), 3)


@pytest.mark.parametrize(
    "path",
    ["embed", "layers.2.mixer", "layers.2.router", "layers.0.shared_expert", "norm", "lm_head"],
)
def test_checks_name_the_stage(packed, open_engine, path):
    engine = open_engine(packed("golden/hf"), checks=True)
    with engine.intercept(path, nan):
        with pytest.raises(FloatingPointError, match=f"^{path} gave NaN or infinity"):
            engine.logits(IDS)


def test_checks_find_damaged_weights(packed, open_engine):
    engine = open_engine(packed("golden/hf"), checks=True)
    assert len(tokens_of(engine)) == 5
    engine.layers[2].mixer.dt_bias = mx.array(np.full(4, np.nan, np.float32))
    with pytest.raises(FloatingPointError, match="^layers.2.mixer gave NaN or infinity"):
        engine.generate(IDS)


def test_without_checks_the_sampler_refuses(engine):
    with engine.intercept("layers.2.mixer", nan):
        with pytest.raises(FloatingPointError, match="load with checks=True to find where"):
            engine.generate(IDS)


def test_verify_names_file_layer_and_expert(copied, open_engine):
    layer = fl.PackedCheckpoint(copied).layers[1]
    with layer.path.open("r+b") as stream:
        stream.seek(layer.offset(6) + 100)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 4]))
    engine = open_engine(copied, verify=True)
    for _ in range(2):  # the damaged block is not found in the bank the second time
        with pytest.raises(ValueError, match="layer_01.safetensors: layer 1, expert 6: checksum"):
            engine.logits(IDS, num_experts_per_tok=8)
    assert open_engine(copied).logits(IDS).shape == (20, 512)


def test_verify_finds_nothing_wrong(packed, open_engine, engine):
    verified = open_engine(packed("golden/hf"), verify=True, resident=True)
    np.testing.assert_array_equal(verified.logits(IDS), engine.logits(IDS))


@on_cpu
@pytest.mark.parametrize("kernels", ["mlx", "native"])
def test_verifying_while_streaming_changes_nothing(packed, open_engine, use_kernels, kernels):
    """A prompt that names every expert of a layer, so that the last unchecked block comes with the
    first read."""
    if kernels == "native" and not native.available:
        pytest.skip("the native kernels were not built")
    use_kernels(kernels)
    prompt = list(range(3, 103))
    expected = open_engine(packed("golden/hf")).logits(prompt)
    verified = open_engine(packed("golden/hf"), verify=True)
    for _ in range(2):
        np.testing.assert_array_equal(verified.logits(prompt), expected)


# Opening and closing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_experts_per_tok=0), "num_experts_per_tok is 0; .* between 1 and 8"),
        (dict(num_experts_per_tok=9), "num_experts_per_tok is 9; .* between 1 and 8"),
        (dict(bank_gb=-0.5), "bank_gb is -0.5; it must be 0 or more"),
        (dict(resident=True, bank_gb=1), "leave bank_gb out"),
        (dict(reader="fast"), "reader must be one of .*'fast'"),
        (dict(threads=0), "threads must be 1 to 64, got 0"),
        (dict(split=17), "split must be 1 to 16, got 17"),
        (dict(policy="mru"), "policy is 'mru'; known are lru"),
        (dict(dtype="int8"), "dtype is 'int8'; known are"),
    ],
)
def test_settings_out_of_range(packed, open_engine, settings, message):
    with pytest.raises(ValueError, match=message):
        open_engine(packed("golden/hf"), **settings)


def test_unknown_setting(packed):
    with pytest.raises(TypeError, match="bank_gib"):
        fl.load(packed("golden/hf"), bank_gib=1)


def test_bank_that_does_not_fit(packed, open_engine, monkeypatch):
    monkeypatch.setattr("flashmoe_lab.storage.bank.available_memory_nbytes", lambda: 10**6)
    with pytest.raises(MemoryError, match="give a smaller bank_gb"):
        open_engine(packed("golden/hf"), resident=True)


@pytest.mark.parametrize(
    ("free", "slots"), [(10**12, 32), (None, 32), (4 * 10 * 98304, 10), (0, 3)]
)
def test_default_bank_is_a_quarter_of_the_free_memory(
    packed, open_engine, monkeypatch, free, slots
):
    monkeypatch.setattr("flashmoe_lab.storage.bank.available_memory_nbytes", lambda: free)
    monkeypatch.setattr("flashmoe_lab.storage.bank._check_memory", lambda nbytes: None)
    engine = open_engine(packed("golden/hf"))
    assert engine.bank.pool(0).layout.block_nbytes == 98304
    assert engine.bank.slots == slots


def test_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        fl.load(tmp_path / "nowhere")


def test_closed_engine_refuses(packed, open_engine):
    engine = open_engine(packed("golden/hf"))
    run = engine.stream_generate(IDS, 2)
    engine.close()
    for ask in (run.wait, lambda: engine.logits(IDS), lambda: engine.generate(IDS)):
        with pytest.raises(RuntimeError, match="the engine was closed"):
            ask()


def test_closing_stops_what_is_under_way(packed, open_engine):
    engine = open_engine(packed("golden/hf"))
    run = engine.stream_generate(IDS, 900)
    steps = iter(run)
    next(steps)
    engine.close()
    assert len(list(steps)) < 800 and run.finish_reason == "cancelled"


def test_exit_under_a_run(packed):
    program = (
        "import sys, flashmoe_lab as fl\n"
        "engine = fl.load(sys.argv[1])\n"
        "next(steps := iter(engine.stream_generate([5, 6, 7], 900)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, packed("golden/hf")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def left_over():
    gc.collect()
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    return threading.active_count(), files


def test_closing_leaves_nothing(packed, open_engine):
    before = left_over()
    for reader in ("pread", "mmap"):
        engine = open_engine(packed("golden/hf"), reader=reader, bank_gb=0)
        engine.generate(IDS, 3)
        engine.close()
        engine.close()
    assert left_over() == before


def test_dropping_leaves_nothing(packed, recwarn):
    before = left_over()
    engine = fl.load(packed("golden/hf"), checks=True)
    engine.generate(IDS, 3)
    worker = engine._thread._thread
    del engine
    gc.collect()
    worker.join(30)
    assert left_over() == before


def test_failed_opening_leaves_nothing(packed, open_engine):
    before = left_over()
    for _ in range(3):
        with pytest.raises(ValueError, match="policy"):
            open_engine(packed("golden/hf"), policy="mru")
    assert left_over() == before
