"""Files of known bytes, and blocks of them to be read: what the tests of readers share."""

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from flashmoe_lab.storage import native_crew, ways
from flashmoe_lab.storage.reader import BlockRead
from flashmoe_lab.storage.ways import READERS

BLOCK = 49152  # bytes
BLOCKS = 40
LAYERS = (0, 7)
DATA = {layer: np.random.default_rng(layer).bytes(BLOCK * BLOCKS) for layer in LAYERS}
# A native crew reads without ways._preadv, so tests that replace it name the Python one.
PREADERS = ["pread/python", "direct/python"]
CREWS = ["pread", "direct", "mmap", *PREADERS] if native_crew.is_built() else list(READERS)
real_preadv = ways._preadv


def open_reader(name, paths, **settings):
    """`ways.open_reader`; "pread/python" asks for the crew of Python threads."""
    way, _, crew = name.partition("/")
    return ways.open_reader(way, paths, native=False if crew else None, **settings)


def skip_if_refused(name: str, path: Path) -> None:
    if name.startswith("direct") and sys.platform == "linux":
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            pytest.skip(f"the file system of {path} refuses O_DIRECT")


def memory(nbytes: int, shift: int = 0) -> memoryview:
    """Zeroed memory that begins `shift` bytes past a page."""
    return memoryview(mmap.mmap(-1, nbytes + shift))[shift:]


def block(expert: int, *, layer: int = 0, buffers=None) -> BlockRead:
    buffers = buffers or (memory(BLOCK),)
    return BlockRead(layer=layer, expert=expert, offset=expert * BLOCK, buffers=buffers)


def cut(buffer: memoryview, *ends: int) -> tuple[memoryview, ...]:
    edges = (0, *ends, len(buffer))
    return tuple(buffer[a:b] for a, b in zip(edges, edges[1:], strict=False))


def content(read: BlockRead) -> bytes:
    return b"".join(read.buffers)


def expected(read: BlockRead) -> bytes:
    return DATA[read.layer][read.offset : read.offset + read.nbytes]
