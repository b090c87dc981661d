"""Where the bytes of a read were before it: the question, asked between routing and reading.

The page cache is asked about each block that the bank does not hold, unless the way of reading says
it for certain: direct reads never come from it, and small batches are first tried without waiting
(RWF_NOWAIT), which succeeds where it holds all; the run's own thread then did the read. While the
kernel moves such a page elsewhere in memory it is refused as well, and the read told as the SSD's:
seen for one read in some hundred thousand.
"""

import os
from collections.abc import Collection

from flashmoe_lab.layer import Layer
from flashmoe_lab.storage.page_cache import Residency, resident_bytes
from flashmoe_lab.trace_notes import Asker, Cached

SSD = "ssd"  # all of them
OWN_THREAD = "own_thread"  # the page cache, if the run's own thread read it; else the SSD
UNKNOWN = "unknown"
_AT_ONCE_NBYTES = 1 << 20  # as kernels/cpu/read_pool.cpp: a larger batch is not tried first


def asker(layer: Layer, num_experts_per_tok: int) -> Asker:
    """What answers for a layer."""
    fetch, index = layer.fetch, layer.index
    file, bank, reader = fetch.file, fetch.bank, fetch.reader
    if reader.name == "direct":
        return Asker(lambda experts: SSD, SSD)
    try:
        holds = Residency(file.path).holds
    except (NotImplementedError, PermissionError):
        return Asker(lambda experts: UNKNOWN, UNKNOWN)
    nbytes = file.layout.block_nbytes
    offsets = [file.offset(expert) for expert in range(file.num_experts)]
    tried = reader.name == "pread" and reader.native and not reader.staged and _can_try(layer)
    most = _AT_ONCE_NBYTES // nbytes if tried else 0

    def ask(experts: Collection[int]) -> Cached:
        if len(experts) <= most:
            return OWN_THREAD
        missing = [n for n in experts if not (bank.keeps and (index, n) in bank)]
        return {n: holds(offsets[n], nbytes) for n in missing}

    return Asker(ask, OWN_THREAD if num_experts_per_tok <= most else None)


def resident(layer: Layer) -> int | None:
    """Bytes of a layer's file in the page cache; None if the system will not tell."""
    try:
        return resident_bytes(layer.fetch.file.path)
    except (NotImplementedError, PermissionError):
        return None


def _can_try(layer: Layer) -> bool:
    """Whether the file's system can read without waiting; some always say no."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    fd = os.open(layer.fetch.file.path, os.O_RDONLY)
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
