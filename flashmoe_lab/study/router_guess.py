"""What a layer's router would say if it were asked earlier: how many of the experts that it will
name are known before the layer begins.

A guess gives the router something that is known already in place of its own input. The engine's
`prefetch` guesses from the stream with the last layer's shared expert, because that is known before
the last layer's routed experts have been read; the others are here to be compared with. It changes
no run and predicts no time.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from flashmoe_lab.engine import Engine
    from flashmoe_lab.layer import Layer

STREAM, SHARED, ALL = "the stream", "with the shared expert", "with the routed experts too"
BEFORE = "the token before"  # its experts, and no router asked


def router_guesses(
    engine: "Engine", prompt: str | Sequence[int], most: int | None = None
) -> pd.DataFrame:
    """How good guesses are over the tokens of a prompt, for every layer but the first.

    Args:
        prompt: text, or token ids.
        most: experts that a guess names at the most; None is four times the engine's K.

    Returns:
        layer, given, first, named: of the first so many experts of a guess, `named` is how many the
        router did name, on average; `precision` is that of `first`, `recall` of K.

    Raises:
        ValueError: the model has a single layer, the prompt a single token, or `most` is below 1.
    """
    tokens = engine.encode(prompt)
    if len(engine.layers) < 2 or len(tokens) < 2:
        raise ValueError(
            f"{len(engine.layers)} layers and {len(tokens)} tokens: a guess needs 2 of each"
        )
    experts, k = engine.config.num_experts, engine.num_experts_per_tok
    if most is not None and most < 1:
        raise ValueError(f"most is {most}; a guess names 1 expert or more")
    guessing = _Guessing(engine.layers, min(experts, most or 4 * k))
    with engine.intercept("*", guessing):
        engine.generate(tokens, 1)
    rows: list[dict[str, Any]] = []
    for (layer, given), guessed in sorted(guessing.guessed.items()):
        chosen = np.concatenate(guessing.chosen[layer])
        named = _named(np.concatenate(guessed), chosen)
        rows += _rows(layer, given, named, k)
    for layer in range(1, len(engine.layers)):
        chosen = np.concatenate(guessing.chosen[layer])
        rows += _rows(layer, BEFORE, _named(chosen[:-1], chosen[1:]), k)
    return pd.DataFrame(rows)


class _Guessing:
    """A hook for every stage: follows the stream, and asks the next layer's router ahead.

    Attributes:
        guessed: by layer and what its router was given, experts [T, most] of one chunk of the
            prompt after another.
        chosen: by layer, experts [T, K].
    """

    def __init__(self, layers: "Sequence[Layer]", most: int) -> None:
        self._layers, self._most = layers, most
        self._stream = mx.array(0.0)
        self.guessed: dict[tuple[int, str], list[np.ndarray]] = defaultdict(list)
        self.chosen: dict[int, list[np.ndarray]] = defaultdict(list)

    def __call__(self, result: Any, path: str) -> None:
        stage, index = path.rsplit(".", 1)[-1], int(path.split(".")[1]) if "." in path else -1
        if stage == "embed":
            self._stream = result
        elif stage == "router":
            self.chosen[index].append(np.array(result.experts))
        elif stage in ("mixer", "shared_expert", "experts"):
            self._stream = self._stream + result
            given = {"mixer": STREAM, "shared_expert": SHARED, "experts": ALL}[stage]
            if index + 1 < len(self._layers):
                self.guessed[index + 1, given].append(self._ask(self._layers[index + 1]))

    def _ask(self, layer: "Layer") -> np.ndarray:
        normed = layer.post_norm(self._stream)
        return np.array(layer.router(normed, self._most).experts)


def _named(guessed: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of the first 1, 2, ... of each guess [T, n], how many were chosen [T, K], on average."""
    right = (guessed[:, :, None] == chosen[:, None, :]).any(axis=2)
    return right.cumsum(axis=1).mean(axis=0)


def _rows(layer: int, given: str, named: np.ndarray, k: int) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "given": given,
            "first": first,
            "named": float(count),
            "precision": float(count) / first,
            "recall": float(count) / k,
        }
        for first, count in enumerate(named, start=1)
    ]
