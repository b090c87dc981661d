"""Huge pages change where memory lies, never what is beside it, and zeros stay zeros."""

import sys

import numpy as np
import pytest

from flashmoe_lab.storage import huge_pages
from flashmoe_lab.storage.huge_pages import touch_in_huge_pages

MIB = 1 << 20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 2 * MIB - 1, 5 * MIB, 70 * MIB + 12345])
@pytest.mark.parametrize("shift", [0, 24])
def test_zeros_stay_and_so_does_what_is_beside_them(nbytes, shift):
    memory = np.zeros(nbytes + 2 * shift, np.uint8)
    memory[:shift] = memory[nbytes + shift :] = 7
    touch_in_huge_pages(memory[shift : nbytes + shift])
    assert not memory[shift : nbytes + shift].any()
    assert (memory[:shift] == 7).all() and (memory[nbytes + shift :] == 7).all()


@pytest.fixture
def advice(monkeypatch):
    """What is asked of the kernel: (address, bytes, advice); it does nothing."""
    asked: list[tuple[int, int, int]] = []

    class Library:
        def __init__(self, name):
            pass

        def madvise(self, address, length, advice):
            asked.append((address.value, length.value, advice))
            return 0

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", Library)
    return asked


@on_linux
def test_stops_asking_where_it_is_slow(monkeypatch, advice):
    """Every part seems to take a minute: the others are to be small, and touched all the same."""
    clock = iter(range(0, 60000, 60))
    monkeypatch.setattr(huge_pages.time, "perf_counter", lambda: next(clock))
    memory = np.ones(300 * MIB, np.uint8)
    touch_in_huge_pages(memory)
    assert [what for _, _, what in advice] == [14, 4, 15]
    assert next(clock) <= 180
    assert memory[-8192:].tolist().count(0) == 2  # a number a page


@on_linux
def test_whole_pages_inside_the_memory_are_given_back(advice):
    memory = np.zeros(150 * MIB, np.uint8)[100:]
    touch_in_huge_pages(memory)
    start, end = memory.ctypes.data, memory.ctypes.data + len(memory)
    assert [what for _, _, what in advice] == [14, 4]
    for address, length, _ in advice:
        assert address % (2 * MIB) == length % (2 * MIB) == 0
        assert 0 <= address - start < 2 * MIB and 0 <= end - address - length < 2 * MIB
