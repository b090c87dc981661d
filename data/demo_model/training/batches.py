"""Draws batches from the rows of all parts, in the mixture's shares, each row once an epoch.

Half of a step's tokens stand in short rows and half in long ones; each half is one forward pass of
the same number of tokens. The order depends on the seed and on the progress of the training only.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .mixture import LONG, PARTS, SHORT
from .shards import MASK


@dataclass(slots=True)
class Batch:
    """Rows of one length.

    Attributes:
        tokens: [B, T+1] token ids.
        weights: [B, T] weight of each token's loss; 0 where there is none.
    """

    tokens: np.ndarray
    weights: np.ndarray


class PartRows:
    """The rows of one part, in random order, again and again."""

    def __init__(self, rows: np.ndarray, seed: list[int]) -> None:
        self._rows, self._rng = rows, np.random.default_rng(seed)
        self._order, self._at = self._rng.permutation(len(rows)), 0
        self.epochs = 0.0

    def take(self, count: int) -> np.ndarray:
        """The next `count` rows, [count, row + 1]."""
        taken = []
        while count > 0:
            if self._at == len(self._order):
                self._order, self._at = self._rng.permutation(len(self._rows)), 0
            chosen = self._order[self._at : self._at + count]
            taken.append(self._rows[np.sort(chosen)])
            self._at, count = self._at + len(chosen), count - len(chosen)
            self.epochs += len(chosen) / len(self._rows)
        return np.concatenate(taken)


class Batches:
    """All parts; `folders` hold NAME.npz or NAME.npy, and a part that is not there is left out."""

    def __init__(self, folders: list[Path], tokens: int, seed: int) -> None:
        if tokens % LONG:
            raise ValueError(f"tokens of a pass ({tokens}) should be a multiple of {LONG}")
        self._tokens = tokens
        self.parts: dict[str, PartRows] = {}
        for number, name in enumerate(PARTS):
            rows = load_rows(folders, name)
            if rows is not None:
                self.parts[name] = PartRows(rows, [seed, number])
        self._owed = dict.fromkeys(self.parts, 0.0)
        if not self.parts:
            raise ValueError(f"no rows of any part in {', '.join(map(str, folders))}")

    def step(self, progress: float) -> list[Batch]:
        """The batches of one step, short rows first."""
        passes = [self._pass(row, progress) for row in (SHORT, LONG)]
        return [batch for batch in passes if batch is not None]

    def _pass(self, row: int, progress: float) -> Batch | None:
        names = [name for name in self.parts if PARTS[name].row == row]
        if not names:
            return None
        total, count = sum(PARTS[name].share(progress) for name in names), self._tokens // row
        for name in names:
            self._owed[name] += count * PARTS[name].share(progress) / total
        given = {name: int(self._owed[name]) for name in names}
        while (missing := count - sum(given.values())) != 0:
            ranked = sorted(names, key=lambda name: given[name] - self._owed[name])
            given[ranked[0] if missing > 0 else ranked[-1]] += 1 if missing > 0 else -1
        tokens, weights = [], []
        for name in names:
            self._owed[name] -= given[name]
            rows = self.parts[name].take(given[name]) if given[name] else None
            if rows is not None:
                tokens.append(rows & (MASK - 1))
                weights.append((rows[:, 1:] < MASK) * np.float32(PARTS[name].weight))
        return Batch(np.concatenate(tokens), np.concatenate(weights))


def load_rows(folders: list[Path], name: str) -> np.ndarray | None:
    """The rows of a part from the first folder that has it."""
    for folder in folders:
        if (folder / f"{name}.npz").exists():
            return np.load(folder / f"{name}.npz")["rows"]
        if (folder / f"{name}.npy").exists():
            return np.load(folder / f"{name}.npy")
    return None
