"""Beginnings that were read before: the numbers are those of a fresh run, the room is bounded."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import flashmoe_lab as fl
from flashmoe_lab.chat.prefix_cache import PrefixCache
from flashmoe_lab.chat.snapshot import pairs_nbytes
from flashmoe_lab.identity import state_identity
from flashmoe_lab.state import AttentionState, SequenceState
from tests.saying import on_cpu

END = 2  # ends a turn in all of these models
IDS = list(range(5, 45))


def text(rng, count):
    """Tokens of one turn, without its end."""
    return rng.integers(3, 120, count).tolist()


def answers(engine, prompt, count=3, **options):
    """The run and the whole distribution at every token."""
    run = engine.stream_generate(prompt, count, **options)
    return run, np.array([step.logprobs for step in run])


def known(engine, cache, prompt, **options):
    return engine.stream_generate(prompt, 1, cache=cache, **options).wait().cached_tokens


def nodes(cache):
    return [node for root in cache.roots.values() for node in root.below()]


def held_nbytes(cache):
    """What is kept, added up anew."""
    return sum(pairs_nbytes(node.rows) + pairs_nbytes(node.matrices or []) for node in nodes(cache))


def assert_same_state(found, expected):
    assert found.tokens == expected.tokens
    for a, b in zip(found.layers, expected.layers, strict=True):
        if isinstance(a, AttentionState):
            assert (a.length, a.keys.shape) == (b.length, b.keys.shape)
            pairs = ((a.keys, b.keys), (a.values, b.values))
        else:
            pairs = ((a.conv, b.conv), (a.recurrent, b.recurrent))
        for x, y in pairs:
            assert mx.array_equal(x, y).item()


@pytest.fixture
def model(packed, make_model):
    return make_model(packed("golden/hf"))


# Numbers


@on_cpu
@pytest.mark.parametrize("name", ["golden/hf", "layer_types", "next_mlx4"])
def test_numbers_are_those_of_a_fresh_run(packed, open_engine, rng, name):
    engine = open_engine(packed(name))
    cache, turns, reused = PrefixCache(spacing=16), [text(rng, 30) + [END]], 0
    for _ in range(12):
        del turns[rng.integers(1, len(turns) + 1) :]  # an edit, or none
        turns += [text(rng, int(rng.integers(1, 25))) + [END] for _ in range(2)]
        prompt = [*sum(turns, []), 4, 5]
        run, found = answers(engine, prompt, cache=cache)
        fresh, expected = answers(engine, prompt)
        np.testing.assert_array_equal(found, expected)
        assert run.tokens == fresh.tokens
        assert run.prompt_tokens == len(prompt)
        reused += run.cached_tokens
    assert reused > 11 * 31


@on_cpu
def test_state_is_that_of_a_fresh_prompt(model, rng):
    """Many prompts with common beginnings, so that pieces are split and joined in every way."""
    cache, prompts = PrefixCache(spacing=7), [text(rng, 20)]
    for _ in range(25):
        old = prompts[rng.integers(len(prompts))]
        prompts.append(old[: rng.integers(1, len(old) + 1)] + text(rng, int(rng.integers(1, 20))))
    for prompt in prompts * 2:
        prefix = cache.open("", prompt, ())
        state, fresh = model.empty_state(), model.empty_state()
        prefix.restore(state)
        assert state.tokens == prompt[: state.length]
        for cut in (*sorted(m for m in prefix.marks if m > state.length), len(prompt)):
            if cut > state.length:
                model(prompt[state.length : cut], state)
                prefix.keep(state)
        model(prompt, fresh)
        assert_same_state(state, fresh)
        assert cache.nbytes == held_nbytes(cache)


def test_chunks_and_snapshots_do_not_change_what_is_kept(model):
    """What goes on from a snapshot must not move it."""
    cache = PrefixCache()
    state = model.empty_state()
    model(IDS[:30], state)
    cache.add("", state)
    before = [np.array(a) for node in nodes(cache) for pair in node.matrices or [] for a in pair]
    model(IDS[30:], state)
    other = model.empty_state()
    cache.open("", IDS, ()).restore(other)
    model(IDS[20:], other)
    after = [np.array(a) for node in nodes(cache) for pair in node.matrices or [] for a in pair]
    assert before
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_come_back(packed, open_engine, dtype):
    engine, cache = open_engine(packed("golden/hf"), dtype=dtype), PrefixCache()

    def work() -> tuple[SequenceState, SequenceState]:
        state, again = (engine.model.empty_state() for _ in range(2))
        engine.model(IDS[:30], state)
        before = state.snapshot()
        cache.add("", state)
        engine.model(IDS[30:], state)  # must not move what is kept
        cache.open("", [*IDS[:30], 9], ()).restore(again)
        return before, again

    before, again = engine.call(work)
    for a, b in zip(before.layers, again.layers, strict=True):
        if isinstance(a, AttentionState):
            assert a.keys.dtype == b.keys.dtype and a.values.dtype == b.values.dtype
        else:
            assert (a.conv.dtype, a.recurrent.dtype) == (b.conv.dtype, b.recurrent.dtype)
    assert_same_state(again, before)


# Where one can go on from


def test_where_snapshots_are(engine):
    system, question, other = [*IDS[:10], END], [*IDS[10:15], END], [*IDS[20:25], END]
    cache = PrefixCache()
    assert known(engine, cache, [*system, *question, 9, 8]) == 0
    assert known(engine, cache, [*system, *other, 9]) == len(system)  # the first end
    history = [*system, *question]
    assert known(engine, cache, [*history, 9, 7, *other, 9]) == len(history)  # the last end


def test_answers_are_gone_on_from(engine):
    cache = PrefixCache()
    run = engine.stream_generate(IDS, 6, cache=cache).wait()
    # The last token never went through the model.
    assert known(engine, cache, [*IDS, *run.tokens, 9]) == len(IDS) + 5


def test_prompt_without_turns_is_known_as_a_whole(engine):
    cache = PrefixCache()
    for expected in (0, len(IDS) - 1):
        assert known(engine, cache, IDS) == expected


def test_long_prompt_is_known_in_steps(engine):
    cache = PrefixCache(spacing=8)
    known(engine, cache, [*IDS[:30], END])
    assert known(engine, cache, [*IDS[:20], 9, 9]) == 16
    assert known(engine, cache, [*IDS[:7], 9, 9]) == 0


def test_prompt_of_one_token(engine):
    cache = PrefixCache()
    for _ in range(2):
        assert known(engine, cache, [7]) == 0


def test_chunks_stay_as_asked_for(engine):
    told = []
    options = dict(cache=PrefixCache(spacing=10), prefill_chunk=7)
    engine.stream_generate(IDS, 1, progress=lambda *at: told.append(at[0]), **options).wait()
    assert told == [7, 10, 17, 20, 27, 30, 37, 39, 40]


# What is not to be mixed up


def test_another_k_starts_anew(engine):
    cache = PrefixCache()
    known(engine, cache, IDS)
    assert known(engine, cache, IDS, num_experts_per_tok=2) == 0
    assert known(engine, cache, IDS, num_experts_per_tok=2) == len(IDS) - 1
    assert known(engine, cache, IDS, num_experts_per_tok=3) == len(IDS) - 1  # the model's own


def test_engines_of_one_checkpoint_share(packed, open_engine):
    cache = PrefixCache()
    first, second = (open_engine(packed("golden/hf")) for _ in range(2))
    known(first, cache, IDS)
    _, expected = answers(first, IDS)
    run, found = answers(second, IDS, cache=cache)
    assert run.cached_tokens == len(IDS) - 1
    if mx.default_device() == mx.cpu:
        np.testing.assert_array_equal(found, expected)


def test_other_bits_other_kernels_other_types(packed, open_engine, engine, use_kernels):
    cache = PrefixCache()
    known(engine, cache, IDS)
    assert known(open_engine(packed("golden/hf", 4)), cache, IDS) == 0
    assert known(open_engine(packed("golden/hf"), dtype="bfloat16"), cache, IDS) == 0
    use_kernels("mlx")
    assert known(engine, cache, IDS) == (0 if mx.default_device() == mx.cpu else len(IDS) - 1)


def test_other_weights_of_the_same_bits():
    """Two checkpoints that are told apart by nothing but their weights."""
    found = [SimpleNamespace(identity=name, label="4 bits") for name in "aab"]
    lines = [state_identity(one, mx.float32, 3) for one in found]  # pyright: ignore[reportArgumentType]
    assert lines[0] == lines[1] != lines[2]


def test_interventions_leave_it_alone(engine):
    cache = PrefixCache()
    known(engine, cache, IDS)
    before = len(cache)
    with engine.intercept("layers.*.router", lambda result, path: None):
        assert known(engine, cache, IDS) == 0
    assert len(cache) == before
    assert known(engine, cache, IDS) == len(IDS) - 1


def test_intervention_begun_meanwhile_is_not_kept(engine):
    cache = PrefixCache()
    run = engine.stream_generate(IDS, 20, cache=cache)
    steps = iter(run)
    next(steps)
    with engine.intercept("layers.*.router", lambda result, path: None):
        next(steps)
    for _ in steps:
        pass
    assert known(engine, cache, [*IDS, *run.tokens]) == len(IDS) - 1


# Stopping


def test_stopped_answer_is_kept(engine):
    cache = PrefixCache()
    run = engine.stream_generate(IDS, 1000, cache=cache)
    for _ in run:
        run.stop()
    assert run.finish_reason == "cancelled"
    assert known(engine, cache, [*IDS, *run.tokens, 9]) == len(IDS) + len(run.tokens) - 1


def test_stopped_prompt_keeps_what_was_read(engine):
    cache = PrefixCache(spacing=8)
    run = engine.stream_generate(IDS, 5, cache=cache, progress=lambda *at: run.stop())
    assert (run.wait().finish_reason, run.prompt_tokens) == ("cancelled", 8)
    assert known(engine, cache, IDS) == 8


def test_error_keeps_nothing_of_what_failed(engine):
    cache = PrefixCache(spacing=8)

    def fail(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.stream_generate(IDS, 5, cache=cache, progress=fail).wait()
    assert known(engine, cache, IDS) == 8
    assert cache.nbytes == held_nbytes(cache)


# Room


def test_room_is_kept(engine, rng):
    config, rows = engine.config, 3 * len(IDS)
    most = rows * config.kv_nbytes_per_token(4) + 7 * config.recurrent_nbytes(4)
    cache = PrefixCache(most, spacing=8)
    for _ in range(10):
        known(engine, cache, text(rng, 40))
        assert 0 < cache.nbytes == held_nbytes(cache) <= most
        # Nothing is held that nothing can go on from.
        assert all(n.matrices or n.children for n in nodes(cache) if n.parent)


def test_least_recently_used_goes_first(model):
    states = []
    for first in (5, 6, 7):
        states.append(model.empty_state())
        model([first, *IDS[:20]], states[-1])
    cache = PrefixCache()
    for state in states[:2]:
        cache.add("", state)
    cache.max_nbytes = cache.nbytes
    cache.open("", [*states[0].tokens, 9], ()).restore(model.empty_state())
    cache.add("", states[2])
    found = [cache.longest("", [*state.tokens, 9]) is not None for state in states]
    assert found == [True, False, True]


def test_points_go_before_what_goes_on_from_them(model):
    """Of one conversation the newest stays, with all the tokens before it."""
    state, cache = model.empty_state(), PrefixCache()
    for start in range(0, 40, 10):
        model(IDS[start : start + 10], state)
        cache.add("", state)
    cache.max_nbytes = snapshot = cache.nbytes // 2
    model([9], state)
    cache.add("", state)
    assert cache.nbytes <= snapshot
    longest = cache.longest("", [*IDS, 9, 9])
    assert longest is not None and longest.length == 41


def test_what_is_too_large_pushes_nothing_out(model):
    small, large = model.empty_state(), model.empty_state()
    model(IDS[:5], small)
    cache = PrefixCache()
    cache.add("", small)
    cache.max_nbytes = cache.nbytes
    model(IDS[::-1], large)
    cache.add("", large)
    assert len(cache) == 1
    assert cache.longest("", IDS) is not None


def test_clear(engine):
    cache = PrefixCache()
    known(engine, cache, IDS)
    cache.clear()
    assert (len(cache), cache.nbytes, known(engine, cache, IDS)) == (0, 0, 0)


@pytest.mark.parametrize("wrong", [dict(max_nbytes=0), dict(spacing=0), dict(spacing=-1)])
def test_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        PrefixCache(**wrong)


# Together with the rest


@on_cpu
def test_many_threads(engine, rng):
    cache = PrefixCache(spacing=8)
    shared = text(rng, 20)
    prompts = [shared + text(rng, 10) for _ in range(8)]
    expected = [engine.generate(prompt, 5).tokens for prompt in prompts]

    def ask(prompt):
        return engine.generate(prompt, 5, cache=cache).tokens

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, prompts * 3)) == expected * 3
    assert cache.nbytes == held_nbytes(cache)


def test_record_holds_what_was_read(engine):
    cache = PrefixCache()
    known(engine, cache, IDS)
    run = engine.stream_generate([*IDS, 9], 2, cache=cache, trace="flow").wait()
    assert run.trace is not None
    assert run.trace.tokens["token"].tolist() == [40, 41, 42]
    assert (run.cached_tokens, run.stats.prefill.tokens) == (40, 1)


def test_summary_says_what_was_known(engine):
    cache = PrefixCache()
    runs = [engine.stream_generate(IDS, 2, cache=cache).wait() for _ in range(2)]
    assert "prefill 40 tokens at" in engine.summary(runs[0])
    assert "prefill 1 tokens after 39 known at" in engine.summary(runs[1])


def test_long_conversations_need_no_deep_stack(config):
    """Over a thousand turns, one point each."""
    state, cache = fl.SequenceState.empty(config, mx.float32), PrefixCache()
    for token in range(1200):
        for layer in state.layers:
            if isinstance(layer, AttentionState):
                rows = mx.zeros((config.num_key_value_heads, 1, config.head_dim))
                layer.append(rows, rows)
        state.tokens.append(token % 90)
        cache.add("", state)
    assert len(cache) == 1200
    longest = cache.longest("", [*state.tokens, 1])
    assert longest is not None and len(longest.path()) == 1200
    cache.max_nbytes = 1
    cache._shrink()
    assert (len(cache), cache.nbytes) == (0, 0)
