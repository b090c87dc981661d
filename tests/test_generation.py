"""Prefill and decode in the test's own thread."""

import numpy as np
import pytest

from flashmoe_lab.generation import (
    GenerationRequest,
    PhaseStats,
    RunStats,
    generate_tokens,
    prefill,
)
from flashmoe_lab.model import Model
from flashmoe_lab.sampling import Sampling

IDS = list(range(5, 45))


@pytest.fixture
def model(packed, make_model) -> Model:
    return make_model(packed("golden/hf"), capacity=0)


def request(prompt=IDS, max_tokens=5, stop_ids=(), **options):
    return GenerationRequest(
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=options.pop("sampling", Sampling()),
        stop_ids=frozenset(stop_ids),
        **options,
    )


def generate(model, stats=None, progress=None, cancelled=lambda: False, **options):
    bank = model.layers[0].fetch.bank
    stats = stats or RunStats()
    return list(generate_tokens(model, bank, None, request(**options), stats, progress, cancelled))


def logits(model, ids=IDS, k=None):
    return np.array(model(ids, model.empty_state(), k))


# Prefill


@pytest.mark.parametrize("chunk", [1, 7, 40, 512])
def test_prefill_gives_the_last_logits(model, chunk):
    state = model.empty_state()
    found = prefill(model, IDS, state, chunk=chunk)
    assert found is not None and found.shape == (512,)
    np.testing.assert_allclose(found, logits(model)[-1], rtol=0, atol=1e-5)
    assert state.tokens == IDS


def test_prefill_goes_on_from_what_the_state_has(model):
    state, told = model.empty_state(), []
    model(IDS[:25], state)
    found = prefill(model, IDS, state, chunk=10, progress=lambda *at: told.append(at))
    assert found is not None
    np.testing.assert_allclose(found, logits(model)[-1], rtol=0, atol=1e-5)
    assert told == [(35, 40), (40, 40)]


def test_prefill_tells_how_far_it_is(model):
    told = []
    prefill(model, IDS, model.empty_state(), chunk=16, progress=lambda *at: told.append(at))
    assert told == [(16, 40), (32, 40), (40, 40)]


def test_prefill_is_cancelled(model):
    state, asked = model.empty_state(), []

    def cancelled():
        asked.append(state.length)
        return state.length >= 16

    assert prefill(model, IDS, state, chunk=8, cancelled=cancelled) is None
    assert sorted(set(asked)) == [0, 8, 16] and asked.count(16) == 1
    assert state.tokens == IDS[:16]


@pytest.mark.parametrize("chunk", [40, 10])
def test_a_chunk_reads_each_expert_once(model, chunk):
    """Even without a bank that keeps anything, and with three slots for eight experts."""
    reads, used = [], 0

    def note(routing, path):
        nonlocal used
        used += len(np.unique(np.array(routing.experts)))

    with model.intercept("*.fetch", lambda fetched, path: reads.append(fetched)):
        with model.intercept("*.router", note):
            prefill(model, IDS, model.empty_state(), chunk=chunk)
    assert sum(len(fetched.reads) for fetched in reads) == used
    assert all(len({r.expert for r in f.reads}) == len(f.reads) for f in reads)


def test_prefill_takes_k(model):
    found = prefill(model, IDS, model.empty_state(), num_experts_per_tok=7)
    assert found is not None
    np.testing.assert_allclose(found, logits(model, k=7)[-1], rtol=0, atol=1e-5)


# Generation


def test_greedy_is_the_argmax(model):
    responses = generate(model, max_tokens=6)
    tokens = [response.token for response in responses]
    found = logits(model, IDS + tokens[:-1])[len(IDS) - 1 :]
    np.testing.assert_array_equal(tokens, found.argmax(-1))
    for response, row in zip(responses, found, strict=True):
        expected = row - np.logaddexp.reduce(row.astype(float))
        np.testing.assert_allclose(response.logprobs, expected, rtol=0, atol=2e-5)


