"""The whole model: its order, what an intercept sees and changes, and what it costs nobody."""

from dataclasses import replace
from threading import Thread

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import Routing, ban, kernels
from flashmoe_lab.model import Cancelled, Model
from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.units import format_nbytes

on_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="bitwise on a CPU only")
IDS = list(range(5, 45))
LAYER = ["input_norm", "mixer", "post_norm", "router", "shared_expert", "fetch", "experts"]


@pytest.fixture
def model(packed, make_model) -> Model:
    return make_model(packed("golden/hf"), capacity=0)


def logits(model, k=None, ids=IDS):
    return np.array(model(ids, model.empty_state(), k))


def noting(results):
    """A hook that keeps each stage's result by path and changes nothing."""

    def note(result, path):
        results[path] = result

    return note


def routings(model, k=None):
    """What the routers say in one pass, by path."""
    found = {}
    with model.intercept("layers.*.router", noting(found)):
        logits(model, k)
    return {path: np.array(routing.experts) for path, routing in found.items()}


# The order


def test_paths(model):
    layers = [f"layers.{i}.{name}" for i in range(4) for name in LAYER]
    assert model.paths() == ["embed", *layers, "norm", "lm_head"]


def test_step_goes_through_all_stages(model):
    steps = list(model.step(IDS))
    assert [step.path for step in steps] == model.paths()
    kinds = {step.path.split(".")[-1]: type(step.result) for step in steps}
    assert kinds["router"] is Routing and kinds["fetch"] is Fetched
    assert all(kinds[name] is mx.array for name in kinds if name not in ("router", "fetch"))
    np.testing.assert_array_equal(np.array(steps[-1].result), logits(model))


def test_step_returns_the_logits(model):
    steps = model.step(IDS)
    try:
        while True:
            last = next(steps)
    except StopIteration as stop:
        np.testing.assert_array_equal(np.array(stop.value), np.array(last.result))


def test_step_goes_on_from_a_state(model):
    state = model.empty_state()
    model(IDS[:30], state)
    *_, last = model.step(IDS[30:], state)
    np.testing.assert_array_equal(np.array(last.result), logits(model)[30:])
    assert state.tokens == IDS


def test_step_takes_k(model):
    found = [step.result for step in model.step(IDS, None, 5) if step.path.endswith("router")]
    assert [routing.num_experts_per_tok for routing in found] == [5] * 4


def test_step_shows_what_an_intercept_put_there(model):
    with model.intercept("layers.1.mixer", lambda result, path: result * 0):
        steps = {step.path: step.result for step in model.step(IDS)}
        assert not np.array(steps["layers.1.mixer"]).any()
        assert np.array(steps["layers.2.mixer"]).any()
        np.testing.assert_array_equal(np.array(steps["lm_head"]), logits(model))


def test_stages_by_hand(model):
    """The layer as the design writes it."""
    state, seen = model.empty_state(), {}
    with model.intercept("*", noting(seen)):
        logits(model)
    x = model.embed(mx.array(IDS))
    for layer in model.layers:
        h = x + layer.mixer(layer.input_norm(x), state[layer.index])
        routing = layer.router(layer.post_norm(h))
        fetched = layer.fetch(routing)
        y = layer.experts(layer.post_norm(h), routing, fetched)
        x = h + y + layer.shared_expert(layer.post_norm(h))
        expected = seen[f"layers.{layer.index}.experts"]
        np.testing.assert_array_equal(np.array(y), np.array(expected))
    np.testing.assert_array_equal(np.array(model.lm_head(model.norm(x))), logits(model))


def test_another_thread_takes_no_slot_under_a_product(packed, make_model, monkeypatch):
    """As where a stage is called by hand in a loop over a run, whose thread is at work."""
    model = make_model(packed("golden/hf"), capacity=0)
    owner = kernels.native if kernels.native_for(model.dtype) else kernels
    one, other, expert_mlp = model.layers[0], model.layers[1], owner.expert_mlp
    x = mx.ones((1, model.config.hidden_size))
    routing = one.router(x)
    expected = np.array(one.experts(x, routing, one.fetch(routing)))
    thread = Thread(target=lambda: other.fetch(other.router(mx.ones(x.shape))))
    blocked = []

    def meanwhile(*arguments):
        if not blocked:
            thread.start()
            thread.join(0.3)
            blocked.append(thread.is_alive())
        return expert_mlp(*arguments)

    fetched = one.fetch(routing)
    monkeypatch.setattr(owner, "expert_mlp", meanwhile)
    np.testing.assert_array_equal(np.array(one.experts(x, routing, fetched)), expected)
    thread.join(30)
    assert blocked == [True]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="fetch them again"):
        one.experts(x, routing, fetched)


