"""From logits to the next token: greedy, or drawn from a distribution that has been cut and
sharpened.

The order is the field's usual one: repetition penalty on logits, temperature, top-k, top-p, min-p,
then one draw from a generator with the run's own seed. A constraint, if there is one, comes before
all of them: what it forbids has no probability. NumPy only, so that a run is the same on every
backend given the logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most probable token and ignores what follows.
        top_k: keep the k most probable; 0 keeps all.
        top_p: keep the most probable that together reach p; 1 keeps all.
        min_p: drop those under min_p times the most probable; 0 keeps all.
        repetition_penalty: divide (multiply, if negative) the logits of recent tokens; 1 changes
            nothing.
        repetition_context: how many recent tokens that looks at.
        seed: of the draw; None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context: int = 20
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 2**31),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 1e-3, 100.0),
            ("repetition_context", 0, 2**31),
        ):
            value = getattr(self, name)
            if isinstance(low, int) and not isinstance(value, int):
                raise ValueError(f"{name} is {value}; it must be a whole number")
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be between {low} and {high}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")
        if self.top_p == 0:
            raise ValueError("top_p is 0; it must be above 0")


class Constraint(Protocol):
    """What the text of one run must look like, asked before each token and told of it after."""

    def allowed(self) -> np.ndarray:
        """bool [ids]: which may come next, at least one; ids beyond the array may not."""
        ...

    def take(self, token: int) -> bool:
        """This one comes; or, if False, it may not after all, and `allowed` says what may."""
        ...


class Sampler:
    """Chooses tokens, one after another, for one run.

    Args:
        vocabulary: how many leading ids are real tokens; the rest are padding and never chosen.
        constraint: forbids tokens; used up by the run.
    """

    def __init__(
        self, sampling: Sampling, vocabulary: int, constraint: Constraint | None = None
    ) -> None:
        self.sampling, self.vocabulary, self.constraint = sampling, vocabulary, constraint
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray, recent: Sequence[int]) -> tuple[int, np.ndarray]:
        """The next token, and the log-probabilities float32 [vocab] before any cutting.

        Args:
            logits: float32 [vocab].
            recent: the ids so far, for the repetition penalty.

        Raises:
            FloatingPointError: there is a NaN among the logits.
        """
        logits = logits.astype(np.float32, copy=True)
        if np.isnan(logits).any():
            raise FloatingPointError(
                "the model gave NaN logits; load with checks=True to find where"
            )
        logits[self.vocabulary :] = -np.inf
        peak = logits.max()
        logprobs = logits - (peak + np.log(np.exp(logits - peak).sum(dtype=np.float64)))
        logits = self._penalised(logits, recent)
        token = self._choose(self._permitted(logits))
        while self.constraint is not None and not self.constraint.take(token):
            token = self._choose(self._permitted(logits))
        return token, logprobs.astype(np.float32)

    def _permitted(self, logits: np.ndarray) -> np.ndarray:
        if self.constraint is None:
            return logits
        allowed = self.constraint.allowed()[: self.vocabulary]
        logits[: len(allowed)][~allowed] = -np.inf
        logits[len(allowed) :] = -np.inf
        return logits

    def _penalised(self, logits: np.ndarray, recent: Sequence[int]) -> np.ndarray:
        sampling = self.sampling
        if sampling.repetition_penalty == 1 or not sampling.repetition_context:
            return logits
        seen = np.unique(np.asarray(recent[-sampling.repetition_context :], int))
        values = logits[seen]
        penalty = np.float32(sampling.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        return logits

    def _choose(self, logits: np.ndarray) -> int:
        sampling = self.sampling
        if sampling.temperature == 0:
            return int(logits.argmax())
        # Peak first: a tiny temperature would make infinities of the logits.
        with np.errstate(over="ignore"):  # to minus infinity, which is right
            p = np.exp((logits - logits.max()).astype(np.float64) / sampling.temperature)
        order = np.argsort(-p, kind="stable")
        if sampling.top_k:
            order = order[: sampling.top_k]
        kept = p[order] / p[order].sum()
        if sampling.top_p < 1:
            # The token that crosses top_p still belongs to it.
            order = order[: int(np.searchsorted(np.cumsum(kept), sampling.top_p)) + 1]
        order = order[p[order] >= sampling.min_p * p[order[0]]]
        # Scaled to the last sum, which rounding may leave under 1: always below it.
        sums = np.cumsum(p[order])
        return int(order[np.searchsorted(sums, self._random.random() * sums[-1], side="right")])
