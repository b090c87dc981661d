"""Table: rows in preallocated columns, which go to disk when they become too many.

It knows a schema's types and nothing of what the rows mean. Rows are added a slice at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flashmoe_lab.trace import parquet
from flashmoe_lab.trace.schema import TABLES, Column

FIRST_ROWS = 1 << 12


class Table:
    """The rows of one table of a run under way.

    Args:
        max_rows: rows kept in memory; the next ones push them to a Parquet file in `spill`.
        spill: directory for that; must exist once rows are that many.
    """

    def __init__(self, name: str, max_rows: int, spill: Path) -> None:
        self.name, self.max_rows, self.spill = name, max_rows, spill
        self.columns: Mapping[str, Column] = TABLES[name]
        self.count = self.spilled = 0
        self._arrays = self._allocate(min(FIRST_ROWS, max_rows))
        self._writer: parquet.TableWriter | None = None

    def _allocate(self, rows: int) -> dict[str, np.ndarray]:
        return {name: np.zeros(rows, column.dtype) for name, column in self.columns.items()}

    @property
    def rows(self) -> int:
        """Rows added so far."""
        return self.spilled + self.count

    @property
    def nbytes(self) -> int:
        """Bytes of the columns in memory."""
        return sum(array.nbytes for array in self._arrays.values())

    def extend(self, rows: int, **values: Any) -> None:
        """Add rows: every column, as an array of that length or one value for all."""
        if values.keys() != self.columns.keys():
            wrong = sorted(values.keys() ^ self.columns.keys())
            raise ValueError(f"{self.name}: columns {wrong} are missing or unknown")
        if self.count + rows > self.max_rows:
            self._spill()
        self._make_room(self.count + rows)
        for name, value in values.items():
            self._arrays[name][self.count : self.count + rows] = value
        self.count += rows

    def _make_room(self, rows: int) -> None:
        size = len(next(iter(self._arrays.values())))
        if rows <= size:
            return
        grown = self._allocate(max(rows, 2 * size))
        for name, array in grown.items():
            array[: self.count] = self._arrays[name][: self.count]
        self._arrays = grown

    def _spill(self) -> None:
        if not self.count:
            return
        if self._writer is None:
            self._writer = parquet.TableWriter(self.name, self.spill)
        self._writer.write(self._frame())
        self.spilled += self.count
        self.count = 0

    def _frame(self) -> pd.DataFrame:
        return frame(self.name, {n: a[: self.count] for n, a in self._arrays.items()})

    def finish(self) -> "pd.DataFrame | Path":
        """The rows as a DataFrame, or the file that holds them all."""
        if self._writer is None:
            return self._frame()
        self._spill()
        self._writer.close()
        return self._writer.file


def frame(name: str, arrays: Mapping[str, Any]) -> pd.DataFrame:
    """Columns as a DataFrame, codes turned into categories; arrays are copied."""
    columns: dict[str, Any] = {}
    for column, values in arrays.items():
        categories = TABLES[name][column].categories if column in TABLES[name] else ()
        if categories:
            codes = np.asarray(values)
            columns[column] = pd.Categorical.from_codes(codes, categories=list(categories))  # pyright: ignore
        else:
            columns[column] = np.array(values)
    return pd.DataFrame(columns, copy=False)
