"""From what a tracer kept of some passes to rows of the trace: NumPy over all of them at once.

The tracer's other half: it runs between tokens, touches no clock and waits for nothing that is not
long finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe_lab.stages.router import Routing
from flashmoe_lab.trace import Recorder
from flashmoe_lab.trace.schema import PHASES, SOURCES, WANTED

if TYPE_CHECKING:
    from flashmoe_lab.tracing import Chosen, Pass

_BANK, _PAGE_CACHE, _SSD, _UNKNOWN = (
    SOURCES.index(name) for name in ("bank", "page_cache", "ssd", "unknown")
)


def write_rows(
    recorder: Recorder,
    passes: Sequence[Pass],
    spans: Sequence[tuple[int, int, int, int]],
    text: Callable[[int], str],
) -> None:
    """Add everything that these passes did to the recorder's tables."""
    add_tokens(recorder, passes, text)
    _add_routing(recorder, passes)
    _add_reads(recorder, passes)
    _add_spans(recorder, spans)


def add_tokens(recorder: Recorder, passes: Sequence[Pass], text: Callable[[int], str]) -> None:
    """One row a token."""
    for one in passes:
        count = len(one.tokens)
        recorder.tables["tokens"].extend(
            count,
            token=one.position + np.arange(count),
            phase=PHASES.index(one.phase),
            id=np.asarray(one.tokens),
            text=np.array([text(int(token)) for token in one.tokens], object),
            start_ns=one.start_ns,
            end_ns=one.end_ns,
            logprob=one.logprob,
            entropy=one.entropy,
        )


def _add_spans(recorder: Recorder, spans: Sequence[tuple[int, int, int, int]]) -> None:
    if not spans:
        return
    position, codes, start, end = np.array(spans, np.int64).T
    recorder.tables["spans"].extend(
        len(spans),
        token=position,
        layer=(codes >> 16) - 1,
        stage=codes >> 8 & 0xFF,
        lane=codes & 0xFF,
        start_ns=start,
        end_ns=end,
    )


def _add_routing(recorder: Recorder, passes: Sequence[Pass]) -> None:
    """Decode steps together, as far as they have the same K; a chunk of a prompt layer by layer."""
    groups: dict[int, list[tuple[int, int, Routing]]] = {}
    for one in passes:
        for layer, routing in one.routings:
            group = groups.setdefault(routing.num_experts_per_tok, [])
            group.append((one.position, layer, routing))
            if len(one.tokens) > 1:
                _add_routings(recorder, [group.pop()])
    for group in groups.values():
        _add_routings(recorder, group)


def _add_routings(recorder: Recorder, group: Sequence[tuple[int, int, Routing]]) -> None:
    if not group:
        return
    sizes = [routing.experts.shape[0] for _, _, routing in group]
    experts = _joined(routing.experts for _, _, routing in group)  # [rows, K]
    weights = _joined(routing.weights for _, _, routing in group)
    p = _softmax(_joined(routing.logits for _, _, routing in group))  # [rows, E]
    chosen = np.take_along_axis(p, experts, -1)
    token = np.concatenate([np.arange(n) + at for n, (at, _, _) in zip(sizes, group, strict=True)])
    rows, k = experts.shape
    recorder.tables["routing"].extend(
        rows * k,
        token=np.repeat(token, k),
        layer=np.repeat([layer for _, layer, _ in group], np.array(sizes) * k),
        rank=np.tile(np.arange(k), rows),
        expert=experts.ravel(),
        probability=chosen.ravel(),
        weight=weights.ravel(),
        margin=np.repeat(_margin(p, experts, chosen), k),
        entropy=np.repeat(_entropy(p), k),
    )


def _joined(arrays: Iterable[Any]) -> np.ndarray:
    return np.concatenate([np.array(array) for array in arrays])


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def _margin(p: np.ndarray, experts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The least probable of the chosen less the most probable of the rest; NaN without a rest."""
    if experts.shape[1] == p.shape[1]:
        return np.full(len(p), np.nan, np.float32)
    rest = p.copy()
    np.put_along_axis(rest, experts, -1.0, -1)
    return chosen.min(-1) - rest.max(-1)


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, np.finfo(np.float32).tiny))).sum(-1)


def _add_reads(recorder: Recorder, passes: Sequence[Pass]) -> None:
    """A row for each piece that was read, and one for each expert that the bank held."""
    pairs = [(one, chosen) for one in passes for chosen in one.chosen]
    if not pairs:
        return
    tables = [chosen.fetched.reads.table for _, chosen in pairs]
    held = [_held(chosen, table) for (_, chosen), table in zip(pairs, tables, strict=True)]
    rows = np.concatenate([part for both in zip(tables, held, strict=True) for part in both])
    counts = [len(table) + len(hits) for table, hits in zip(tables, held, strict=True)]
    sources = [
        _BANK if read["thread"] < 0 else _source(chosen, int(read["expert"]))
        for (_, chosen), table, hits in zip(pairs, tables, held, strict=True)
        for read in (*table, *hits)
    ]
    names = ("expert", "offset", "nbytes", "submit_ns", "start_ns", "end_ns", "thread")
    recorder.tables["reads"].extend(
        len(rows),
        token=np.repeat([one.position for one, _ in pairs], counts),
        layer=np.repeat([chosen.layer for _, chosen in pairs], counts),
        **{name: rows[name] for name in names},
        source=np.array(sources, np.uint8),
        wanted=WANTED.index("demand"),
        used=True,
    )


def _held(chosen: Chosen, table: np.ndarray) -> np.ndarray:
    """Rows for the experts that the bank held: no bytes, no time."""
    experts = set(chosen.fetched.experts.ravel().tolist()).difference(table["expert"].tolist())
    rows = np.zeros(len(experts), table.dtype)
    rows["layer"], rows["expert"], rows["thread"] = chosen.layer, sorted(experts), -1
    for name in ("submit_ns", "start_ns", "end_ns"):
        rows[name] = chosen.routed_ns
    return rows


def _source(chosen: Chosen, expert: int) -> int:
    if chosen.cached is None:
        return _SSD if chosen.fetched.fetch.reader.name == "direct" else _UNKNOWN
    held = chosen.cached.get(expert)
    return _UNKNOWN if held is None else _PAGE_CACHE if held else _SSD
