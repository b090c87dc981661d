"""Probes: what a stage gives, or keeps to itself, as arrays with a row a token, for traces.

A probe is named like "layers.3.mixer.decay" and is asked right after its stage. It evaluates what
it takes at once, so that nothing later can change it; a run that records arrays waits more for it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.layer import Layer
from flashmoe_lab.model import Model
from flashmoe_lab.stages.attention import GatedAttention
from flashmoe_lab.stages.delta_net import GatedDeltaNet
from flashmoe_lab.state import AttentionState, DeltaState, LayerState

_HIDDEN = ("input_norm", "mixer", "post_norm", "shared_expert", "experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One array a token.

    Attributes:
        path: the stage after which it is taken.
        shape: of one token's row; for attention with room for the whole sequence.
        last_only: of a chunk, only the last token has a row.
        take: (result, the layer's normed input [T, hidden], state) -> rows [T or 1, ...].
        layer: whose input and state it takes; None is outside the layers.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    last_only: bool
    take: Callable[[Any, Any, Any], mx.array]
    layer: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one token's row."""
        return 4 * int(np.prod(self.shape))

    def rows(self, result: Any, normed: mx.array | None, state: LayerState | None) -> np.ndarray:
        """Evaluated, float32."""
        return np.array(self.take(result, normed, state).astype(mx.float32))


def find_probes(model: Model, patterns: Sequence[str], length: int) -> list[Probe]:
    """The probes whose names match any of the shell-like patterns.

    Args:
        length: tokens that the sequence may have.

    Raises:
        ValueError: a pattern matches none.
    """
    if not patterns:
        return []
    known = [
        replace(probe, layer=layer.index)
        for layer in model.layers
        for probe in _of_layer(layer, model, length)
    ]
    known.append(
        Probe(
            name="lm_head.logits",
            path="lm_head",
            shape=(model.config.vocab_size,),
            last_only=True,
            take=lambda result, normed, state: result[-1:],
        )
    )
    for pattern in patterns:
        if not any(fnmatchcase(probe.name, pattern) for probe in known):
            endings = dict.fromkeys(probe.name.split(".", 2)[-1] for probe in known)
            raise ValueError(
                f"record={pattern!r} matches nothing; names are like layers.0.mixer.decay, "
                f"with the endings {', '.join(endings)}"
            )
    return [p for p in known if any(fnmatchcase(p.name, pattern) for pattern in patterns)]


def check_room(probes: Sequence[Probe], length: int, most_gb: float) -> int:
    """Bytes that the arrays of a run of `length` tokens take; ValueError if over the budget."""
    nbytes = sum(probe.nbytes for probe in probes) * length
    if nbytes > most_gb * 1e9:
        raise ValueError(
            f"record would keep {nbytes / 1e9:.2f} GB of arrays, record_gb allows {most_gb}; "
            "name fewer stages, or allow more"
        )
    return nbytes


def _of_layer(layer: Layer, model: Model, length: int) -> Iterator[Probe]:
    base, config = f"layers.{layer.index}", model.config
    for stage in _HIDDEN:
        yield Probe(
            name=f"{base}.{stage}.output",
            path=f"{base}.{stage}",
            shape=(config.hidden_size,),
            last_only=False,
            take=lambda result, normed, state: result,
        )
    yield Probe(
        name=f"{base}.router.logits",
        path=f"{base}.router",
        shape=(config.num_experts,),
        last_only=False,
        take=lambda result, normed, state: result.logits,
    )
    mixer = layer.mixer
    if isinstance(mixer, GatedDeltaNet):
        yield from _of_delta_net(f"{base}.mixer", mixer)
    else:
        yield Probe(
            name=f"{base}.mixer.attention",
            path=f"{base}.mixer",
            shape=(mixer.heads, length),
            last_only=True,
            take=lambda result, normed, state, mixer=mixer: attention_weights(
                mixer, normed[-1:], state
            ),
        )


def _of_delta_net(path: str, mixer: GatedDeltaNet) -> Iterator[Probe]:
    heads, state_shape = (mixer.v_heads,), (mixer.v_heads, mixer.v_dim, mixer.k_dim)
    gates = {"decay": 0, "write_strength": 1}
    for name, place in gates.items():
        yield Probe(
            name=f"{path}.{name}",
            path=path,
            shape=heads,
            last_only=False,
            take=lambda result, normed, state, place=place: delta_gates(mixer, normed)[place],
        )
    yield Probe(
        name=f"{path}.state_norm",
        path=path,
        shape=heads,
        last_only=True,
        take=lambda result, normed, state: state_norm(state)[None],
    )
    yield Probe(
        name=f"{path}.state",
        path=path,
        shape=state_shape,
        last_only=True,
        take=lambda result, normed, state: _recurrent(state)[None],
    )


def delta_gates(mixer: GatedDeltaNet, normed: mx.array) -> tuple[mx.array, mx.array]:
    """Decay and write strength (beta), each [T, Hv] and between 0 and 1, from the mixer's input."""
    rate = mx.logaddexp(mixer.in_proj_a(normed).astype(mx.float32) + mixer.dt_bias, mx.array(0.0))
    beta = mx.sigmoid(mixer.in_proj_b(normed).astype(mx.float32))
    return mx.exp(-mx.exp(mixer.A_log) * rate), beta


def state_norm(state: LayerState) -> mx.array:
    """Frobenius norm of each head's recurrent matrix, [Hv]."""
    matrices = _recurrent(state)
    return mx.sqrt((matrices * matrices).sum(axis=(-2, -1)))


def _recurrent(state: LayerState) -> mx.array:
    assert isinstance(state, DeltaState)
    return mx.array(state.recurrent)


def attention_weights(mixer: GatedAttention, normed: mx.array, state: LayerState) -> mx.array:
    """How the last token weighs every position up to its own, [1, H, S], after the mixer ran."""
    assert isinstance(state, AttentionState)
    q = mixer.q_proj(normed).reshape(1, mixer.heads, 2 * mixer.head_dim)[..., : mixer.head_dim]
    q = mx.fast.rope(
        mixer.q_norm(q).swapaxes(0, 1)[None],
        mixer.rotary_dim,
        traditional=False,
        base=mixer.rope_theta,
        scale=1.0,
        offset=state.length - 1,
    )[0, :, 0]
    keys = mx.array(state.keys)[:, : state.length]  # [Hk, S, D]
    q = q.reshape(mixer.kv_heads, -1, mixer.head_dim) * mixer.head_dim**-0.5
    scores = q.astype(mx.float32) @ keys.swapaxes(-1, -2).astype(mx.float32)  # [Hk, G, S]
    return mx.softmax(scores, axis=-1).reshape(1, mixer.heads, state.length)
