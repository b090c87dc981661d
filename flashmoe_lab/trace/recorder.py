"""Recorder: where a run's rows go while it runs, and the trace that they become.

It holds tables and the facts of the run. Who fills it (tracing.py) knows the engine; it does not.
"""

import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flashmoe_lab.trace.schema import MODES, TABLES
from flashmoe_lab.trace.table import Table
from flashmoe_lab.trace.trace import Trace

MAX_ROWS = 1 << 20  # of a table in memory: about 50 MB


class Recorder:
    """The five tables of a run under way.

    Attributes:
        tables: tokens, routing, reads and spans.
        facts: the one row of the table `run`.
        arrays: name -> (positions, rows), for what was asked to be kept whole.

    Args:
        mode: "flow" or "stages".
        max_rows: rows of a table in memory; more go to a temporary file.
    """

    def __init__(self, mode: str = "flow", max_rows: int = MAX_ROWS) -> None:
        if mode not in MODES:
            raise ValueError(f"trace is {mode!r}; it must be one of {', '.join(map(repr, MODES))}")
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; it must be at least 1")
        self._folder = _Folder()
        self.tables = {name: Table(name, max_rows, self._folder.path) for name in TABLES}
        self.facts: dict[str, Any] = {"mode": mode}
        self.arrays: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def begin(self, **facts: Any) -> None:
        """The run starts now, under these conditions."""
        self.facts |= facts
        self.facts["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.facts["start_ns"] = time.perf_counter_ns()

    def keep(self, name: str, positions: np.ndarray, rows: np.ndarray) -> None:
        """Add rows [n, ...] of a named array, one a position."""
        self.arrays.setdefault(name, []).append((positions, rows))

    def finish(self, **facts: Any) -> Trace:
        """The run ends now."""
        self.facts["end_ns"] = time.perf_counter_ns()
        self.facts |= facts
        tables: dict[str, pd.DataFrame | Path] = {
            name: table.finish() for name, table in self.tables.items()
        }
        tables["run"] = pd.DataFrame([self.facts])
        arrays = {name: _joined(parts) for name, parts in self.arrays.items()}
        return Trace(tables, arrays, keep=self._folder)


class _Folder:
    """A temporary directory that goes when nobody holds this any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="flashmoe-trace-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Positions and rows of all parts; a last axis that grew is filled up with zeros."""
    longest = max(rows.shape[-1] for _, rows in parts)
    filled = [
        np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, longest - rows.shape[-1])])
        for _, rows in parts
    ]
    return np.concatenate([positions for positions, _ in parts]), np.concatenate(filled)
