"""Attention of the native kernels over a cache that is there already, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import native

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu or not native.available, reason="native on a CPU only"
)
HIDDEN, ROTARY, THETA, EPS = 12, 4, 1e4, 1e-6
SHAPES = [(32, 2, 256), (6, 2, 20), (3, 3, 16), (5, 1, 72)]  # heads, key heads, dim


@pytest.fixture
def set_threads():
    """native.set_threads, undone."""
    before = native.threads()
    yield native.set_threads
    native.set_threads(before)


class Mixer:
    """An attention stage of random weights with keys and values of some tokens before."""

    def __init__(self, rng, shape, position, room):
        heads, kv_heads, dim = shape
        self.heads, self.kv_heads, self.dim, self.position = heads, kv_heads, dim, position
        rows = (2 * heads * dim, kv_heads * dim, kv_heads * dim)
        self.weights = [rng.normal(size=(n, HIDDEN)).astype(np.float32) for n in rows]
        self.weights.append(rng.normal(size=(HIDDEN, heads * dim)).astype(np.float32))
        self.norms = [rng.normal(size=dim).astype(np.float32) for _ in range(2)]
        cache = (kv_heads, position + room, dim)
        self.before = [rng.normal(size=cache).astype(np.float32) for _ in range(2)]
        matrices = [native.raw_matrix(w, None, None, 0, 0, "float32") for w in self.weights]
        self.stage = native.attention(
            *matrices, *self.norms, EPS, THETA, heads, kv_heads, dim, ROTARY
        )

    def __call__(self, x, chunk):
        caches, outs = [part.copy() for part in self.before], []
        for start in range(0, len(x), chunk):
            rows = x[start : start + chunk]
            outs.append(np.empty_like(rows))
            self.stage(rows, len(rows), self.position + start, *caches, outs[-1])
        return np.concatenate(outs)

    def reference(self, x):
        """The same in float64."""
        w = [part.astype(np.float64) for part in self.weights]
        split = (x @ w[0].T).reshape(len(x), self.heads, 2, self.dim)
        q = self._rotated(split[:, :, 0], self.norms[0])
        k = self._rotated((x @ w[1].T).reshape(len(x), self.kv_heads, -1), self.norms[1])
        v = (x @ w[2].T).reshape(len(x), self.kv_heads, -1)
        keys, values = (part.astype(np.float64) for part in self.before)
        end = self.position + len(x)
        keys[:, self.position : end] = k.swapaxes(0, 1)
        values[:, self.position : end] = v.swapaxes(0, 1)
        out = np.empty((len(x), self.heads, self.dim))
        for t in range(len(x)):
            length = self.position + t + 1
            for h in range(self.heads):
                group = h * self.kv_heads // self.heads
                scores = keys[group, :length] @ q[t, h] / self.dim**0.5
                p = np.exp(scores - scores.max())
                out[t, h] = p @ values[group, :length] / p.sum()
        out /= 1 + np.exp(-split[:, :, 1])
        return out.reshape(len(x), -1) @ w[3].T

    def _rotated(self, x, norm):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * norm
        half = ROTARY // 2
        positions = self.position + np.arange(len(x))[:, None, None]
        angle = positions * THETA ** (-np.arange(half) / half)
        a, b = x[..., :half].copy(), x[..., half:ROTARY].copy()
        x[..., :half] = a * np.cos(angle) - b * np.sin(angle)
        x[..., half:ROTARY] = b * np.cos(angle) + a * np.sin(angle)
        return x


@pytest.mark.parametrize("position", [0, 5, 255, 256, 1001])
@pytest.mark.parametrize("shape", SHAPES)
def test_over_a_cache_of_any_length(rng, isa, shape, position):
    tokens = 3
    mixer = Mixer(rng, shape, position, tokens)
    x = rng.normal(size=(tokens, HIDDEN)).astype(np.float32)
    truth = mixer.reference(x.astype(np.float64))
    np.testing.assert_allclose(mixer(x, tokens), truth, rtol=0, atol=1e-5 * np.abs(truth).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_depends_on_nothing_else(rng, isa, set_threads, shape):
    mixer = Mixer(rng, shape, 2050, 11)
    x = rng.normal(size=(11, HIDDEN)).astype(np.float32)
    found = []
    for threads, chunk in [(1, 11), (1, 1), (2, 3), (3, 7), (5, 8)]:
        set_threads(threads)
        found.append(mixer(x, chunk))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_room_behind_the_last_token_is_not_read(rng, isa):
    mixer = Mixer(rng, (32, 2, 256), 300, 40)
    x = rng.normal(size=(1, HIDDEN)).astype(np.float32)
    truth = mixer.reference(x.astype(np.float64))
    for part in mixer.before:
        part[:, 301:] = np.nan
    np.testing.assert_allclose(mixer(x, 1), truth, rtol=0, atol=1e-5 * np.abs(truth).max())
