"""The price of an intervention, worked out on made traces."""

from types import SimpleNamespace

import numpy as np
import pytest

from flashmoe_lab.trace import compare
from tests.trace.made import made_trace

_NAME = "lm_head.logits"


def _with_logits(rows, ids=None):
    trace = made_trace()
    trace.arrays = {_NAME: (np.array([1, 2, 3]), np.array(rows, np.float32))}
    if ids is not None:
        trace.tokens["id"] = ids
    return trace


def test_kl_and_agreement_by_value():
    half, skew = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    found = compare(_with_logits([half, skew, half]), _with_logits([half + 7, half, skew]))
    kl = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    back = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert found.tokens.kl_nats.tolist() == pytest.approx([0, kl, back], abs=1e-7)
    assert found.tokens.top1_agrees.tolist() == [True, False, False]
    assert found.tokens.token.tolist() == [1, 2, 3]
    summary = found.summary.iloc[0]
    assert summary.kl_nats_mean == pytest.approx((kl + back) / 3, abs=1e-7)
    assert summary.kl_nats_max == pytest.approx(max(kl, back), abs=1e-7)
    assert summary.top1_agreement == pytest.approx(1 / 3)


def test_the_same_logits_have_no_divergence_at_all():
    rows = np.random.default_rng(0).normal(size=(3, 50))
    found = compare(_with_logits(rows), _with_logits(rows))
    assert found.tokens.kl_nats.tolist() == [0, 0, 0] and found.tokens.top1_agrees.all()


def test_impossible_tokens_count_nothing():
    rows = [[0.0, -np.inf, 1.0]] * 3
    assert compare(_with_logits(rows), _with_logits(rows)).tokens.kl_nats.tolist() == [0, 0, 0]


def test_bytes_and_time_are_of_the_pass_that_made_the_prediction():
    cheap = _with_logits(np.zeros((3, 2)))
    cheap.reads.loc[cheap.reads.token == 3, "nbytes"] = 0
    found = compare(_with_logits(np.zeros((3, 2))), cheap)
    assert found.tokens.nbytes_a.tolist() == [6000, 1000, 2000]  # a chunk's are its last token's
    assert found.tokens.nbytes_b.tolist() == [6000, 1000, 0]
    assert found.tokens.ms_a.tolist() == [20, 20, 30]
    summary = found.summary.iloc[0]  # of the steps, without the prompt
    assert (summary.nbytes_per_token_a, summary.nbytes_per_token_b) == (1500, 500)
    assert summary.nbytes_saved == pytest.approx(2 / 3) and summary.ms_saved == 0
    assert "nbytes_saved" in repr(found) and "<table" in found._repr_html_()


def test_chunks_of_a_prompt_are_no_tokens():
    a, b = _with_logits(np.zeros((3, 2))), _with_logits(np.zeros((3, 2)))
    for trace in (a, b):
        trace.tokens.loc[trace.tokens.token <= 2, "phase"] = "prefill"  # in chunks of 2 and 1
    found = compare(a, b)
    assert found.tokens.phase.tolist() == ["prefill", "prefill", "decode"]
    assert found.summary.nbytes_per_token_a.iloc[0] == 2000
    for trace in (a, b):
        trace.tokens["phase"] = "prefill"
    assert np.isnan(compare(a, b).summary.ms_per_token_a.iloc[0])


def test_only_the_common_beginning_is_compared():
    rows = np.zeros((3, 2))
    found = compare(_with_logits(rows), _with_logits(rows, ids=[10, 11, 12, 99, 14]))
    assert found.tokens.token.tolist() == [1, 2]
    with pytest.raises(ValueError, match="different tokens; generate the second with follow="):
        compare(_with_logits(rows), _with_logits(rows, ids=[9, 11, 12, 13, 14]))


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match=r"the second run kept no logits; .*lm_head\.logits"):
        compare(_with_logits(np.zeros((3, 2))), made_trace())
    run = SimpleNamespace(trace=None)
    with pytest.raises(ValueError, match="the first run has no trace"):
        compare(run, made_trace())  # pyright: ignore[reportArgumentType]
