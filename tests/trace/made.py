"""A small trace made by hand, whose every figure can be worked out on paper: 2 layers of 4 experts,
K = 2, a prompt of two tokens, two decode steps and a last token that never ran."""

from typing import Any

import numpy as np
import pandas as pd

from flashmoe_lab.trace import Trace
from flashmoe_lab.trace.schema import LANES, PHASES, SOURCES, STAGES, WANTED
from flashmoe_lab.trace.table import frame

BLOCK = 1000  # bytes of an expert
MS = 1_000_000  # ns

CHOSEN = {  # (token, layer) -> experts, the router's first choice first
    (0, 0): (0, 1), (0, 1): (2, 3),
    (1, 0): (0, 2), (1, 1): (2, 1),
    (2, 0): (0, 1), (2, 1): (2, 3),
    (3, 0): (3, 0), (3, 1): (0, 1),
}  # fmt: skip
READS = [  # token, layer, expert, source, thread, submit, start and end in ms
    (0, 0, 0, "ssd", 0, 1, 1, 3), (0, 0, 1, "ssd", 1, 1, 2, 3), (0, 0, 2, "ssd", 0, 1, 3, 5),
    (0, 1, 1, "ssd", 0, 6, 6, 7), (0, 1, 2, "ssd", 1, 6, 6, 8), (0, 1, 3, "ssd", 0, 6, 7, 9),
    (2, 0, 0, "bank", -1, 31, 31, 31), (2, 0, 1, "bank", -1, 31, 31, 31),
    (2, 1, 2, "bank", -1, 36, 36, 36), (2, 1, 3, "page_cache", 0, 36, 37, 38),
    (3, 0, 0, "bank", -1, 61, 61, 61), (3, 0, 3, "ssd", 1, 61, 61, 65),
    (3, 1, 0, "ssd", 0, 70, 71, 75), (3, 1, 1, "bank", -1, 70, 70, 70),
]  # fmt: skip
TOKENS = [  # token, phase, id, text, start and end of its pass in ms, logprob, entropy
    (0, "prefill", 10, "a", 0, 20, np.nan, np.nan),
    (1, "prefill", 11, " b", 0, 20, np.nan, np.nan),
    (2, "decode", 12, " c", 30, 50, -0.5, 1.0),
    (3, "decode", 13, "\n", 60, 90, -1.0, 2.0),
    (4, "decode", 14, " d$", 0, 0, -2.0, 0.5),
]
SPANS = [  # token, layer, stage, lane, start and end in ms: 95 of 100 ms
    (0, 0, "mixer", "compute", 0, 1), (0, 0, "fetch", "io", 1, 6),
    (0, 1, "mixer", "compute", 6, 16), (0, -1, "lm_head", "wait", 16, 20),
    (2, -1, "sample", "host", 20, 30),
    (2, 0, "mixer", "compute", 30, 31), (2, 0, "fetch", "io", 31, 33),
    (2, 1, "mixer", "compute", 33, 37), (2, 1, "fetch", "io", 37, 39),
    (2, -1, "lm_head", "wait", 39, 50), (3, -1, "sample", "host", 50, 60),
    (3, 0, "mixer", "compute", 60, 61), (3, 0, "fetch", "io", 61, 65),
    (3, 1, "mixer", "compute", 65, 71), (3, 1, "fetch", "io", 71, 75),
    (3, -1, "lm_head", "wait", 75, 90), (3, -1, "record", "host", 90, 95),
]  # fmt: skip
FACTS: dict[str, Any] = {
    "mode": "flow", "model": "/models/made", "num_hidden_layers": 2,
    "layer_types": "linear_attention,full_attention", "num_experts": 4, "num_experts_per_tok": 2,
    "model_num_experts_per_tok": 2,
    "experts": "4 bits, group 64", "block_nbytes": BLOCK, "expert_nbytes": 8 * BLOCK,
    "resident_nbytes": 5000,
    "kv_nbytes_per_token": 100, "kv_nbytes": 25_600, "recurrent_nbytes": 640,
    "bank_nbytes": 6 * BLOCK, "bank_slots": 6, "bank_keeps": True, "page_cache_nbytes": 3000,
    "reader": "pread", "threads": 2, "machine": "x86_64 Linux", "start_ns": 0,
    "end_ns": 100 * MS, "record_ns": 5 * MS,
}  # fmt: skip


