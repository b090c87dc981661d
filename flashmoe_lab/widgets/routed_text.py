"""RoutedText: what the routers chose for each token of a text, and what another K would change.

The text goes through the model once for the probabilities, and once more for each K whose effect on
the answer is asked for; choosing layer and token computes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from flashmoe_lab.cards import card
from flashmoe_lab.engine import Engine
from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.style import BLUE, GREY, PALE, RED, canvas, grid, legend

_MOST_BARS = 32


class RoutedText:
    """A text's router probabilities in every layer, and the answer for any K.

    Attributes:
        texts: of each token.
        probabilities: float32 [L, T, E], of the run with the engine's own K.
    """

    def __init__(self, engine: Engine, text: str | Sequence[int]) -> None:
        self.engine, self.ids = engine, list(engine.encode(text))
        tokenizer = engine.tokenizer
        self.texts = [tokenizer.decode([n]) if tokenizer else str(n) for n in self.ids]
        self.probabilities = engine.call(self._run)
        self._logits: dict[int, np.ndarray] = {}

    def _run(self) -> np.ndarray:
        steps = self.engine.model.step(self.ids, num_experts_per_tok=self.own_k)
        found = [step.result.probabilities for step in steps if step.path.endswith(".router")]
        return np.stack([np.array(p) for p in found])

    @property
    def own_k(self) -> int:
        """The engine's K."""
        return self.engine.num_experts_per_tok

    def answer(self, num_experts_per_tok: int) -> np.ndarray:
        """Log-probabilities float64 [T, vocab] with K experts in every layer."""
        if num_experts_per_tok not in self._logits:
            logits = self.engine.logits(self.ids, num_experts_per_tok).astype(np.float64)
            shifted = logits - logits.max(-1, keepdims=True)
            found = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
            self._logits[num_experts_per_tok] = found
        return self._logits[num_experts_per_tok]

    def choice(
        self, layer: int, token: int = -1, num_experts_per_tok: int | None = None
    ) -> "Choice":
        """What a layer's router chooses for one token with K experts.

        Raises:
            ValueError: layer, token or K out of range.
        """
        layers, tokens, experts = self.probabilities.shape
        k = self.own_k if num_experts_per_tok is None else num_experts_per_tok
        _check("layer", layer, 0, layers - 1)
        _check("token", token, -tokens, tokens - 1)
        _check("num_experts_per_tok", k, 1, experts)
        return Choice(routed=self, layer=layer, token=token % tokens, num_experts_per_tok=k)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One router's choice for one token with one K."""

    routed: RoutedText
    layer: int
    token: int
    num_experts_per_tok: int

    @cached_property
    def data(self) -> pd.DataFrame:
        """expert, probability, mass (with all before it), weight, chosen, own: most probable
        first."""
        p = self.routed.probabilities[self.layer, self.token].astype(np.float64)
        order = np.argsort(-p, kind="stable")
        chosen = np.arange(len(p)) < self.num_experts_per_tok
        norm = self.routed.engine.config.norm_topk_prob
        whole = p[order][chosen].sum() if norm else 1.0
        return pd.DataFrame(
            {
                "expert": order,
                "probability": p[order],
                "mass": p[order].cumsum(),
                "weight": np.where(chosen, p[order] / whole, 0.0),
                "chosen": chosen,
                "own": np.arange(len(p)) < self.routed.own_k,
            }
        )

    @property
    def mass(self) -> float:
        """The probability that the chosen experts hold together."""
        return float(self.data.mass[self.num_experts_per_tok - 1])

    @cached_property
    def kl_nats(self) -> float:
        """How far the prediction after this token moves from the own K's, with K in every layer."""
        own, other = (
            self.routed.answer(k)[self.token] for k in (self.routed.own_k, self.num_experts_per_tok)
        )
        return max(float((np.exp(own) * (own - other)).sum()), 0.0)

    @property
    def rows(self) -> dict[str, str]:
        """What the card says."""
        k, own, data = self.num_experts_per_tok, self.routed.own_k, self.data
        top = ", ".join(
            f"{r.expert} ({r.weight:.3f})" for r in data[data.chosen].head(12).itertuples()
        )
        rows = {
            "experts (weight)": top + (", ..." if k > 12 else ""),
            "mass kept": f"{self.mass:.1%} of the probability with K={k}",
        }
        if k == own:
            return rows | {f"next token with K={own}": self._next(own)}
        rows["mass kept"] += f"; {data.mass[own - 1]:.1%} with the engine's K={own}"
        changed = data[data.chosen != data.own].expert.tolist()
        if changed:
            word = "added" if k > own else "left out"
            rows[f"{word} by K={k}"] = ", ".join(map(str, changed))
        return rows | {
            f"next token with K={own}": self._next(own),
            f"next token with K={k}": self._next(k),
            "answer moved by": f"{self.kl_nats:.4f} nats (KL, with K={k} in every layer)",
        }

    def _next(self, k: int) -> str:
        p = np.exp(self.routed.answer(k)[self.token])
        tokenizer = self.routed.engine.tokenizer
        best = np.argsort(-p, kind="stable")[:3].tolist()
        names = [repr(tokenizer.decode([n])) if tokenizer else str(n) for n in best]
        return ", ".join(f"{name} {p[n]:.1%}" for name, n in zip(names, best, strict=True))

    @cached_property
    def plot(self) -> Plot:
        """Probabilities of the most probable experts, and the mass that each K would keep."""
        data, k, own = self.data, self.num_experts_per_tok, self.routed.own_k
        shown = data.head(max(_MOST_BARS, k) if len(data) > _MOST_BARS else len(data)).head(64)
        text = repr(self.routed.texts[self.token]).replace("$", r"\$")
        title = f"Layer {self.layer}: what the router makes of token {self.token} {text}"
        caption = f"{self.routed.engine.checkpoint.path.name}, K={k} of {len(data)}"
        figure, axes = canvas(title, caption, height=3.4, columns=2, width_ratios=[3, 2])
        left, right = axes[0]
        colours = np.where(shown.chosen, BLUE, np.where(shown.own, GREY, PALE))
        left.bar(range(len(shown)), 100 * shown.probability, color=colours, width=0.85)
        step = max(1, len(shown) // 24)
        left.set_xticks(range(0, len(shown), step), map(str, shown.expert[::step]))
        left.tick_params(axis="x", labelsize=7, rotation=90)
        left.set_xlabel("expert, most probable first")
        left.set_ylabel("probability in %")
        right.step(range(1, len(data) + 1), 100 * data.mass, where="mid", color=BLUE)
        if k != own:
            kept = [100 * data.mass[own - 1]]
            right.plot([own], kept, "o", color=GREY, label=f"the engine's K={own}")
        right.plot([k], [100 * self.mass], "o", color=RED, label=f"K={k} keeps {self.mass:.0%}")
        right.set_xlabel("K")
        right.set_ylabel("probability kept in %")
        right.set_ylim(0, 103)
        right.set_xscale("log", base=2)
        right.xaxis.set_major_formatter("{x:g}")
        for ax in (left, right):
            grid(ax)
        legend(right)
        return Plot(figure=figure, data=data, title=title)

    def __repr__(self) -> str:
        return f"<Choice: layer {self.layer}, token {self.token}, K={self.num_experts_per_tok}>"

    def _repr_html_(self) -> str:
        return self.plot.html() + card(f"Layer {self.layer}, token {self.token}", self.rows)


def explore_router(
    engine: Engine,
    text: str | Sequence[int],
    layer: int,
    token: int = -1,
    num_experts_per_tok: int | None = None,
) -> Choice:
    """What a layer's router chooses for one token of a text, the last without `token`."""
    return RoutedText(engine, text).choice(layer, token, num_experts_per_tok)


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be {low} to {high}")
