"""The look-up of tokens."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import Quantization
from flashmoe_lab.stages.embedding import Embedding


@pytest.mark.parametrize("quantization", [None, Quantization(bits=4)], ids=str)
@pytest.mark.parametrize("tokens", [[0], [5, 5, 23, 0]])
def test_against_reference(linear, quantization, tokens):
    embed = Embedding(linear(24, 64, quantization), mx.float32)
    found = np.array(embed(mx.array(tokens)))
    np.testing.assert_allclose(found, embed.reference(np.array(tokens)), rtol=0, atol=1e-6)
    assert found.shape == (len(tokens), 64)


@pytest.mark.parametrize("quantization", [None, Quantization(bits=4)], ids=str)
def test_gives_the_type_of_activations(linear, quantization):
    embed = Embedding(linear(24, 64, quantization), mx.bfloat16)
    assert embed(mx.array([1])).dtype == mx.bfloat16
