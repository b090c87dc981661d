"""Trace: what one run did, as pandas DataFrames; docs/trace_schema.md says what each column means.

A trace knows no engine: it can be read on a machine that has neither the model nor MLX.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flashmoe_lab.trace import parquet
from flashmoe_lab.trace.schema import LANES, TABLES
from flashmoe_lab.units import format_nbytes

Arrays = Mapping[str, tuple[np.ndarray, np.ndarray]]
Rows = pd.DataFrame | Path  # or the file that holds them
NAMES = (*TABLES, "run")


class Trace:
    """The record of one run.

    Attributes:
        arrays: name -> (positions [n], rows [n, ...]) of what was kept whole.

    Args:
        tables: by name; what makes one is called when it is first asked for.
    """

    def __init__(
        self,
        tables: Mapping[str, Rows | Callable[[], Rows]],
        arrays: Arrays | None = None,
        keep: object = None,
    ) -> None:
        missing = set(NAMES) - set(tables)
        if missing:
            raise ValueError(f"a trace needs the tables {', '.join(NAMES)}; no {min(missing)}")
        self._tables = dict(tables)
        self._keep = keep  # what holds the files that tables lie in
        self.arrays: Arrays = arrays or {}

    def _frame(self, name: str) -> pd.DataFrame:
        table = self._tables[name]
        if callable(table):
            self._tables[name] = table = table()
        return parquet.read_table(table) if isinstance(table, Path) else table

    def _parts(self, name: str, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
        """A table in parts that fit memory, without keeping any."""
        table = self._tables[name]
        if name in self.__dict__ or not isinstance(table, Path):
            yield getattr(self, name)
        else:
            yield from parquet.read_parts(table, columns)

    def _rows(self, name: str) -> int:
        table = self._tables[name]
        return parquet.rows(table) if isinstance(table, Path) else len(getattr(self, name))

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row a token of the sequence."""
        return self._frame("tokens")

    @cached_property
    def routing(self) -> pd.DataFrame:
        """One row for each expert that a token went to in a layer."""
        return self._frame("routing")

    @cached_property
    def reads(self) -> pd.DataFrame:
        """One row for each piece read, and for each expert that the bank held."""
        return self._frame("reads")

    @cached_property
    def spans(self) -> pd.DataFrame:
        """What the run's own thread was at, from when to when; spans do not overlap."""
        return self._frame("spans")

    @cached_property
    def run(self) -> pd.DataFrame:
        """One row: what ran, where, and how."""
        return self._frame("run")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The row of `run` as a dictionary."""
        return {str(k): parquet.plain(v) for k, v in self.run.iloc[0].items()}

    @property
    def mode(self) -> str:
        """ "flow": speed is real, unless arrays were kept; "stages": each stage's time is exact and
        the whole is slower."""
        return self.facts["mode"]

    # What it took

    @property
    def dur_ns(self) -> int:
        """Wall time of the run."""
        return self.facts["end_ns"] - self.facts["start_ns"]

    @cached_property
    def lane_ns(self) -> dict[str, int]:
        """Time by kind: compute, wait, io, host."""
        sums: dict[str, int] = dict.fromkeys(LANES, 0)
        for spans in self._parts("spans", ["lane", "start_ns", "end_ns"]):
            dur = (spans.end_ns - spans.start_ns).groupby(spans.lane, observed=True).sum()
            for lane, ns in dur.items():
                sums[str(lane)] += int(ns)
        return sums

    @property
    def closure(self) -> float:
        """Share of the wall time that the spans explain."""
        return sum(self.lane_ns.values()) / self.dur_ns if self.dur_ns else 0.0

    @property
    def cached_words(self) -> str:
        """How much of the experts' files the page cache held when the run began."""
        held, size = self.facts.get("page_cache_nbytes"), self.facts.get("expert_nbytes")
        return "an unknown share" if pd.isna(held) or not size else f"{min(held / size, 1):.0%}"

    def summary(self) -> str:
        """One line: what the record holds, and what it cost."""
        facts = self.facts
        reads = read_nbytes = needless = 0
        for part in self._parts("reads", ["nbytes", "used"]):
            reads += int((part.nbytes > 0).sum())
            read_nbytes += int(part.nbytes.sum())
            needless += int(part.nbytes[~part.used].sum())
        nothing = f" ({format_nbytes(needless)} for nothing)" if needless else ""
        dur = max(self.dur_ns, 1)
        lanes = ", ".join(f"{lane} {ns / dur:.0%}" for lane, ns in self.lane_ns.items() if ns)
        arrays = f", {facts['arrays']} arrays kept" if facts.get("arrays") else ""
        return (
            f"trace ({self.mode}{arrays}): {self._rows('tokens')} tokens in {dur / 1e9:.2f} s, "
            f"{self._rows('routing'):,} choices, {reads:,} reads of "
            f"{format_nbytes(read_nbytes)}{nothing}; the page cache held {self.cached_words} of "
            f"the experts at the start; spans explain {self.closure:.1%} of the time ({lanes}); "
            f"recording took {facts.get('record_ns', 0) / dur:.1%}"
        )

    def __repr__(self) -> str:
        return f"<{self.summary()}>"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>"

    # On disk

    def write(self, directory: str | Path) -> Path:
        """Write every table as Parquet (and arrays as .npz) to a directory, and return it.

        A trace that lies there gives way, whole: until all of this one is there, there is none.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path) as folder:
            new = Path(folder)
            self._write_files(new)
            last = f"{NAMES[-1]}.parquet"  # without this one it is no trace
            for old in (path / last, *path.glob("array.*.npz")):
                old.unlink(missing_ok=True)
            for file in sorted(new.iterdir(), key=lambda file: file.name == last):
                os.replace(file, path / file.name)
        return path

    def _write_files(self, path: Path) -> None:
        for name in NAMES:
            table = self._tables[name]
            if isinstance(table, Path) and name not in self.__dict__:
                shutil.copyfile(table, path / f"{name}.parquet")
            else:
                parquet.write_table(name, getattr(self, name), path)
        for name, (positions, rows) in self.arrays.items():
            np.savez(path / f"array.{name}.npz", positions=positions, rows=rows)

    @classmethod
    def read(cls, directory: str | Path) -> "Trace":
        """Read what `write` wrote, also by a newer minor version.

        Raises:
            FileNotFoundError: a table is not there.
            ValueError: not a trace, or of another major version.
        """
        path = Path(directory)
        for name in NAMES:
            if not (path / f"{name}.parquet").exists():
                raise FileNotFoundError(f"{path / name}.parquet: no such file; not a trace")
        tables = {name: parquet.read_table(path / f"{name}.parquet") for name in NAMES}
        arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for file in sorted(path.glob("array.*.npz")):
            with np.load(file) as content:
                arrays[file.stem.removeprefix("array.")] = (content["positions"], content["rows"])
        return cls(tables, arrays)
