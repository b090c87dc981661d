"""The head."""

import mlx.core as mx
import numpy as np

from flashmoe_lab.stages.lm_head import LMHead


def test_against_reference(linear, rng):
    head, x = LMHead(linear(96, 64)), rng.normal(size=(5, 64))
    found = np.array(head(mx.array(x, mx.float32)))
    np.testing.assert_allclose(found, head.reference(x), rtol=0, atol=1e-5)


def test_logits_are_float32(linear):
    assert LMHead(linear(96, 64))(mx.ones((1, 64), mx.bfloat16)).dtype == mx.float32
