"""What tests of the engine share: a prompt, hooks that make a run say, do or fail, and responses
without an engine."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab.generation import GenerationResponse

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


def response(token, reason=None):
    """A letter as a run gives it; the token is its code."""
    return GenerationResponse(
        text=chr(token),
        token=token,
        logprobs=np.zeros(1, np.float32),
        prompt_tokens=1,
        prompt_tps=1.0,
        generation_tokens=1,
        generation_tps=1.0,
        peak_memory=0.0,
        finish_reason=reason,
    )
