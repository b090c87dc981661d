"""What tests of the engine share: a prompt, and hooks that make a run say, do or fail."""

import mlx.core as mx
import pytest

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
