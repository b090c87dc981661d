"""From what a tracer kept of some passes to rows of the trace: NumPy over all of them at once.

The tracer's other half: it runs between tokens, touches no clock and waits for nothing that is not
long finished. Tables tokens and spans are here, routing and reads in files of their own.
"""

from collections.abc import Callable

import numpy as np

from flashmoe_lab.trace import Recorder
from flashmoe_lab.trace_batch import Batch, LayerNotes
from flashmoe_lab.trace_notes import RECORD, code
from flashmoe_lab.trace_reads import add_reads
from flashmoe_lab.trace_routing import add_routing

_FETCH = code(-1, "fetch", "io")
_BY_TOKEN = np.array(
    [
        code(-1, *span)
        for span in (("to_router", "compute"), ("fetch", "io"), ("experts", "compute"))
    ]
)
_LOOK_AHEAD = code(-1, "look_ahead", "compute")
_IN_LAYER = 0xFFFF  # of a code, all but the layer


class Rows:
    """Fills the tables of a run.

    Args:
        text: gives what a token adds to the text, token after token.

    Attributes:
        since_ns: where the next span begins.
        record_ns: time of all spans that were work for the record.
    """

    def __init__(self, recorder: Recorder, text: Callable[[int], str]) -> None:
        self.recorder, self.text = recorder, text
        self.since_ns = self.record_ns = 0

    def add(self, batch: Batch) -> None:
        """Add everything that some passes did."""
        self._add_tokens(batch)
        add_routing(self.recorder, batch)
        add_reads(self.recorder, batch)
        marks = batch.marks
        if batch.layers is not None:
            marks = np.concatenate([marks, _marks_by_token(batch.layers)])
            marks = marks[np.argsort(marks[:, 2], kind="stable")]
        self._add_spans(_with_waits(marks, batch))

    def _add_tokens(self, batch: Batch) -> None:
        """One row a token; a pass of a generated token has a single one."""
        counts, ids = batch.tokens, batch.ids
        begins = batch.position - np.cumsum(counts) + counts
        columns = (batch.phase, batch.start_ns * (batch.end_ns > 0), batch.end_ns, batch.surprise)
        phase, start_ns, end_ns, surprise = (np.repeat(part, counts, axis=0) for part in columns)
        self.recorder.tables["tokens"].extend(
            len(ids),
            token=np.repeat(begins, counts) + np.arange(len(ids)),
            phase=phase,
            id=ids,
            text=np.array([self.text(token) for token in ids], object),
            start_ns=start_ns,
            end_ns=end_ns,
            logprob=surprise[:, 0],
            entropy=surprise[:, 1],
        )

    def record_until(self, end_ns: int, position: int) -> None:
        """What came last was work for the record."""
        self._add_spans(np.array([[position, RECORD, end_ns]]))

    def _add_spans(self, marks: np.ndarray) -> None:
        """They follow one another, so each begins where the one before it ends."""
        if not len(marks):
            return
        position, codes, end = marks.T
        start = np.concatenate([[self.since_ns], end[:-1]])
        self.recorder.tables["spans"].extend(
            len(end),
            token=position,
            layer=(codes >> 16) - 1,
            stage=codes >> 8 & 0xFF,
            lane=codes & 0xFF,
            start_ns=start,
            end_ns=end,
        )
        self.record_ns += int((end - start)[codes == RECORD].sum())
        self.since_ns = int(end[-1])


def _marks_by_token(notes: LayerNotes) -> np.ndarray:
    """Position, code and end in ns of what tokens noted, layer by layer."""
    ends = np.column_stack([notes.routed_ns, notes.fetched_ns, notes.done_ns])
    marks = np.empty((*ends.shape, 3), np.int64)
    marks[..., 0] = notes.position[:, None]
    marks[..., 1] = (notes.layer[:, None] + 1 << 16) + _BY_TOKEN
    marks[..., 2] = ends
    asked = notes.asked_ns > notes.routed_ns
    asking = np.column_stack(
        [notes.position[asked], np.full(asked.sum(), RECORD), notes.asked_ns[asked]]
    )
    looked = (notes.looked_ns > notes.routed_ns) & (notes.fetched_ns > 0)
    looking = marks[looked, 1].copy()  # what ended as a fetch was one until it began to look
    marks[looked, 1, 2] = notes.looked_ns[looked]
    looking[:, 1] += _LOOK_AHEAD - _FETCH
    return np.concatenate([marks[ends > 0], asking, looking])


def _with_waits(marks: np.ndarray, batch: Batch) -> np.ndarray:
    """The same marks, with spans cut where reads were waited for.

    A layer's experts are computed as they come, so most waiting is done inside that span. All of a
    landing's is told as one, where it began; if there was nothing to compute before, the fetch
    just lasts until then.
    """
    found = [
        (
            code(layer, "fetch", "io"),
            landing.wait_start_ns,
            landing.waited_ns,
            number or fetched.holds_some,
        )
        for one, layer, fetched in batch.fetches()
        for number, landing in enumerate(fetched.landings)
        if 0 < landing.wait_start_ns < batch.last_ns[one]
    ]
    if not found:
        return marks
    waits = np.array(found, np.int64)
    places = np.searchsorted(marks[:, 2], waits[:, 1], side="right")
    # Those of a fetch are told as such; what came while the run looked ahead was not waited for.
    inside = ~np.isin(marks[places, 1] & _IN_LAYER, (_FETCH, _LOOK_AHEAD))
    waits, places = waits[inside], places[inside]
    fetch, start, dur, apart = waits.T
    position, around, end = marks[places].T
    stops = np.column_stack([position, fetch, np.minimum(start + dur, end)])
    begins = np.column_stack([position, around, start])[apart > 0]
    lasts = np.zeros(len(marks), bool)
    lasts[places[apart == 0] - 1] = True
    marks = marks[~(lasts & (marks[:, 1] & _IN_LAYER == _FETCH & _IN_LAYER))]
    # At the same moment a wait ends before its surroundings do, and begins after they do.
    cut = np.concatenate([stops, marks, begins])
    return cut[np.argsort(cut[:, 2], kind="stable")]