def test_counts_and_reasons(model):
    responses = generate(model, max_tokens=4)
    assert [response.generation_tokens for response in responses] == [1, 2, 3, 4]
    assert [response.finish_reason for response in responses] == [None, None, None, "length"]
    assert {response.prompt_tokens for response in responses} == {40}
    assert {response.text for response in responses} == {""}  # there is no tokenizer
    assert all(response.peak_memory > 0 for response in responses)


def test_stop_token_ends_it(model):
    tokens = [response.token for response in generate(model, max_tokens=6)]
    stop = tokens[3]
    responses = generate(model, max_tokens=6, stop_ids={stop})
    assert [response.token for response in responses] == tokens[: tokens.index(stop) + 1]
    assert responses[-1].finish_reason == "stop"


def test_stop_comes_before_length(model):
    (first,) = generate(model, max_tokens=1)
    (again,) = generate(model, max_tokens=1, stop_ids={first.token})
    assert (first.finish_reason, again.finish_reason) == ("length", "stop")


def test_cancelled_while_decoding(model):
    heads = []  # one for the prompt, then one a token
    with model.intercept("lm_head", lambda result, path: heads.append(path)):
        responses = generate(model, max_tokens=50, cancelled=lambda: len(heads) == 3)
    assert [response.finish_reason for response in responses] == [None, None, "cancelled"]


def test_cancelled_while_prefilling(model):
    assert generate(model, cancelled=lambda: True) == []


def test_same_seed_same_tokens(model):
    def tokens(seed):
        sampling = Sampling(temperature=1.5, seed=seed)
        return [response.token for response in generate(model, 20, sampling=sampling)]

    def generate(model, count, sampling):
        bank, stats = model.layers[0].fetch.bank, RunStats()
        asked = request(max_tokens=count, sampling=sampling)
        return generate_tokens(model, bank, None, asked, stats)

    assert tokens(1) == tokens(1) != tokens(2)


def test_repetition_penalty_sees_prompt_and_answer(model):
    plain = [response.token for response in generate(model, max_tokens=8)]
    sampling = Sampling(repetition_penalty=100.0, repetition_context=100)
    tokens = [r.token for r in generate(model, max_tokens=8, sampling=sampling)]
    assert tokens != plain
    assert len(set(IDS + tokens)) == len(IDS) + 8


def test_stats(model):
    stats = RunStats()
    generate(model, stats, max_tokens=5)
    block = model.layers[0].fetch.file.layout.block_nbytes
    assert (stats.prefill.tokens, stats.decode.tokens) == (40, 4)
    assert stats.decode.hits + stats.decode.misses == 4 * 4 * 3  # tokens, layers, K
    for phase in (stats.prefill, stats.decode):
        assert phase.read_nbytes == phase.misses * block > 0
        assert phase.dur_ns > 0
    counts = model.layers[0].fetch.bank.counts
    assert counts.misses == stats.prefill.misses + stats.decode.misses
    assert counts.hits == stats.prefill.hits + stats.decode.hits


def test_phase_stats():
    stats = PhaseStats(tokens=4, dur_ns=2 * 10**9, hits=3, misses=1, read_nbytes=100)
    assert (stats.tokens_per_second, stats.read_nbytes_per_token, stats.hit_rate) == (2, 25, 0.75)
    empty = PhaseStats()
    assert (empty.tokens_per_second, empty.read_nbytes_per_token, empty.hit_rate) == (0, 0, 0)


# Requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompt=[]), "the prompt is empty"),
        (dict(prompt=[1, 512]), "token id 512: ids are 0 to 511"),
        (dict(prompt=[-1]), "token id -1: ids are 0 to 511"),
        (dict(max_tokens=0), "max_tokens is 0; it must be at least 1"),
        (dict(prefill_chunk=0), "prefill_chunk is 0; it must be at least 1"),
        (dict(prompt=[1] * 4000, max_tokens=97), "4097 tokens together; .* made for 4096"),
    ],
)
def test_what_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        request(**changes).check(model)
    with pytest.raises(ValueError, match=message):
        generate(model, **changes)


def test_longest_that_fits(model):
    request(prompt=[1] * 4000, max_tokens=96).check(model)
