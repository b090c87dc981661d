"""Tuning: what was measured of readers and kernels on this machine, kept in the user's cache.

It measures nothing (tune.py does) and chooses for nobody (reading.py does): it is the table, and
the words by which a table is found again, or not where machine, disk or experts are others.
"""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from flashmoe_lab import native
from flashmoe_lab.checkpoint.packed import PackedCheckpoint, write_whole
from flashmoe_lab.user_cache import locked, make_directory, user_cache_directory

LARGEST_ERROR = 1e-3  # relative rms of an expert's output that a default may have
_FILE = "tuning.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that was measured.

    Attributes:
        kind: "reader" or "kernels".
        name: "direct, 4 threads, split 1", or one of kernels.KERNELS.
        settings: what the engine would be given for it.
        speed: GB/s, the median.
        error: relative rms against the reference; of a reader 0 where every byte was right, else 1.
        cached_nbytes: of a reader that was to be cold, what the page cache still held after it was
            emptied, the most.
    """

    kind: str
    name: str
    settings: dict[str, Any]
    speed: float
    error: float
    cached_nbytes: int = 0

    @property
    def right(self) -> bool:
        """Whether it may be chosen."""
        return self.error <= (LARGEST_ERROR if self.kind == "kernels" else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """All rows of one machine and one kind of experts.

    Attributes:
        key: see `key_of`.
        date: of the measurement, like 2026-11-24.
    """

    key: str
    date: str
    rows: tuple[Row, ...]

    def best(self, kind: str) -> Row:
        """The fastest right one.

        Raises:
            ValueError: none is right.
        """
        right = [row for row in self.rows if row.kind == kind and row.right]
        if not right:
            raise ValueError(f"no {kind} of this machine gives right results")
        return max(right, key=lambda row: row.speed)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the engine: `fl.load(path, **tuning.settings)`."""
        return dict(self.best("reader").settings)

    @property
    def kernels(self) -> str:
        """For `kernels.use`."""
        return self.best("kernels").name

    def table(self) -> str:
        """What was measured, the chosen ones marked."""
        lines = [self.key]
        for kind in ("reader", "kernels"):
            rows = [row for row in self.rows if row.kind == kind]
            for row in sorted(rows, key=lambda row: -row.speed):
                mark = "*" if row is self.best(kind) else " "
                note = "" if row.right else "  WRONG, not to be chosen"
                if kind == "kernels":
                    note = f"  error {row.error:.1e}{note}"
                if row.cached_nbytes:
                    note += f"  not cold: {row.cached_nbytes:,} bytes stayed in the page cache"
                lines.append(f"{mark} {kind:8}{row.name:32}{row.speed:>8.2f} GB/s{note}")
        return "\n".join(lines)

    def keep(self) -> None:
        """Write it beside the tables of other machines and experts."""
        make_directory(_place().parent)
        entry = {"date": self.date, "rows": [asdict(row) for row in self.rows]}
        with locked(_place().with_suffix(".lock")):  # another process may add its own
            write_whole(_place(), json.dumps(_kept() | {self.key: entry}, indent=1).encode())


def kept_tuning(checkpoint: PackedCheckpoint, cached: bool) -> Tuning | None:
    """What was measured here for such experts, or None; `cached` as for `key_of`."""
    key = key_of(checkpoint, cached)
    try:
        entry = _kept()[key]
        rows = tuple(Row(**row) for row in entry["rows"])
        return Tuning(key=key, date=entry["date"], rows=rows)
    except (KeyError, TypeError):
        return None  # none, or one that another version wrote: it can be measured again


def key_of(checkpoint: PackedCheckpoint, cached: bool) -> str:
    """Machine, backend, disk and what is read: a table is of use only for the same.

    Args:
        cached: whether reads find the page cache filled (see reading.py).
    """
    layout = checkpoint.layers[0].layout
    parts = (
        platform.node(),
        platform.machine(),
        f"{os.cpu_count()} processors",
        native.isa() or "no native kernels",
        str(mx.default_device()),
        f"disk {os.statvfs(checkpoint.path).f_fsid:x}",
        f"{layout.label}, blocks of {layout.block_nbytes} bytes",
        f"page cache {'warm' if cached else 'cold'}",
    )
    return "; ".join(parts)


def _place() -> Path:
    return user_cache_directory() / _FILE


def _kept() -> dict[str, Any]:
    try:
        found = json.loads(_place().read_text())
    except (OSError, ValueError):
        return {}  # none yet, or a damaged one: it can be measured again
    return found if isinstance(found, dict) else {}
