"""From what a tracer kept of some passes to rows of the trace: NumPy over all of them at once.

The tracer's other half: it runs between tokens, touches no clock and waits for nothing that is not
long finished.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.storage.blocks import RECORD
from flashmoe_lab.trace import Recorder
from flashmoe_lab.trace.schema import PHASES, SOURCES, WANTED
from flashmoe_lab.trace_notes import Chosen, Pass, code
from flashmoe_lab.trace_sources import OWN_THREAD, SSD

_BANK, _PAGE_CACHE, _SSD, _UNKNOWN = (
    SOURCES.index(name) for name in ("bank", "page_cache", "ssd", "unknown")
)


def write_rows(
    recorder: Recorder,
    passes: Sequence[Pass],
    between: Sequence[tuple[int, int, int, int]],
    text: Callable[[int], str],
) -> None:
    """Add everything that these passes did to the recorder's tables.

    Args:
        between: position, code, start and end in ns of what was done between passes.
    """
    if passes:
        _add_tokens(recorder, passes, text)
    _add_routing(recorder, passes)
    _add_reads(recorder, passes)
    _add_spans(recorder, passes, between)


def _add_tokens(recorder: Recorder, passes: Sequence[Pass], text: Callable[[int], str]) -> None:
    """One row a token; a pass of a generated token has a single one."""
    logprob, entropy = _surprise(passes)
    counts = [len(one.tokens) for one in passes]
    ids = np.array([token for one in passes for token in one.tokens], int)
    token = np.concatenate([one.position + np.arange(len(one.tokens)) for one in passes])
    recorder.tables["tokens"].extend(
        len(ids),
        token=token,
        phase=np.repeat([PHASES.index(one.phase) for one in passes], counts),
        id=ids,
        text=np.array([text(token) for token in ids.tolist()], object),
        start_ns=np.repeat([one.start_ns if one.end_ns else 0 for one in passes], counts),
        end_ns=np.repeat([one.end_ns for one in passes], counts),
        logprob=np.repeat(logprob, counts),
        entropy=np.repeat(entropy, counts),
    )


def _surprise(passes: Sequence[Pass]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each pass's token, and the distribution's entropy in nats; NaN for the
    prompt's."""
    found = np.full((2, len(passes)), np.nan)
    for place, one in enumerate(passes):
        if one.logprobs is not None:
            # Tokens that cannot be have minus infinity, and nothing times that is nothing.
            finite = np.maximum(one.logprobs, -100)
            found[:, place] = one.logprobs[one.tokens[0]], -(np.exp(finite) @ finite)
    return found[0], found[1]


def _add_spans(
    recorder: Recorder, passes: Sequence[Pass], between: Sequence[tuple[int, int, int, int]]
) -> None:
    parts = [_marked(one) for one in passes if one.marks]
    if between:
        parts.append(np.array(between, np.int64))
    if not parts:
        return
    spans = np.concatenate(parts)
    position, codes, start, end = spans[np.argsort(spans[:, 2], kind="stable")].T
    recorder.tables["spans"].extend(
        len(spans),
        token=position,
        layer=(codes >> 16) - 1,
        stage=codes >> 8 & 0xFF,
        lane=codes & 0xFF,
        start_ns=start,
        end_ns=end,
    )


def _marked(one: Pass) -> np.ndarray:
    """A pass's spans, int64 [n, 4]: each begins where the one before it ends."""
    codes, ends = _with_waits(one).T
    starts = np.concatenate([[one.start_ns], ends[:-1]])
    return np.stack([np.full(len(codes), one.position), codes, starts, ends], axis=1)


def _with_waits(one: Pass) -> np.ndarray:
    """A pass's marks, int64 [n, 2], with other spans cut where reads were waited for.

    A layer's experts are computed as they come, so most waiting is done inside that span. All of a
    landing's is told as one, where it began; if there was nothing to compute before, the fetch
    just lasts until then.
    """
    marks = np.array(one.marks, np.int64).reshape(-1, 2)
    waits = np.array(
        [
            (
                code(chosen.layer, "fetch", "io"),
                landing.wait_start_ns,
                landing.waited_ns,
                number or landing.holds_some,
            )
            for chosen in one.chosen
            for number, landing in enumerate(chosen.fetched.landings)
            if landing.wait_start_ns < one.marks[-1]
        ],
        np.int64,
    ).reshape(-1, 4)
    places = np.searchsorted(marks[:, 1], waits[:, 1], side="right")
    inside = (marks[places, 0] ^ waits[:, 0]) & 0xFFFF != 0  # those of a fetch are told as such
    waits, places = waits[inside], places[inside]
    fetch, start, dur, apart = waits.T
    around, end = marks[places].T
    stops = np.stack([fetch, np.minimum(start + dur, end)], axis=1)
    begins = np.stack([around, start], axis=1)[apart > 0]
    lasts = np.zeros(len(marks), bool)
    lasts[places[apart == 0] - 1] = True
    marks = marks[~(lasts & (marks[:, 0] & 0xFFFF == code(-1, "fetch", "io")))]
    # At the same moment a wait ends before its surroundings do, and begins after they do.
    cut = np.concatenate([stops, marks, begins])
    return cut[np.argsort(cut[:, 1], kind="stable")]


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
    experts = _joined((routing.experts for _, _, routing in group), mx.int32)  # [rows, K]
    weights = _joined((routing.weights for _, _, routing in group), mx.float32)
    p = _softmax(_joined((routing.logits for _, _, routing in group), mx.float32))  # [rows, E]
    chosen = np.take_along_axis(p, experts, -1)
    rows, k = experts.shape
    begins = np.array([position for position, _, _ in group]) - np.cumsum([0, *sizes[:-1]])
    token = np.repeat(begins, sizes) + np.arange(rows)
    columns = {
        "token": np.repeat(token, k),
        "layer": np.repeat([layer for _, layer, _ in group], np.array(sizes) * k),
        "rank": np.tile(np.arange(k), rows),
        "expert": experts.ravel(),
        "probability": _rounded(chosen.ravel()),
        "weight": _rounded(weights.ravel()),
        "margin": np.repeat(_rounded(_margin(p, experts, chosen)), k),
        "entropy": np.repeat(_rounded(_entropy(p)), k),
    }
    # Where an intervention leaves a token fewer experts, the places repeat the first for nothing.
    empty = ((weights == 0) & (experts == experts[:, :1])).ravel() & (columns["rank"] > 0)
    if empty.any():
        columns = {name: values[~empty] for name, values in columns.items()}
    recorder.tables["routing"].extend(len(columns["token"]), **columns)


