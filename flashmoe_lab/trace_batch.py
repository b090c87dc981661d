"""Batch: what a tracer kept of some passes through the model, as columns for rows to be made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.token_memory import TokenParts
from flashmoe_lab.trace_notes import PASS_NUMBERS, Cached, Chosen, Notes


class LayerNotes(NamedTuple):
    """What single tokens noted of their layers, one row a layer that one has gone through.

    Attributes:
        number: of the pass in its batch.
        position: of the token.
        layer: of the model.
        routed_ns, asked_ns, fetched_ns, done_ns: 0 where an error came before.
        looked_ns: before `routed_ns` where the next layer's router was not asked.
        logits, experts, weights: [n, E], [n, K], [n, K]; a run has one K.
    """

    number: np.ndarray
    position: np.ndarray
    layer: np.ndarray
    routed_ns: np.ndarray
    asked_ns: np.ndarray
    fetched_ns: np.ndarray
    done_ns: np.ndarray
    looked_ns: np.ndarray
    logits: np.ndarray
    experts: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some passes one after another.

    Attributes:
        phase, position, tokens, start_ns, end_ns: one a pass: code of its phase, first position,
            number of tokens; `end_ns` is 0 where it came to no end.
        last_ns: the end of its last span.
        surprise: float32 [passes, 2], log-probability and entropy.
        ids: of all tokens.
        marks: position, code and end in ns, int64 [n, 3], of what listeners noted.
        layers: what tokens noted that nobody listened to; None if there were none.
        routings, chosen, reads: as in `Notes`, each with the number of its pass.
    """

    phase: np.ndarray
    position: np.ndarray
    tokens: np.ndarray
    start_ns: np.ndarray
    end_ns: np.ndarray
    last_ns: np.ndarray
    surprise: np.ndarray
    ids: list[int]
    marks: np.ndarray
    layers: LayerNotes | None
    routings: list[tuple[int, tuple[int, Routing]]]
    chosen: list[tuple[int, Chosen]]
    reads: list[tuple[int, tuple[int, Fetched, Cached]]]

    @classmethod
    def of(cls, notes: Notes) -> "Batch":
        """All passes that are over, of which there must be some."""
        over, counts = len(notes.ends), [*notes.counts]
        opened = np.array(notes.opened).reshape(-1, PASS_NUMBERS)
        phase, position, tokens = opened[:over, :3].T
        begins = np.vstack([opened[:, 3:], counts])[: over + 1]
        row_of, mark_of, *others = map(_numbers, begins.T)
        start_ns, end_ns = np.array(notes.starts[:over]), np.array(notes.ends)
        last_ns = end_ns.copy()
        marks = np.array(notes.marks[: len(mark_of)]).reshape(-1, 2)
        mark_of = mark_of[::2]
        layers = _layers(notes, row_of, position, start_ns)
        if not last_ns[-1]:  # an error or a stop in its midst
            moments = [marks[mark_of == len(last_ns) - 1, 1]]
            if layers is not None:
                moments.append(layers.done_ns[layers.number == len(last_ns) - 1])
            last_ns[-1] = np.concatenate(moments).max(initial=0)
        routing_of, chosen_of, read_of = (of.tolist() for of in others)
        return cls(
            phase=phase,
            position=position,
            tokens=tokens,
            start_ns=start_ns,
            end_ns=end_ns,
            last_ns=last_ns,
            surprise=np.array(notes.surprise[: 2 * over], np.float32).reshape(-1, 2),
            ids=notes.ids[: tokens.sum()],
            marks=np.column_stack([position[mark_of], marks]),
            layers=layers,
            routings=list(zip(routing_of, notes.routings, strict=False)),
            chosen=list(zip(chosen_of, notes.chosen, strict=False)),
            reads=list(zip(read_of, notes.reads, strict=False)),
        )

    def fetches(self) -> Iterator[tuple[int, int, Fetched]]:
        """Number of the pass, layer, and what it fetched; of those that nobody listened to, only
        where something was read."""
        yield from ((number, chosen.layer, chosen.fetched) for number, chosen in self.chosen)
        yield from ((number, layer, fetched) for number, (layer, fetched, _) in self.reads)


def _numbers(counts: np.ndarray) -> np.ndarray:
    """Which pass each of some things belongs to, of how many there were before each pass and at the
    end."""
    return np.repeat(np.arange(len(counts) - 1), np.diff(counts))


def _layers(
    notes: Notes, row_of: np.ndarray, position: np.ndarray, start_ns: np.ndarray
) -> LayerNotes | None:
    if not len(row_of):
        return None
    parts = TokenParts.of(notes.left[: len(row_of)], *notes.sizes)
    row, layer = np.nonzero(parts.moments[..., 0] > start_ns[row_of, None])  # others are older
    number = row_of[row]
    moments, looked, *routing = (part[row, layer] for part in parts)
    noted = np.column_stack([moments, looked])
    return LayerNotes(number, position[number], layer, *noted.T, *routing)
