"""A whole layer in two native calls gives the bits of its stages one by one, and is used exactly
where nobody wants to see the others."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import kernels
from flashmoe_lab.layer import Layer
from flashmoe_lab.model import Model
from flashmoe_lab.state import SequenceState
from flashmoe_lab.watch import Watch

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu or not kernels.native.available, reason="native on a CPU only"
)
NAMES = ["golden/hf", "golden/mlx4", "next", "rect"]


def logits(model, ids, chunk, k=None):
    state = model.empty_state()
    parts = [np.array(model(ids[i : i + chunk], state, k)) for i in range(0, len(ids), chunk)]
    return np.concatenate(parts), state


@pytest.fixture
def runs(monkeypatch):
    """How many layers ran whole."""
    count: list[int] = []

    def count_in(name):
        run = getattr(Layer, name)

        def counted(self, *arguments):
            count.append(self.index)
            return run(self, *arguments)

        monkeypatch.setattr(Layer, name, counted)

    count_in("native_steps")
    count_in("token")
    return count


@pytest.mark.parametrize("chunk", [1, 7, 90])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_as_stage_by_stage(packed, sample, make_model, runs, name, chunk):
    model, ids = make_model(packed(name)), sample(name)[0][:90]
    whole, state = logits(model, ids, chunk)
    passes = -(-len(ids) // chunk)
    assert len(runs) == passes * len(model.layers)
    with model.intercept("layers.*", lambda result, path: None):
        stages, other = logits(model, ids, chunk)
    assert len(runs) == passes * len(model.layers)
    np.testing.assert_array_equal(whole, stages)
    for one, two in zip(state._arrays(), other._arrays(), strict=True):
        np.testing.assert_array_equal(np.array(one[1]), np.array(two[1]))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_another_k(packed, sample, make_model, k):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:20]
    whole, _ = logits(model, ids, 20, k)
    with model.intercept("*", lambda result, path: None):
        np.testing.assert_array_equal(logits(model, ids, 20, k)[0], whole)
    with pytest.raises(ValueError, match="num_experts_per_tok is 0"):
        model(ids, model.empty_state(), 0)


@pytest.mark.parametrize("capacity", [0, 100_000])
def test_a_bank_that_cannot_hold_a_layer(packed, sample, make_model, capacity):
    """Experts then come in waves, and the rest of the layer is native all the same."""
    path, ids = packed("golden/hf"), sample("golden/hf")[0][:40]
    expected, _ = logits(make_model(path), ids, 40)
    np.testing.assert_array_equal(logits(make_model(path, capacity=capacity), ids, 40)[0], expected)


def test_a_routing_that_is_replaced_is_used(packed, sample, make_model, runs):
    """An intercepted router needs no stage by stage."""
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:20]

    def fewer(routing, path):
        return routing.with_num_experts_per_tok(2)

    with model.intercept("layers.*.router", fewer):
        whole, _ = logits(model, ids, 20)
        assert len(runs) == len(model.layers)
        with model.intercept("layers.*.mixer", lambda result, path: None):
            np.testing.assert_array_equal(logits(model, ids, 20)[0], whole)
    assert not np.array_equal(logits(model, ids, 20)[0], whole)
    np.testing.assert_array_equal(logits(model, ids, 20, 2)[0], whole)


def test_only_layers_that_are_looked_at_run_stage_by_stage(packed, sample, make_model, runs):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:5]
    with model.intercept("layers.1.mixer", lambda result, path: None):
        logits(model, ids, 5)
    assert runs == [layer.index for layer in model.layers if layer.index != 1]
    runs.clear()

    class Listener(Watch):
        listeners = {"layers.0.experts": lambda result: None}

    model(ids, model.empty_state(), watch=Listener())
    assert 0 not in runs and len(runs) == len(model.layers) - 1
    runs.clear()

    class Stages(Watch):
        every_stage = True

    model(ids, model.empty_state(), watch=Stages())
    assert runs == []


def test_a_weight_that_is_replaced_is_used(packed, sample, make_model):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:5]
    before, _ = logits(model, ids, 5)
    norm = model.layers[0].post_norm
    norm.weight = norm.weight * 2
    mx.eval(norm.weight)
    changed, _ = logits(model, ids, 5)
    assert not np.array_equal(changed, before)
    with model.intercept("layers.*", lambda result, path: None):
        np.testing.assert_array_equal(logits(model, ids, 5)[0], changed)


def test_mlx_has_no_native_layers(packed, sample, make_model, use_kernels, runs):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:5]
    use_kernels("mlx")
    logits(model, ids, 5)
    use_kernels("native")
    for layer in model.layers:
        layer.experts.variant = "by_expert"
    logits(model, ids, 5)
    assert runs == []


def test_a_routing_of_other_weights_is_used(packed, sample, make_model):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:5]

    def half(routing, path):
        return replace(routing, weights=routing.weights * 0.5)

    with model.intercept("layers.*.router", half):
        whole, _ = logits(model, ids, 5)
        with model.intercept("layers.*.mixer", lambda result, path: None):
            np.testing.assert_array_equal(logits(model, ids, 5)[0], whole)
    assert not np.array_equal(logits(model, ids, 5)[0], whole)


def test_experts_that_were_fetched_for_another_routing_are_refused(packed, sample, make_model):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:5]
    for layer in model.layers:
        layer.fetch.preload()

    def other(fetched, path):
        return fetched.fetch.of((fetched.experts + 1) % model.config.num_experts)

    with (
        model.intercept("layers.0.fetch", other),
        pytest.raises(ValueError, match="layer 0: these experts were fetched for another routing"),
    ):
        logits(model, ids, 5)


def same_stage_by_stage(model, ids, expected):
    with model.intercept("layers.*", lambda result, path: None):
        np.testing.assert_array_equal(logits(model, ids, 5)[0], expected)


class Doubled:
    """A mix-in that doubles what a stage gives."""

    def __call__(self, x):
        return super().__call__(x) * 2  # pyright: ignore[reportAttributeAccessIssue]


STAGES = {
    "input_norm": None,
    "post_norm": None,
    "router.gate": None,
    "shared_expert": None,
    "shared_expert.up_proj": None,
    "mixer.out_proj": "linear_attention",
    "mixer.norm": "linear_attention",
    "mixer.q_proj": "full_attention",
    "mixer.k_norm": "full_attention",
}


@pytest.mark.parametrize("path", STAGES)
def test_a_stage_of_another_class_is_called(packed, sample, make_model, path):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:5]
    before, _ = logits(model, ids, 5)
    owner = next(layer for layer in model.layers if STAGES[path] in (None, layer.kind))
    for name in path.split("."):
        owner = getattr(owner, name)
    kind = type(owner)
    owner.__class__ = type(f"My{kind.__name__}", (Doubled, kind), {})
    found, _ = logits(model, ids, 5)
    assert not np.array_equal(found, before)
    same_stage_by_stage(model, ids, found)


VALUES = {
    "router.norm_topk_prob": False,
    "input_norm.eps": 1.0,
    "post_norm.eps": 1.0,
    "mixer.norm.eps": 1.0,
    "mixer.q_norm.eps": 1.0,
    "mixer.k_norm.eps": 1.0,
    "mixer.rope_theta": 10.0,
}


@pytest.mark.parametrize("path", VALUES)
def test_a_value_changed_after_a_run_is_used(packed, sample, make_model, path):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:5]
    before, _ = logits(model, ids, 5)
    *owners, name = path.split(".")
    kind = "full_attention" if owners[-1] in ("q_norm", "k_norm", "mixer") else "linear_attention"
    owner = next(layer for layer in model.layers if layer.kind == kind)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, VALUES[path])
    found, _ = logits(model, ids, 5)
    assert not np.array_equal(found, before)
    same_stage_by_stage(model, ids, found)


def test_a_state_of_another_type_goes_through_the_stages(packed, sample, make_model):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:5]
    expected, _ = logits(model, ids, 5)
    found, states = [], [SequenceState.empty(model.config, mx.bfloat16) for _ in range(2)]
    for _ in range(2):  # what the first pass leaves is the second's
        found.append(np.array(model(ids, states[0])))
    np.testing.assert_allclose(found[0], expected, atol=0.1)
    with model.intercept("layers.*", lambda result, path: None):
        for part in found:
            np.testing.assert_array_equal(np.array(model(ids, states[1])), part)


def by_token(model, ids, k=None):
    return logits(model, ids, 1, k)[0]


def test_tokens_of_one_k_after_another(packed, sample, make_model):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:8]
    for k in (None, 5, 1, None):
        found = by_token(model, ids, k)
        with model.intercept("layers.*", lambda result, path: None):
            np.testing.assert_array_equal(by_token(model, ids, k), found)


def test_a_router_with_a_k_of_its_own(packed, sample, make_model):
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:8]
    before = by_token(model, ids)
    model.layers[1].router.num_experts_per_tok = 2
    found = by_token(model, ids)
    assert not np.array_equal(found, before)
    with model.intercept("layers.*", lambda result, path: None):
        np.testing.assert_array_equal(by_token(model, ids), found)


def test_memory_of_a_token_is_another_threads_only_when_it_was_read(packed, sample, make_model):
    """Whoever follows a run is told while what a token left is still there."""
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:8]
    given, told = [], []

    class Follower(Watch):
        def token_begins(self, memory):
            given.append(memory)

        def token_ends(self):
            told.append(given[-1].left.copy())
            assert given[-1] not in model._memories

    for token in ids[:2]:
        model([token], model.empty_state(), watch=Follower())
    assert given[0] is given[1] and given[1].reads is None and given[1] in model._memories
    assert not np.array_equal(told[0], told[1])


def test_an_intercept_that_begins_while_another_thread_looks_is_heard(
    packed, sample, make_model, monkeypatch
):
    """What a pass is to show is not kept for the next ones, then."""
    model, ids = make_model(packed("golden/hf")), sample("golden/hf")[0][:5]
    heard, fits = [], Model._fits_memory
    late = model.intercept("layers.1.mixer", lambda result, path: heard.append(path))

    def begun_meanwhile(self, layer):
        if not self.intercepted:
            late.__enter__()
        return fits(self, layer)

    monkeypatch.setattr(Model, "_fits_memory", begun_meanwhile)
    for _ in range(3):
        logits(model, ids, 5)
    late.__exit__(None, None, None)
    assert heard == ["layers.1.mixer"] * 2


@pytest.mark.parametrize("capacity", [0, 100_000, 200_000, None])
def test_a_token_counts_what_it_finds_and_reads(packed, sample, make_model, capacity):
    """As stage by stage, whatever the bank holds."""
    path, ids = packed("golden/hf"), sample("golden/hf")[0][:40]
    model, other = (make_model(path, capacity=capacity) for _ in range(2))
    expected = by_token(model, ids)
    with other.intercept("layers.*", lambda result, path: None):
        np.testing.assert_array_equal(by_token(other, ids), expected)
    banks = [one.layers[0].fetch.bank for one in (model, other)]
    assert banks[0].counts == banks[1].counts and banks[0].counts.misses > 0
    assert sorted(banks[0].contents()) == sorted(banks[1].contents())