def test_layer_is_its_reference(model, rng):
    layer, x = model.layers[3], rng.normal(size=(20, 128))
    steps, answer = layer.steps(mx.array(x, mx.float32), model.empty_state()[3]), None
    try:
        while True:
            answer = steps.send(answer)
            answer = answer[1]
    except StopIteration as stop:
        np.testing.assert_allclose(np.array(stop.value), layer.reference(x), rtol=0, atol=1e-5)


def test_state_moves_on(model):
    state = model.empty_state()
    model(IDS[:7], state)
    model(IDS[7:9], state)
    assert (state.tokens, state.length) == (IDS[:9], 9)


def test_last_only(model):
    found = np.array(model(IDS, model.empty_state(), last_only=True))
    assert found.shape == (1, 512)
    np.testing.assert_array_equal(found[0], logits(model)[-1])


@pytest.mark.parametrize("tokens", [[512], [-1], [3, 10**6]])
def test_ids_out_of_range(model, tokens):
    """MLX reads past the end of the table without a word, and dies far out."""
    with pytest.raises(ValueError, match=f"token id {tokens[-1]}.* 0 to 511"):
        next(model.step(tokens))


@pytest.mark.parametrize("k", range(1, 9))
def test_every_k(model, k):
    found = routings(model, k=k)
    assert {experts.shape for experts in found.values()} == {(40, k)}


# Interventions


def test_ban_of_the_most_used_expert(model):
    before = routings(model)
    expert = int(np.bincount(before["layers.1.router"].ravel()).argmax())
    seen, truth = {}, {}
    with model.intercept("layers.1.router", noting(truth)):
        with model.intercept("layers.1.router", ban([expert])):
            with model.intercept("*", noting(seen)):
                logits(model)
    fetched, routing = seen["layers.1.fetch"], seen["layers.1.router"]
    assert expert not in np.array(routing.experts)
    assert fetched.reads and expert not in {read.expert for read in fetched.reads}
    assert fetched.misses == len(np.unique(np.array(routing.experts)))
    # The layer's own logits over the experts that remain, in float64.
    p = np.exp(np.array(truth["layers.1.router"].logits).astype(np.float64))
    p[:, expert] = 0
    order = np.argsort(-p, axis=-1, kind="stable")[:, :3]
    np.testing.assert_array_equal(np.array(routing.experts), order)
    weights = np.take_along_axis(p, order, -1)
    expected = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.array(routing.weights), expected, atol=1e-6)
    # Layer 0 ran before it, and no other layer knows of the ban.
    np.testing.assert_array_equal(
        np.array(seen["layers.0.router"].experts), before["layers.0.router"]
    )
    assert any(expert in np.array(seen[f"layers.{i}.router"].experts) for i in (0, 2, 3))


def test_ban_reads_nothing_of_it_in_any_layer(model):
    reads = []
    with model.intercept("layers.*.router", ban([0, 5])):
        with model.intercept("*.fetch", lambda fetched, path: reads.extend(fetched.reads)):
            logits(model)
    assert {read.layer for read in reads} == {0, 1, 2, 3}
    assert {read.expert for read in reads} <= {1, 2, 3, 4, 6, 7}


@on_cpu
def test_afterwards_everything_is_as_before(model):
    before = logits(model)
    with model.intercept("layers.1.router", ban([3])):
        assert not np.array_equal(logits(model), before)
    np.testing.assert_array_equal(logits(model), before)


@on_cpu
def test_afterwards_everything_is_as_before_an_error_too(model):
    before = logits(model)
    with pytest.raises(ZeroDivisionError):
        with model.intercept("layers.1.router", lambda result, path: 1 / 0):
            logits(model)
    np.testing.assert_array_equal(logits(model), before)
    assert model._hooks == {}


@on_cpu
def test_none_keeps(model):
    before, seen = logits(model), []
    with model.intercept("*", lambda result, path: seen.append(path)):
        np.testing.assert_array_equal(logits(model), before)
    assert seen == model.paths()


@on_cpu
def test_the_same_routing_forced_gives_the_same_bits(model):
    before, kept = logits(model), {}
    with model.intercept("layers.*.router", noting(kept)):
        logits(model)
    with model.intercept("layers.*.router", lambda result, path: kept[path]):
        np.testing.assert_array_equal(logits(model), before)


def test_forced_expert_is_used(model):
    """One expert with weight 1: the stage gives that expert's product."""
    seen = {}

    def force(routing, path):
        only = mx.full((len(IDS), 1), 6, dtype=mx.int32)
        return replace(routing, experts=only, weights=mx.ones((len(IDS), 1)))

    with model.intercept("layers.2.router", force), model.intercept("layers.2.*", noting(seen)):
        logits(model)
    assert seen["layers.2.fetch"].misses == 1
    layer, x = model.layers[2], np.array(seen["layers.2.post_norm"]).astype(np.float64)
    one = np.ones((len(IDS), 1))
    expected = layer.experts.reference(x, one.astype(int) * 6, one, layer.fetch.reference)
    np.testing.assert_allclose(np.array(seen["layers.2.experts"]), expected, rtol=0, atol=1e-5)


