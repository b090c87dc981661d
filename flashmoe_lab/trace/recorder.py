"""Recorder: where a run's rows go while it runs, and the trace that they become.

It holds tables and the facts of the run. Who fills it (tracing.py) knows the engine; it does not.
"""

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flashmoe_lab.trace.schema import MODES, TABLES
from flashmoe_lab.trace.table import Table
from flashmoe_lab.trace.trace import Rows, Trace

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
        tables: dict[str, Rows | Callable[[], Rows]] = {
            name: table.finish() if table.spilled else table.finish
            for name, table in self.tables.items()
        }
        facts = self.facts
        tables["run"] = lambda: pd.DataFrame([facts])
        arrays = {name: _joined(self.arrays.pop(name)) for name in list(self.arrays)}
        return Trace(tables, arrays, keep=self._folder)


class _Folder:
    """A temporary directory that goes when nobody holds this any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="flashmoe-trace-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Positions and rows of all parts; a last axis that grew is filled up with zeros.

    The parts are used up meanwhile, so that little is in memory twice.
    """
    positions = np.concatenate([positions for positions, _ in parts])
    longest = max(rows.shape[-1] for _, rows in parts)
    whole = np.zeros((len(positions), *parts[0][1].shape[1:-1], longest), parts[0][1].dtype)
    end = len(whole)
    while parts:
        rows = parts.pop()[1]
        whole[end - len(rows) : end, ..., : rows.shape[-1]] = rows
        end -= len(rows)
    return positions, whole
