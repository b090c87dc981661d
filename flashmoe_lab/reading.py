"""Reading: which reader an engine takes, with how many threads and pieces, and why.

What the caller names is taken. Where nothing is named, what `flashmoe-lab tune` has measured here
for such experts; without that, one rule, of two measured facts: blocks that the page cache holds
come faster through it than from the disk, and blocks that it does not hold come through it at half
the speed of direct reads or less (docs/measuring.md). So experts are read through the page cache
where all of them fit there beside the bank, and past it where they do not. With a bank of 0 the
page cache is the only cache, so it is used.

Every reader brings the same bytes: this decides about time alone.
"""

import os
import sys
from dataclasses import dataclass

from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.storage import native_crew
from flashmoe_lab.storage.free_memory import available_memory_nbytes
from flashmoe_lab.storage.ways import READERS
from flashmoe_lab.tuning import kept_tuning

THREADS, SPLIT = 8, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a reader is opened with.

    Attributes:
        reader, threads, split: see storage/reader.py.
        why: how it was chosen; empty where the caller did.
    """

    reader: str
    threads: int
    split: int
    why: str = ""

    def __str__(self) -> str:
        slow = READERS[self.reader].has_native and not native_crew.is_built()
        threads = f"{self.threads} {'Python ' if slow else ''}threads, split {self.split}"
        return f"{self.reader} ({threads}{self.why and f'; {self.why}'})"


def choose_reading(
    checkpoint: PackedCheckpoint,
    bank_nbytes: int | None,
    reader: str | None = None,
    threads: int | None = None,
    split: int | None = None,
) -> Reading:
    """Complete what the caller names, which is taken as it is.

    Args:
        bank_nbytes: what the bank will take; None is room for every expert.
    """
    cached = page_cache_holds(checkpoint, bank_nbytes)
    if reader is threads is split is None and bank_nbytes != 0:
        found = _tuned(checkpoint, cached)
        if found is not None:
            return found
    why = ""
    if reader is None:
        reader, why = _by_rule(checkpoint, bank_nbytes, cached)
    return Reading(
        reader=reader,
        threads=THREADS if threads is None else threads,
        split=SPLIT if split is None else split,
        why=why,
    )


def page_cache_holds(checkpoint: PackedCheckpoint, bank_nbytes: int | None) -> bool:
    """Whether all experts fit into memory a second time, beside the bank and what is resident."""
    available = available_memory_nbytes()
    experts = checkpoint.expert_nbytes
    taken = checkpoint.resident_nbytes + (experts if bank_nbytes is None else bank_nbytes)
    return available is not None and experts + taken <= available


def _tuned(checkpoint: PackedCheckpoint, cached: bool) -> Reading | None:
    found = kept_tuning(checkpoint, cached)
    try:
        return found and Reading(**found.settings, why=f"tuned {found.date}")
    except ValueError:
        return None  # no reader was right when it was measured


def _by_rule(
    checkpoint: PackedCheckpoint, bank_nbytes: int | None, cached: bool
) -> tuple[str, str]:
    if bank_nbytes == 0:
        return "pread", "the page cache is the bank"
    if cached:
        return "pread", "untuned: the page cache can hold the experts"
    if not _reads_directly(checkpoint):
        return "pread", "untuned: direct reads are not known to work here"
    return "direct", "untuned: the page cache cannot hold the experts"


def _reads_directly(checkpoint: PackedCheckpoint) -> bool:
    """Whether direct reads are possible and were seen to be faster: on Linux, where the file system
    has them. Of macOS nothing was measured, so there `tune` has to say it."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.open(checkpoint.layers[0].path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