def _joined(arrays: Iterable[mx.array], dtype: mx.Dtype) -> np.ndarray:
    """Evaluated arrays [T, n] one under another, by their bytes: hundreds of small ones a flush.

    A hook may have given them any type.
    """
    cast = [array if array.dtype == dtype else array.astype(dtype) for array in arrays]
    views: list[Any] = [memoryview(array) for array in cast]  # pyright: ignore
    if not all(view.c_contiguous for view in views):
        return np.concatenate([np.array(view) for view in views])
    return np.frombuffer(b"".join(views), views[0].format).reshape(-1, views[0].shape[1])


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 to 13 significant bits (1.2e-4); the rest is noise, and would swell the files."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x400) & 0xFFFFF800).astype(np.uint32).view(np.float32)


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
    landed = [(n, table) for n, (_, c) in enumerate(pairs) for table in _came(c.fetched)]
    which = np.repeat([n for n, _ in landed], [len(table) for _, table in landed]).astype(int)
    # By their bytes: NumPy takes ten times as long over joining records as records.
    came = np.frombuffer(b"".join([table.tobytes() for _, table in landed]), RECORD)
    held_by, held = _held(pairs, which, came["expert"])
    rows = np.zeros(len(came) + len(held), RECORD)
    rows[: len(came)] = came
    routed = np.array([chosen.routed_ns for _, chosen in pairs])[held_by]
    hits = rows[len(came) :]
    hits["expert"], hits["thread"] = held, -1
    hits["submit_ns"] = hits["start_ns"] = hits["end_ns"] = routed
    which = np.concatenate([which, held_by])
    order = np.argsort(which, kind="stable")
    which, rows = which[order], rows[order]
    threads = pairs[0][1].fetched.fetch.reader.threads
    names = ("expert", "offset", "nbytes", "submit_ns", "start_ns", "end_ns", "thread")
    recorder.tables["reads"].extend(
        len(rows),
        token=np.array([one.position for one, _ in pairs])[which],
        layer=np.array([chosen.layer for _, chosen in pairs])[which],
        **{name: rows[name] for name in names},
        source=np.where(
            rows["thread"] < 0,
            _BANK,
            _sources(pairs)[which, rows["expert"], (rows["thread"] == threads).astype(int)],
        ),
        wanted=WANTED.index("demand"),
        used=True,
    )


def _came(fetched: Fetched) -> list[np.ndarray]:
    """Records of its reads; those of a failed one are lost."""
    with suppress(OSError, ValueError):
        fetched.wait()
    return [part.records.table for part in fetched.landings if part.records is not None]


def _held(
    pairs: Sequence[tuple[Pass, Chosen]], which: np.ndarray, read: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(number of the pair, expert) of all that were asked for and not read."""
    asked = np.zeros((len(pairs), _num_experts(pairs)), bool)
    experts = [chosen.fetched.experts.ravel() for _, chosen in pairs]
    sizes = [len(part) for part in experts]
    asked[np.repeat(np.arange(len(pairs)), sizes), np.concatenate(experts)] = True
    for row, (one, chosen) in zip(asked, pairs, strict=True):
        if not one.end_ns:  # an error or a stop in its midst
            row[_never_came(chosen.fetched)] = False
    asked[which, read] = False
    numbers, found = np.nonzero(asked)
    return numbers, found


def _never_came(fetched: Fetched) -> list[int]:
    failed = [part.placement.misses for part in fetched.landings if part.records is None]
    return [expert for group in (*failed, *fetched.later) for expert in group]


def _sources(pairs: Sequence[tuple[Pass, Chosen]]) -> np.ndarray:
    """[pairs, E, 2]: where each expert's bytes were if a reading thread, or the run's own, got
    them."""
    sources = np.full((len(pairs), _num_experts(pairs), 2), _UNKNOWN, np.uint8)
    for row, (_, chosen) in zip(sources, pairs, strict=True):
        if chosen.cached == SSD:
            row[:] = _SSD
        elif chosen.cached == OWN_THREAD:
            row[:] = _SSD, _PAGE_CACHE
        elif isinstance(chosen.cached, dict):
            for expert, cached in chosen.cached.items():
                row[expert] = _PAGE_CACHE if cached else _SSD
    return sources


def _num_experts(pairs: Sequence[tuple[Pass, Chosen]]) -> int:
    return pairs[0][1].fetched.fetch.file.num_experts
