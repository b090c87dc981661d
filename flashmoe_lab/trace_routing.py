"""Rows of the table routing."""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.stages.router import Routing
from flashmoe_lab.trace import Recorder
from flashmoe_lab.trace_batch import Batch

Columns = dict[str, np.ndarray]


def add_routing(recorder: Recorder, batch: Batch) -> None:
    """Add a row for each token, layer and expert of the passes that came to their end, in this
    order.

    Decode steps are worked out together, as far as they have the same K; a chunk of a prompt layer
    by layer.
    """
    parts: list[Columns] = []
    notes = batch.layers
    if notes is not None:
        ended = batch.end_ns[notes.number] > 0
        columns = notes.position, notes.layer, notes.logits, notes.experts, notes.weights
        parts.append(_columns(*(columns if ended.all() else (part[ended] for part in columns))))
    groups: dict[int, list[tuple[int, int, Routing]]] = {}
    for number, (layer, routing) in batch.routings:
        group = groups.setdefault(routing.num_experts_per_tok, [])
        group.append((int(batch.position[number]), layer, routing))
        if batch.tokens[number] > 1:
            parts.append(_of_routings([group.pop()]))
    parts += [_of_routings(group) for group in groups.values() if group]
    if not parts:
        return
    whole = parts[0]
    if len(parts) > 1:
        whole = {name: np.concatenate([part[name] for part in parts]) for name in whole}
        order = np.argsort(whole["token"].astype(np.int64) << 16 | whole["layer"], kind="stable")
        whole = {name: values[order] for name, values in whole.items()}
    recorder.tables["routing"].extend(len(whole["token"]), **whole)


def _of_routings(group: Sequence[tuple[int, int, Routing]]) -> Columns:
    sizes = [routing.experts.shape[0] for _, _, routing in group]
    begins = np.array([position for position, _, _ in group]) - np.cumsum([0, *sizes[:-1]])
    return _columns(
        np.repeat(begins, sizes) + np.arange(sum(sizes)),
        np.repeat([layer for _, layer, _ in group], sizes),
        _joined((routing.logits for _, _, routing in group), mx.float32),
        _joined((routing.experts for _, _, routing in group), mx.int32),
        _joined((routing.weights for _, _, routing in group), mx.float32),
    )


def _columns(
    token: np.ndarray,
    layer: np.ndarray,
    logits: np.ndarray,
    experts: np.ndarray,
    weights: np.ndarray,
) -> Columns:
    """The rows of token, layer [rows], logits [rows, E], experts and weights [rows, K]."""
    p = _softmax(logits)
    chosen = np.take_along_axis(p, experts, -1)
    rows, k = experts.shape
    columns = {
        "token": np.repeat(token, k),
        "layer": np.repeat(layer, k),
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
    return columns


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
