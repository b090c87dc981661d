"""A page cache without some files, or no measurement: "cold" must be so, and no mere label."""

from collections.abc import Iterable
from pathlib import Path

from flashmoe_lab.storage.page_cache import evict


def empty(files: Iterable[Path]) -> None:
    """Drop files from the page cache; stops everything where some of one stays."""
    for file in files:
        if left := evict(file):
            raise SystemExit(
                f"{file}: {left:,} bytes stay in the page cache (another process has them mapped, "
                "or the file system keeps its files in memory): nothing here would be cold"
            )
