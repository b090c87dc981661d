"""A read that fails is one clear error; what cannot be read is refused before any is started."""

import errno
import os
import sys
import threading

import pytest

from flashmoe_lab.storage import ways
from flashmoe_lab.storage.reader import BlockRead, ReadError
from tests.storage.made_blocks import (
    BLOCK,
    PREADERS,
    block,
    content,
    expected,
    memory,
    open_reader,
    skip_if_refused,
)


@pytest.mark.parametrize("count", [0, 100])
@pytest.mark.parametrize("name", PREADERS)
def test_end_of_file_is_an_error(paths, name, count, monkeypatch):
    skip_if_refused(name, paths[0])
    given = iter([count])
    monkeypatch.setattr(ways, "_preadv", lambda *_: next(given, 0))
    with open_reader(name, paths) as reader, pytest.raises(ReadError) as caught:
        reader.read([block(17, layer=7)])
    text = str(caught.value)
    for part in (str(paths[7]), "layer 7", "expert 17", f"offset {17 * BLOCK}", f"got {count}"):
        assert part in text


@pytest.mark.parametrize("shift", [0, 8])
@pytest.mark.parametrize("left", [0, 1, 4096, 10000, BLOCK - 1])
def test_truncated_file(paths, name, left, shift):
    os.truncate(paths[0], 30 * BLOCK + left)
    good, bad = block(29), block(30, buffers=(memory(BLOCK, shift),))
    with open_reader(name, paths) as reader:
        with pytest.raises(ReadError, match=rf"layer 0, expert 30: wanted {BLOCK} .* got {left}:"):
            reader.read([good, bad])
        assert len(reader.read([good])) == 1
    assert content(good) == expected(good)


@pytest.mark.parametrize("offset", [0, 5 * BLOCK])
def test_empty_file(paths, name, offset):
    os.truncate(paths[0], 0)
    read = BlockRead(layer=0, expert=0, offset=offset, buffers=(memory(BLOCK),))
    with open_reader(name, paths) as reader, pytest.raises(ReadError, match="got 0"):
        reader.read([read])


def test_missing_file(paths, name):
    paths[7].unlink()
    with open_reader(name, paths) as reader, pytest.raises(ReadError, match="layer 7") as caught:
        reader.read([block(1), block(1, layer=7)])
    assert caught.value.errno == errno.ENOENT and str(paths[7]) in str(caught.value)


def test_unknown_layer(paths, name):
    with open_reader(name, paths) as reader, pytest.raises(ValueError, match=r"layer 3;.*\[0, 7\]"):
        reader.submit([block(1, layer=3)])


@pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is of Linux")
def test_refused_direct_names_the_way_out(paths, monkeypatch):
    real_open = os.open

    def refuse(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    monkeypatch.setattr(ways.os, "open", refuse)
    with open_reader("direct", paths) as reader, pytest.raises(ReadError) as caught:
        reader.read([block(0)])
    assert 'reader="pread"' in str(caught.value) and str(paths[0]) in str(caught.value)


def test_io_error_keeps_its_number(paths, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ways, "_preadv", fail)
    with open_reader("pread/python", paths) as reader, pytest.raises(ReadError) as caught:
        reader.read([block(4)])
    assert caught.value.errno == errno.EIO and "expert 4" in str(caught.value)


def test_unexpected_error_comes_through(paths, monkeypatch):
    monkeypatch.setattr(ways, "_preadv", lambda *_: 1 // 0)
    with open_reader("pread/python", paths) as reader, pytest.raises(ZeroDivisionError):
        reader.read([block(4)])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"threads": 0}, "threads must be 1 to 64, got 0"),
        ({"threads": 65}, "threads must be 1 to 64, got 65"),
        ({"split": 0}, "split must be 1 to 16, got 0"),
        ({"split": 17}, "split must be 1 to 16, got 17"),
    ],
)
def test_bad_settings(paths, settings, message):
    before = threading.enumerate()
    with pytest.raises(ValueError, match=message):
        open_reader("pread", paths, **settings)
    assert threading.enumerate() == before


def test_unknown_reader(paths):
    with pytest.raises(ValueError, match=r"\['direct', 'mmap', 'pread'\], got 'aio'"):
        open_reader("aio", paths)


@pytest.mark.parametrize(
    "offset, buffers, message",
    [
        (-1, (memory(10),), "offset must be 0 bytes or more, got -1"),
        (0, (), "at least one memoryview"),
        (0, (memoryview(b"abc"),), "readonly=True"),
        (0, (memory(16)[::2],), "contiguous"),
        (0, (memory(16).cast("I"),), "format='I'"),
        (0, (memory(16).cast("B", (4, 4)),), r"shape=\(4, 4\)"),
        (0, (memory(16), memory(16)[:0]), "empty"),
    ],
)
def test_bad_reads(offset, buffers, message):
    with pytest.raises(ValueError, match=message):
        BlockRead(layer=0, expert=0, offset=offset, buffers=buffers)
