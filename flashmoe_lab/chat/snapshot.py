"""What is kept of a sequence: keys and values in pieces, recurrent matrices at points.

Keys and values only grow, so a piece holds those of its own tokens and a sequence is its pieces one
after another. Convolution inputs and recurrent matrices are overwritten by every token and cannot
be rewound, so they are copied at the points that one may want to return to. This module copies and
puts together; which points are kept is prefix_cache.py's business. MLX work: the engine's thread.
"""

from collections.abc import Iterable, Sequence

import mlx.core as mx

from flashmoe_lab.state import AttentionState, DeltaState, SequenceState, copy_array

Pair = tuple[mx.array, mx.array]
Rows = list[Pair]  # of each full-attention layer in order: keys, values [Hk, T, D]
Matrices = list[Pair]  # of each DeltaNet layer in order: conv, recurrent


def rows_of(state: SequenceState, start: int) -> Rows:
    """A copy of the keys and values of all tokens from `start` on."""
    return _evaluated(
        [
            (_piece(layer.keys, start, layer.length), _piece(layer.values, start, layer.length))
            for layer in state.layers
            if isinstance(layer, AttentionState)
        ]
    )


def matrices_of(state: SequenceState) -> Matrices:
    """A copy of what stands for all tokens together."""
    return _evaluated(
        [
            (copy_array(layer.conv), copy_array(layer.recurrent))
            for layer in state.layers
            if isinstance(layer, DeltaState)
        ]
    )


def split_rows(rows: Rows, place: int) -> tuple[Rows, Rows]:
    """Two pieces, cut before token `place`."""
    front = [(_piece(k, 0, place), _piece(v, 0, place)) for k, v in rows]
    back = [(_piece(k, place, k.shape[1]), _piece(v, place, v.shape[1])) for k, v in rows]
    return _evaluated(front), _evaluated(back)


def refill(
    state: SequenceState, tokens: Sequence[int], pieces: Sequence[Rows], matrices: Matrices
) -> None:
    """Bring an empty state to where `tokens` have been read; what is given stays as it is."""
    delta, attention = iter(matrices), 0
    for layer in state.layers:
        if isinstance(layer, AttentionState):
            keys = mx.concatenate([rows[attention][0] for rows in pieces], axis=1)
            values = mx.concatenate([rows[attention][1] for rows in pieces], axis=1)
            layer.append(keys, values)
            attention += 1
        else:
            conv, recurrent = next(delta)
            layer.conv, layer.recurrent = copy_array(conv), copy_array(recurrent)
    state.tokens = list(tokens)
    state.evaluate()


def kept_nbytes(state: SequenceState) -> int:
    """Bytes of all that a snapshot of the state needs."""
    total = 0
    for layer in state.layers:
        if isinstance(layer, AttentionState):
            per_token = layer.keys[:, :1].nbytes + layer.values[:, :1].nbytes
            total += layer.length * per_token
        else:
            total += layer.conv.nbytes + layer.recurrent.nbytes
    return total


def pairs_nbytes(pairs: Iterable[Pair]) -> int:
    """Bytes of the arrays."""
    return sum(a.nbytes + b.nbytes for a, b in pairs)


def _piece(array: mx.array, start: int, end: int) -> mx.array:
    return copy_array(array[:, start:end])


def _evaluated(pairs: list[Pair]) -> list[Pair]:
    mx.eval([array for pair in pairs for array in pair])
    return pairs
