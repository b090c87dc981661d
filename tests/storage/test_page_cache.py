"""The page cache is measured truthfully and really emptied."""

import mmap
import os
import sys

import numpy as np
import pytest

from flashmoe_lab.storage import page_cache
from flashmoe_lab.storage.page_cache import evict, resident_bytes, resident_pages, warm

PAGE = mmap.PAGESIZE
SIZE = 256 * PAGE + 100  # the last page is not whole

pytestmark = pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="unknown system")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "experts.bin"
    path.write_bytes(np.random.default_rng(5).bytes(SIZE))
    return path


@pytest.fixture
def evictable(path):
    if evict(path):
        pytest.skip(f"the file system of {path} keeps its pages (tmpfs?)")
    return path


@pytest.fixture(params=["cachestat", "mincore"])
def way(request, monkeypatch, path):
    """Both ways of counting must agree with what was done to the file."""
    with page_cache._open_range(path, 0, None) as span:
        if request.param == "cachestat" and page_cache._cachestat(span) is None:
            pytest.skip("this kernel has no cachestat")
    if request.param == "mincore":
        monkeypatch.setattr(page_cache, "_cachestat", lambda span: None)


def test_warm_then_evict(evictable, way):
    assert resident_bytes(evictable) == 0
    assert warm(evictable) == SIZE
    assert resident_bytes(evictable) == SIZE
    assert resident_pages(evictable).tolist() == [True] * 257
    assert evict(evictable) == 0
    assert not resident_pages(evictable).any()


@pytest.mark.parametrize("first, count", [(0, 1), (3, 5), (100, 100), (255, 2)])
def test_evict_a_part(evictable, way, first, count):
    warm(evictable)
    nbytes = min(count * PAGE, SIZE - first * PAGE)
    if evict(evictable, first * PAGE, nbytes):
        pytest.skip("a large folio reaches out of the range")
    expected = np.ones(257, bool)
    expected[first : first + count] = False
    assert np.array_equal(resident_pages(evictable), expected)
    assert resident_bytes(evictable) == min(int(expected.sum()) * PAGE, SIZE)


def test_residency_of_a_part(evictable, way):
    os.truncate(evictable, 256 * PAGE)
    warm(evictable)
    if evict(evictable, 0, 64 * PAGE):
        pytest.skip("a large folio reaches out of the range")
    assert resident_bytes(evictable, 60 * PAGE, 8 * PAGE) == 4 * PAGE
    assert resident_pages(evictable, 60 * PAGE, 8 * PAGE).tolist() == [False] * 4 + [True] * 4
    assert resident_bytes(evictable, 0, 64 * PAGE) == 0
    assert resident_bytes(evictable, 64 * PAGE) == 192 * PAGE


def test_warm_a_part(evictable, way):
    assert warm(evictable, 10 * PAGE, 20 * PAGE) == 20 * PAGE
    assert resident_pages(evictable)[10:30].all()


@pytest.mark.parametrize("offset, nbytes, pages", [(1, 1, 1), (PAGE - 1, 2, 2), (PAGE, PAGE, 1)])
def test_ranges_are_widened_to_pages(path, way, offset, nbytes, pages):
    warm(path)
    assert len(resident_pages(path, offset, nbytes)) == pages
    assert resident_bytes(path, offset, nbytes) == pages * PAGE


def test_the_last_page_counts_to_the_file_end(path, way):
    warm(path)
    assert resident_bytes(path, 256 * PAGE) == 100
    assert len(resident_pages(path, 256 * PAGE)) == 1


@pytest.mark.parametrize("offset, nbytes", [(0, 0), (SIZE, 0), (SIZE, None), (5 * PAGE, 0)])
def test_empty_range(path, way, offset, nbytes):
    assert warm(path, offset, nbytes) == 0
    assert resident_bytes(path, offset, nbytes) == 0
    assert resident_pages(path, offset, nbytes).tolist() == []
    assert evict(path, offset, nbytes) == 0


def test_empty_file(path, way):
    os.truncate(path, 0)
    assert warm(path) == evict(path) == resident_bytes(path) == 0


def test_mapped_pages_stay_and_are_reported(evictable, way):
    if sys.platform != "linux":
        pytest.skip("known of Linux only")
    warm(evictable)
    with open(evictable, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert mapping[PAGE : PAGE + 1]
        assert evict(evictable) > 0
    assert evict(evictable) == 0


@pytest.mark.parametrize("call", [resident_bytes, resident_pages, evict, warm])
@pytest.mark.parametrize(
    "offset, nbytes, message",
    [
        (-1, None, f"offset must be 0 to {SIZE}, got -1"),
        (SIZE + 1, None, f"offset must be 0 to {SIZE}, got {SIZE + 1}"),
        (100, -1, f"nbytes must be 0 to {SIZE - 100}, got -1"),
        (100, SIZE, f"nbytes must be 0 to {SIZE - 100}, got {SIZE}"),
    ],
)
def test_ranges_outside_the_file(path, call, offset, nbytes, message):
    with pytest.raises(ValueError, match=message):
        call(path, offset, nbytes)


@pytest.mark.parametrize("call", [resident_bytes, resident_pages, evict, warm])
def test_missing_file(tmp_path, call):
    with pytest.raises(FileNotFoundError, match=r"gone\.bin"):
        call(tmp_path / "gone.bin")


def test_other_systems_are_refused(path, monkeypatch):
    monkeypatch.setattr(page_cache.sys, "platform", "win32")
    with pytest.raises(NotImplementedError, match="win32"):
        resident_bytes(path)


@pytest.mark.skipif(sys.platform != "linux", reason="the rule is Linux's")
def test_files_of_others_are_refused(path, monkeypatch):
    """The kernel would call every page of such a file resident."""
    monkeypatch.setattr(page_cache, "_cachestat", lambda span: None)
    monkeypatch.setattr(page_cache.os, "geteuid", lambda: os.stat(path).st_uid + 1)
    monkeypatch.setattr(page_cache.os, "access", lambda *_: False)
    for call in (resident_bytes, resident_pages):
        with pytest.raises(PermissionError, match=r"residency.*experts\.bin"):
            call(path)


def test_a_file_that_shrinks_under_warm(path, monkeypatch):
    monkeypatch.setattr(page_cache.os, "preadv", lambda *_: 0)
    with pytest.raises(OSError, match=f"ends at 0, expected {SIZE}"):
        warm(path)
