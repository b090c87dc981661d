"""Runs of the engine: that nothing a user does meanwhile leaves it unusable."""

import asyncio
import signal
import threading
import time
from itertools import groupby

import pytest

from tests.saying import IDS, at_call, fail, tokens_of


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
