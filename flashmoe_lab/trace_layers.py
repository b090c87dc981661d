"""LayerNotes: what single tokens noted of their layers, as columns over many passes."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from flashmoe_lab.token_memory import routing_parts
from flashmoe_lab.trace_notes import Pass

_NUMBERS = 5  # that a layer notes, see TokenMemory


class LayerNotes(NamedTuple):
    """One row a layer that a token has gone through.

    Attributes:
        number: of the pass.
        position: of the token.
        layer: of the model.
        routed_ns, asked_ns, fetched_ns, done_ns: 0 where an error came before.
        logits, experts, weights: [n, E], [n, K], [n, K]; a run has one K.
    """

    number: np.ndarray
    position: np.ndarray
    layer: np.ndarray
    routed_ns: np.ndarray
    asked_ns: np.ndarray
    fetched_ns: np.ndarray
    done_ns: np.ndarray
    logits: np.ndarray
    experts: np.ndarray
    weights: np.ndarray


def layers_noted(passes: Sequence[Pass]) -> LayerNotes | None:
    """Of all passes, in their order; None if no token noted any."""
    left = [(number, one, one.token) for number, one in enumerate(passes) if one.token]
    if not left:
        return None
    lists = [token.notes + [0] * (-len(token.notes) % _NUMBERS) for _, _, token in left]
    layer, *moments = np.array([*chain(*lists)], np.int64).reshape(-1, _NUMBERS).T
    row = np.repeat(np.arange(len(left)), [len(notes) // _NUMBERS for notes in lists])
    routing = np.frombuffer(b"".join([token.routing for _, _, token in left]), np.float32)
    parts = routing_parts(routing.reshape(len(left), -1), *left[0][2].sizes)
    return LayerNotes(
        np.array([number for number, _, _ in left])[row],
        np.array([one.position for _, one, _ in left])[row],
        layer,
        *moments,
        *(part[row, layer] for part in parts),
    )