def test_k_of_one_layer(model):
    with model.intercept("layers.2.router", lambda r, path: r.with_num_experts_per_tok(5)):
        shapes = [experts.shape[1] for experts in routings(model).values()]
    assert shapes == [3, 3, 5, 3]


def test_replaced_logits_are_the_answer(model):
    with model.intercept("lm_head", lambda result, path: result * 2):
        doubled = logits(model)
    np.testing.assert_array_equal(doubled, logits(model) * 2)


def test_the_state_that_a_hook_sees_is_its_own_pass(model):
    """Whatever other passes there are: within it, in another thread, or left midway."""
    left = model.step([7], model.empty_state())
    next(left)
    outer, inner, found = model.empty_state(), model.empty_state(), []

    def look(result, path):
        found.append(model.state)
        if model.state is outer and len(found) == 1:
            model([3], inner)
            other = Thread(target=lambda: next(model.step([5])))
            other.start()
            other.join()
            left.close()

    with model.intercept("layers.[01].mixer", look):
        model([4], outer)
    assert [state is outer for state in found] == [True, False, False, True]
    assert found[1] is found[2] is inner and model.state is None


def test_a_pass_that_was_cancelled_leaves_no_state(model):
    asked = iter([False] * 5)
    with pytest.raises(Cancelled):
        model(IDS, model.empty_state(), cancelled=lambda: next(asked, True))
    assert model.state is None


def test_hooks_of_one_stage_run_in_order(model):
    with model.intercept("lm_head", lambda result, path: result + 1):
        with model.intercept("lm_*", lambda result, path: result * 0):
            assert not logits(model).any()
        with model.intercept("*", lambda result, path: result * 0 if path == "lm_head" else None):
            assert not logits(model).any()
    with model.intercept("lm_head", lambda result, path: result * 0):
        with model.intercept("lm_head", lambda result, path: result + 1):
            assert (logits(model) == 1).all()


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("*", 31), ("layers.*.router", 4), ("layers.[12].*", 14), ("*norm", 9), ("embed", 1)],
)
def test_patterns(model, pattern, count):
    seen = []
    with model.intercept(pattern, lambda result, path: seen.append(path)):
        logits(model)
    assert len(seen) == len(set(seen)) == count


@pytest.mark.parametrize("pattern", ["layers.4.router", "router", "LAYERS.*", "", "layers.*.route"])
def test_pattern_that_matches_nothing(model, pattern):
    with pytest.raises(ValueError, match="matches no stage; paths are like"):
        with model.intercept(pattern, ban([0])):
            pass
    assert model._hooks == {}


def test_nothing_intercepted_calls_no_hook(model, monkeypatch):
    monkeypatch.setattr(Model, "_hooked", lambda *arguments: pytest.fail("a hook was looked for"))
    logits(model)
    with pytest.raises(pytest.fail.Exception):
        with model.intercept("layers.0.router", ban([0])):
            logits(model)


def test_one_hook_is_called_at_its_stage_only(model, monkeypatch):
    called, hooked = [], Model._hooked

    def count(self, path, result):
        called.append(path)
        return hooked(self, path, result)

    monkeypatch.setattr(Model, "_hooked", count)
    with model.intercept("layers.1.fetch", lambda result, path: None):
        logits(model)
    assert called == ["layers.1.fetch"]


def test_layer_card(model):
    html = model.layers[3]._repr_html_()
    assert "Layer 3 (full_attention)" in html and "8, 3 a token" in html
    assert "layer_03.safetensors" in html and "0 of 8 experts" in html
    layer, block = model.layers[3], model.layers[3].fetch.file.layout.block_nbytes
    mixer = (layer.mixer.q_proj, layer.mixer.k_proj, layer.mixer.v_proj, layer.mixer.o_proj)
    shared = layer.shared_expert
    others = (shared.gate_proj, shared.up_proj, shared.down_proj, shared.shared_expert_gate)
    norms = (layer.input_norm, layer.post_norm, layer.mixer.q_norm, layer.mixer.k_norm)
    resident = sum(part.nbytes for part in (*mixer, *others, layer.router.gate))
    resident += sum(norm.weight.nbytes for norm in norms)
    assert f">{format_nbytes(resident)}</td>" in html
    assert f"works with {format_nbytes(resident + 3 * block)}" in html
    layer.fetch.of(np.array([[5]])).wait()
    assert "1 of 8 experts" in layer._repr_html_()