def made_trace(**facts: Any) -> Trace:
    """The trace, with some facts changed."""
    return Trace(
        {
            "tokens": _tokens(),
            "routing": _routing(),
            "reads": _reads(),
            "spans": _spans(),
            "run": pd.DataFrame([FACTS | facts]),
        },
        _arrays(),
    )


def read_ahead(trace: Trace) -> Trace:
    """The same, with the last pass's read of layer 1 begun ahead of the router, and another, of
    expert 2, that was for nothing."""
    reads = trace.reads.copy()
    ahead = (reads.token == 3) & (reads.layer == 1) & (reads.nbytes > 0)
    reads.loc[ahead, "wanted"] = "prefetch"
    needless = reads[ahead].assign(expert=2, thread=1, used=False).astype(reads.dtypes)
    tables = {name: getattr(trace, name) for name in ("tokens", "routing", "spans")}
    tables["reads"] = pd.concat([reads, needless], ignore_index=True)
    return Trace(tables | {"run": trace.run.assign(prefetch=2)})


def _tokens() -> pd.DataFrame:
    token, phase, ids, text, start, end, logprob, entropy = zip(*TOKENS, strict=True)
    columns = {
        "token": np.array(token, np.int32),
        "phase": np.array([PHASES.index(p) for p in phase], np.uint8),
        "id": np.array(ids, np.int32),
        "text": np.array(text, object),
        "start_ns": MS * np.array(start, np.int64),
        "end_ns": MS * np.array(end, np.int64),
        "logprob": np.array(logprob, np.float32),
        "entropy": np.array(entropy, np.float32),
    }
    return frame("tokens", columns)


def _routing() -> pd.DataFrame:
    rows = [
        (
            token,
            layer,
            rank,
            expert,
            (0.5, 0.25)[rank],
            (2 / 3, 1 / 3)[rank],
            0.1 * (layer + 1),
            1.2,
        )
        for (token, layer), experts in CHOSEN.items()
        for rank, expert in enumerate(experts)
    ]
    names = ("token", "layer", "rank", "expert", "probability", "weight", "margin", "entropy")
    return frame("routing", dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True)))


def _reads() -> pd.DataFrame:
    token, layer, expert, source, thread, submit, start, end = zip(*READS, strict=True)
    read = np.array(thread) >= 0
    columns = {
        "token": np.array(token, np.int32),
        "layer": np.array(layer, np.int16),
        "expert": np.array(expert, np.int16),
        "offset": np.where(read, np.array(expert) * BLOCK, 0),
        "nbytes": np.where(read, BLOCK, 0),
        "submit_ns": MS * np.array(submit, np.int64),
        "start_ns": MS * np.array(start, np.int64),
        "end_ns": MS * np.array(end, np.int64),
        "thread": np.array(thread, np.int16),
        "source": np.array([SOURCES.index(name) for name in source], np.uint8),
        "wanted": np.full(len(token), WANTED.index("demand"), np.uint8),
        "used": np.ones(len(token), bool),
    }
    return frame("reads", columns)


def _spans() -> pd.DataFrame:
    token, layer, stage, lane, start, end = zip(*SPANS, strict=True)
    columns = {
        "token": np.array(token, np.int32),
        "layer": np.array(layer, np.int16),
        "stage": np.array([STAGES.index(name) for name in stage], np.uint8),
        "lane": np.array([LANES.index(name) for name in lane], np.uint8),
        "start_ns": MS * np.array(start, np.int64),
        "end_ns": MS * np.array(end, np.int64),
    }
    return frame("spans", columns)


def _arrays() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    positions = np.arange(4)
    decay = np.array([[1.0, 0.5]] * 4, np.float32)  # one head forgets nothing, one half a token
    norms = np.array([[1, 2], [2, 4], [3, 6], [4, 8]], np.float32)
    weights = np.tril(np.ones((4, 4), np.float32))[:, None] * np.array([0.5, 0.25])[None, :, None]
    logits = np.log(np.array([[0.1, 0.4, 0.3, 0.2], [0.7, 0.1, 0.1, 0.1]] * 2, np.float32))
    return {
        "layers.1.router.logits": (positions, logits),
        "layers.0.mixer.decay": (positions, decay),
        "layers.0.mixer.write_strength": (positions, decay / 2),
        "layers.0.mixer.state_norm": (positions, norms),
        "layers.1.mixer.attention": (positions, weights.astype(np.float32)),
    }
