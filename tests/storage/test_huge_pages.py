"""Huge pages change where memory lies, never what it holds."""

import sys

import numpy as np
import pytest

from flashmoe_lab.storage import huge_pages
from flashmoe_lab.storage.huge_pages import ask_for_huge_pages


@pytest.mark.parametrize("nbytes", [0, 1, 4096, (2 << 20) - 1, 5 << 20, (70 << 20) + 12345])
@pytest.mark.parametrize("shift", [0, 24])
def test_content_stays(nbytes, shift):
    memory = np.random.default_rng(0).integers(0, 256, nbytes + shift, np.uint8)
    before = memory.copy()
    ask_for_huge_pages(memory[shift:])
    np.testing.assert_array_equal(memory, before)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_stops_where_it_is_slow(monkeypatch):
    """Every part seems to take a minute: only the first is asked for."""
    clock = iter(range(0, 60000, 60))
    monkeypatch.setattr(huge_pages.time, "perf_counter", lambda: next(clock))
    called = []

    class Library:
        def __init__(self, name):
            pass

        def madvise(self, address, length, advice):
            called.append((length.value, advice))
            return 0

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", Library)
    ask_for_huge_pages(np.ones(300 << 20, np.uint8))
    assert [advice for _, advice in called] == [14]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_whole_pages_inside_the_memory_are_asked_for(monkeypatch):
    called = []

    class Library:
        def __init__(self, name):
            pass

        def madvise(self, address, length, advice):
            called.append((address.value, length.value, advice))
            return 0

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", Library)
    memory = np.ones(150 << 20, np.uint8)[100:]
    start, end = memory.ctypes.data, memory.ctypes.data + len(memory)
    ask_for_huge_pages(memory)
    parts = [(address, length) for address, length, advice in called if advice == 25]
    assert all(address % (2 << 20) == 0 and length % (2 << 20) == 0 for address, length in parts)
    assert parts[0][0] - start < 2 << 20 and end - sum(parts[-1]) < 2 << 20
    assert all(a + n == b for (a, n), (b, _) in zip(parts, parts[1:], strict=False))
