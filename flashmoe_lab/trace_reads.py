"""Rows of the table reads."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.storage.blocks import RECORD
from flashmoe_lab.trace import Recorder
from flashmoe_lab.trace.schema import SOURCES, WANTED
from flashmoe_lab.trace_batch import Batch, LayerNotes
from flashmoe_lab.trace_notes import Cached
from flashmoe_lab.trace_sources import OWN_THREAD, SSD

_BANK, _PAGE_CACHE, _SSD, _UNKNOWN = (
    SOURCES.index(name) for name in ("bank", "page_cache", "ssd", "unknown")
)


# Of the page cache; None where it was not asked, because the bank seemed to hold the expert.
_BY_ANSWER = {True: _PAGE_CACHE, False: _SSD, None: _UNKNOWN}


class _Layers(NamedTuple):
    """Layers of passes, one a row, and which experts they asked for.

    Attributes:
        asked: bool [n, E].
    """

    position: np.ndarray
    layer: np.ndarray
    routed_ns: np.ndarray
    asked: np.ndarray


class _Fetch(NamedTuple):
    """What was fetched for a layer, and where the bytes were."""

    row: int
    fetched: Fetched
    cached: Cached


class _Came(NamedTuple):
    """What one landing brought for a layer.

    Attributes:
        table: records of its reads.
        own_thread: the number that the run's own thread has in them.
    """

    row: int
    table: np.ndarray
    cached: Cached
    own_thread: int
    is_ahead: bool
    is_used: bool


def add_reads(recorder: Recorder, batch: Batch) -> None:
    """Add a row for each piece that was read, and one for each expert that the bank held."""
    layers, fetches = _layers(batch)
    if not len(layers.layer):
        return
    landings = [landing for fetch in fetches for landing in _came(fetch)]
    # By their bytes: NumPy takes ten times as long over joining records as records.
    came = np.frombuffer(b"".join([landing.table.tobytes() for landing in landings]), RECORD)
    sizes = [len(landing.table) for landing in landings]
    came_for, ahead, used = (
        np.repeat([getattr(landing, name) for landing in landings], sizes).astype(kind)
        for name, kind in (("row", int), ("is_ahead", bool), ("is_used", bool))
    )
    layers.asked[came_for[used], came["expert"][used]] = False
    held_for, held = np.nonzero(layers.asked)
    routed_ns = layers.routed_ns[held_for]
    hits = dict.fromkeys(("submit_ns", "start_ns", "end_ns"), routed_ns)
    hits |= {"expert": held, "offset": 0, "nbytes": 0, "thread": -1, "source": _BANK}
    hits |= {"token": layers.position[held_for], "layer": layers.layer[held_for]}
    hits |= {"wanted": WANTED.index("demand"), "used": True}
    columns: dict[str, Any] = hits
    if len(came):
        reads = {name: came[name] for name in RECORD.names or ()}
        reads |= {"token": layers.position[came_for], "layer": layers.layer[came_for]}
        reads |= {"source": _sources(landings), "used": used}
        reads["wanted"] = np.where(ahead, WANTED.index("prefetch"), WANTED.index("demand"))
        order = np.argsort(np.concatenate([layers.routed_ns[came_for], routed_ns]), kind="stable")
        whole = {name: np.broadcast_to(values, len(held)) for name, values in hits.items()}
        columns = {name: np.concatenate([reads[name], whole[name]])[order] for name in whole}
    recorder.tables["reads"].extend(len(came) + len(held), **columns)


def _layers(batch: Batch) -> tuple[_Layers, list[_Fetch]]:
    """All layers of the passes; those that a listener was told of come last."""
    parts: list[_Layers] = []
    fetches: list[_Fetch] = []
    if batch.layers is not None:
        part, fetches = _by_token(batch, batch.layers)
        parts.append(part)
    found = batch.chosen
    if found:
        first = sum(len(part.layer) for part in parts)
        asked = np.zeros((len(found), found[0][1].fetched.fetch.file.num_experts), bool)
        for row, (number, chosen) in zip(asked, found, strict=True):
            row[chosen.fetched.experts] = True
            if not batch.end_ns[number]:  # an error or a stop in its midst
                row[_never_came(chosen.fetched)] = False
        numbers = [(batch.position[number], c.layer, c.routed_ns) for number, c in found]
        position, layer, routed_ns = np.array(numbers).T
        parts.append(_Layers(position, layer, routed_ns, asked))
        fetches += [_Fetch(first + n, c.fetched, c.cached) for n, (_, c) in enumerate(found)]
    if not parts:
        return _Layers(*(np.empty(0, int) for _ in _Layers._fields)), []
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return _Layers(*columns), fetches


def _by_token(batch: Batch, notes: LayerNotes) -> tuple[_Layers, list[_Fetch]]:
    """Layers that were noted in tokens' memory, which tells of what was fetched only where the bank
    did not hold all."""
    asked = np.zeros(notes.logits.shape, bool)
    np.put_along_axis(asked, notes.experts, True, axis=1)
    pairs = [(number, layer) for number, (layer, _, _) in batch.reads]
    wanted = np.array(pairs, int).reshape(-1, 2)
    rows = np.searchsorted(_key(notes.number, notes.layer), _key(wanted[:, 0], wanted[:, 1]))
    asked[np.setdiff1d(np.flatnonzero(notes.fetched_ns == 0), rows)] = False  # an error came before
    fetches: list[_Fetch] = []
    for row, (number, (_, fetched, cached)) in zip(rows.tolist(), batch.reads, strict=True):
        fetches.append(_Fetch(row, fetched, cached))
        if not batch.end_ns[number]:
            asked[row, _never_came(fetched)] = False
    return _Layers(notes.position, notes.layer, notes.routed_ns, asked), fetches


def _key(number: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Ascending over passes and, within each, layers."""
    return number << 16 | layer


def _came(fetch: _Fetch) -> list[_Came]:
    """What its reads brought; records of a failed one are lost."""
    fetched, own_thread = fetch.fetched, fetch.fetched.fetch.reader.threads
    with suppress(OSError, ValueError):
        fetched.wait()
    for landing in fetched.needless:
        with fetched.fetch.bank.lock:
            landing.settle()
    parts = [(part, True) for part in fetched.landings]
    parts += [(part, False) for part in fetched.needless]
    return [
        _Came(
            row=fetch.row,
            table=part.records.table,
            cached=part.cached if part.is_ahead else fetch.cached,
            own_thread=own_thread,
            is_ahead=part.is_ahead,
            is_used=is_used,
        )
        for part, is_used in parts
        if part.records is not None
    ]


def _never_came(fetched: Fetched) -> list[int]:
    failed = [part.placement.misses for part in fetched.landings if part.records is None]
    return [expert for group in (*failed, *fetched.later) for expert in group]


def _sources(landings: Sequence[_Came]) -> np.ndarray:
    """Where the bytes of each piece were."""
    sources = np.full(sum(len(came.table) for came in landings), _UNKNOWN, np.uint8)
    end = 0
    for came in landings:
        cached, table = came.cached, came.table
        part = slice(end, end + len(table))
        end = part.stop
        if cached == SSD:
            sources[part] = _SSD
        elif cached == OWN_THREAD:
            sources[part] = np.where(table["thread"] == came.own_thread, _PAGE_CACHE, _SSD)
        elif isinstance(cached, dict):
            there = [cached.get(expert) for expert in table["expert"].tolist()]
            sources[part] = [_BY_ANSWER[answer] for answer in there]
    return sources
