"""Picking parts of a trace for a figure: tokens of a phase, one token, one layer."""

import pandas as pd

from flashmoe_lab.trace import Trace


def decode_tokens(trace: Trace) -> pd.Series:
    """Positions of the tokens that went through the model one at a time."""
    tokens = trace.tokens
    chosen = tokens[(tokens.phase == "decode") & (tokens.end_ns > 0)].token
    if chosen.empty:
        raise ValueError("the trace has no decode step; generate at least two tokens")
    return chosen


def busiest_token(trace: Trace) -> int:
    """The decode step that read the most bytes; the slowest, if none read any."""
    positions = decode_tokens(trace)
    nbytes = trace.reads.groupby("token").nbytes.sum().reindex(positions, fill_value=0)
    if nbytes.any():
        return int(nbytes.index[int(nbytes.argmax())])
    tokens = trace.tokens.set_index("token").loc[positions]
    return int(tokens.index[int((tokens.end_ns - tokens.start_ns).argmax())])


def typical_token(trace: Trace) -> int:
    """The decode step of median time."""
    tokens = trace.tokens.set_index("token").loc[decode_tokens(trace)]
    order = (tokens.end_ns - tokens.start_ns).sort_values().index
    return int(order[len(order) // 2])


def check_layer(trace: Trace, layer: int | None) -> None:
    """ValueError for a layer that the model has not."""
    count = trace.facts["num_hidden_layers"]
    if layer is not None and not 0 <= layer < count:
        raise ValueError(f"layer is {layer}; layers are 0 to {count - 1}")


def pass_of(trace: Trace, token: int) -> int:
    """The position that the rows of a token's pass bear: its own, or its chunk's first.

    Raises:
        ValueError: the position has no pass through the model.
    """
    known = trace.tokens[trace.tokens.end_ns > 0].set_index("token").start_ns
    if token not in known.index:
        raise ValueError(f"token is {token}; positions with a pass are 0 to {known.index.max()}")
    return int(known.index[known == known[token]].min())


def shown(text: str, limit: int = 12) -> str:
    """A token's text in quotes, with line ends and the like visible, and no dollar that would start
    a formula."""
    words = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("$", r"\$")
    return f'"{words[:limit]}…"' if len(words) > limit else f'"{words}"'
