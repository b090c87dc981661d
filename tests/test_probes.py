"""What a trace keeps of stages: held to the float64 references."""

import numpy as np
import pytest

from flashmoe_lab.state import DeltaState

PROMPT = [5, 17, 301, 44, 8]


@pytest.fixture(scope="module")
def trace(packed):
    import flashmoe_lab as fl

    with pytest.warns(UserWarning, match=r"no tokenizer\.json"):
        engine = fl.load(packed("golden/hf"))
    with engine:
        record = ["layers.*.mixer.*", "layers.1.router.logits", "layers.2.experts.output"]
        run = engine.stream_generate(
            PROMPT, 4, trace="stages", record=[*record, "lm_head.logits"], prefill_chunk=2
        )
        assert run.record_nbytes > 0
        run.wait()
        state = engine.model.empty_state()
        ids = [*PROMPT, *run.tokens[:-1]]
        for token in ids:
            engine.model([token], state)
        state.evaluate()
        assert run.trace is not None
        assert sum(rows.nbytes for _, rows in run.trace.arrays.values()) <= run.record_nbytes
        yield run.trace, engine, ids, state


def _inputs(engine, ids, layer):
    """The normed input of a layer's mixer for the whole sequence, in float64."""
    x = engine.model.embed.reference(np.array(ids))
    for before in engine.layers[:layer]:
        x = before.reference(x)
    return engine.layers[layer].input_norm.reference(x)


def test_gates_are_the_mixers(trace):
    record, engine, ids, _ = trace
    mixer, x = engine.layers[1].mixer, _inputs(engine, ids, 1)
    rate = np.logaddexp(mixer.in_proj_a.reference(x) + np.array(mixer.dt_bias), 0)
    decay = np.exp(-np.exp(np.array(mixer.A_log, np.float64)) * rate)
    beta = 1 / (1 + np.exp(-mixer.in_proj_b.reference(x)))
    for name, right in (("decay", decay), ("write_strength", beta)):
        positions, rows = record.arrays[f"layers.1.mixer.{name}"]
        assert positions.tolist() == list(range(8))
        assert np.allclose(rows, right, atol=1e-4)


def test_state_is_the_sequences(trace):
    record, engine, ids, state = trace
    positions, rows = record.arrays["layers.0.mixer.state"]
    assert positions.tolist() == [1, 3, 4, 5, 6, 7]  # of a chunk of the prompt, its last token
    assert isinstance(state[0], DeltaState)
    last = np.array(state[0].recurrent)
    assert np.allclose(rows[-1], last, atol=1e-5)
    assert not np.allclose(rows[-1], rows[-2], atol=1e-5)  # nothing has changed them since
    norms = record.arrays["layers.0.mixer.state_norm"][1]
    assert np.allclose(norms, np.sqrt((rows**2).sum((-2, -1))), rtol=1e-5)


def test_attention_weights_are_the_references(trace):
    record, engine, ids, _ = trace
    mixer, x = engine.layers[3].mixer, _inputs(engine, ids, 3)
    tokens, group = len(ids), mixer.heads // mixer.kv_heads
    split = mixer.q_proj.reference(x).reshape(tokens, mixer.heads, -1)
    q = mixer._rotate64(mixer.q_norm.reference(split[..., : mixer.head_dim]))
    k = mixer.k_proj.reference(x).reshape(tokens, mixer.kv_heads, -1)
    k = np.repeat(mixer._rotate64(mixer.k_norm.reference(k)), group, axis=1)
    scores = np.einsum("thd,shd->ths", q, k) * mixer.head_dim**-0.5
    p = np.exp(np.where(np.tri(tokens, dtype=bool)[:, None], scores, -np.inf))
    p /= p.sum(-1, keepdims=True)
    positions, rows = record.arrays["layers.3.mixer.attention"]
    assert np.allclose(rows, p[positions], atol=1e-4)


def test_logits_and_outputs(trace):
    record, engine, ids, _ = trace
    right = engine.logits(ids)
    positions, rows = record.arrays["lm_head.logits"]
    assert np.allclose(rows, right[positions], atol=1e-3)
    router = record.arrays["layers.1.router.logits"][1]
    chosen = record.routing.query("layer == 1 and rank == 0").sort_values("token").expert
    assert router.argmax(-1).tolist() == chosen.tolist()
    assert record.arrays["layers.2.experts.output"][1].shape == (8, engine.config.hidden_size)


def test_names_and_budget_are_checked_before_the_run(engine):
    with pytest.raises(ValueError, match=r"record='layers\.\*\.mixer\.mood' matches nothing"):
        engine.stream_generate(PROMPT, 2, trace="flow", record=["layers.*.mixer.mood"])
    with pytest.raises(ValueError, match=r"0\.\d\d GB of arrays, record_gb allows 0\.001"):
        engine.stream_generate(PROMPT, 500, trace="flow", record=["*"], record_gb=0.001)
    with pytest.raises(ValueError, match=r"record=\['nonsense'\] without trace="):
        engine.stream_generate(PROMPT, 2, record=["nonsense"])
    run = engine.stream_generate(PROMPT, 95, trace="flow", record=["layers.0.router.logits"])
    assert run.record_nbytes == 100 * engine.config.num_experts * 4
