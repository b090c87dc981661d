"""The tables of a trace: their columns, types and units. docs/trace_schema.md says it for people.

A minor version adds columns; readers take what they know and keep the rest. A major version changes
the meaning of one, and older readers refuse it.
"""

from dataclasses import dataclass

import numpy as np

VERSION = (1, 0)

PHASES = ("prefill", "decode")
SOURCES = ("bank", "page_cache", "ssd", "unknown")
WANTED = ("demand", "prefetch")
LANES = ("compute", "wait", "io", "host")
MODES = ("flow", "stages")
STAGES = (
    "embed",
    "input_norm",
    "mixer",
    "post_norm",
    "router",
    "shared_expert",
    "fetch",
    "experts",
    "residual",
    "norm",
    "lm_head",
    "submit",  # building the graph of what a layer does before its experts
    "to_router",  # the same in one native call: norms, mixer, router and shared expert
    "setup",
    "sample",
    "record",
    "look_ahead",  # asking the next layer's router what it is likely to name, and having it read
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column.

    Attributes:
        dtype: NumPy type in memory; text columns are object, or uint8 codes of `categories`.
        unit: "" for plain numbers.
    """

    dtype: type
    unit: str
    meaning: str
    categories: tuple[str, ...] = ()


def _column(dtype: type, unit: str, meaning: str, categories: tuple[str, ...] = ()) -> Column:
    return Column(dtype=dtype, unit=unit, meaning=meaning, categories=categories)


_TOKEN = _column(np.int32, "", "position in the sequence, from 0; of a chunk, its first")
_LAYER = _column(np.int16, "", "layer, from 0; -1 is outside the layers")
_EXPERT = _column(np.int16, "", "expert of the layer, from 0")
_START = _column(np.int64, "ns", "time.perf_counter_ns")
_END = _column(np.int64, "ns", "time.perf_counter_ns")

TABLES: dict[str, dict[str, Column]] = {
    "tokens": {
        "token": _column(np.int32, "", "position in the sequence, from 0"),
        "phase": _column(np.uint8, "", "how the token came", PHASES),
        "id": _column(np.int32, "", "token id"),
        "text": _column(object, "", "what the token adds to the text"),
        "start_ns": _column(np.int64, "ns", "its pass through the model begins; 0 if it had none"),
        "end_ns": _column(np.int64, "ns", "its pass ends; a chunk of the prompt is one pass"),
        "logprob": _column(
            np.float32, "nat", "of the token, before any cutting; NaN for the prompt"
        ),
        "entropy": _column(np.float32, "nat", "of that distribution"),
    },
    "routing": {
        "token": _column(np.int32, "", "position in the sequence, from 0"),
        "layer": _LAYER,
        "rank": _column(np.int16, "", "0 is the expert that the router put first"),
        "expert": _EXPERT,
        "probability": _column(np.float32, "", "softmax over all experts, to 13 significant bits"),
        "weight": _column(np.float32, "", "as used in the sum, to 13 significant bits"),
        "margin": _column(
            np.float32, "", "probability of the last expert taken, less that of the first left out"
        ),
        "entropy": _column(np.float32, "nat", "of the router's distribution, to 13 bits"),
    },
    "reads": {
        "token": _TOKEN,
        "layer": _LAYER,
        "expert": _EXPERT,
        "offset": _column(np.int64, "byte", "from the start of the layer's file"),
        "nbytes": _column(np.int64, "byte", "read from the file; 0 if the bank held the expert"),
        "submit_ns": _column(np.int64, "ns", "handed to the reader"),
        "start_ns": _START,
        "end_ns": _END,
        "thread": _column(
            np.int16, "", "reading thread, from 0; `threads` is the run's own, -1 none"
        ),
        "source": _column(np.uint8, "", "where the bytes were when asked for", SOURCES),
        "wanted": _column(np.uint8, "", "by the router, or ahead of it", WANTED),
        "used": _column(np.bool_, "", "whether the product used it"),
    },
    "spans": {
        "token": _TOKEN,
        "layer": _LAYER,
        "stage": _column(np.uint8, "", "what the run was at", STAGES),
        "lane": _column(np.uint8, "", "what kind of time it is", LANES),
        "start_ns": _START,
        "end_ns": _END,
    },
}
