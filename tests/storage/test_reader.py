"""Readers bring the exact bytes, wherever they lie and go to, and record what they did."""

import numpy as np
import pytest

from flashmoe_lab.storage import ways
from flashmoe_lab.storage.reader import BlockRead
from tests.storage.made_blocks import (
    BLOCK,
    LAYERS,
    PREADERS,
    block,
    content,
    cut,
    expected,
    memory,
    open_reader,
    real_preadv,
    skip_if_refused,
)


@pytest.mark.parametrize("split", range(1, 6))
@pytest.mark.parametrize("threads", [1, 2, 4, 8])
def test_blocks_of_all_layers(paths, name, threads, split):
    reads = [block(e, layer=layer) for e in (3, 39, 0, 17) for layer in LAYERS]
    with open_reader(name, paths, threads=threads, split=split) as reader:
        records = reader.read(reads)
    assert [content(r) for r in reads] == [expected(r) for r in reads]
    assert len(records) == split * len(reads)
    asked = [(r.layer, r.expert) for r in reads for _ in range(split)]
    assert [(r.layer, r.expert) for r in records] == asked
    assert sum(r.nbytes for r in records) == len(reads) * BLOCK


@pytest.mark.parametrize("split", [1, 3, 5])
@pytest.mark.parametrize("shift", [0, 24])
@pytest.mark.parametrize("ends", [(), (4096, 8192), (1, 4095, 20000), tuple(range(7, 49000, 5000))])
def test_several_buffers(paths, name, split, shift, ends):
    reads = [block(e, buffers=cut(memory(BLOCK, shift), *ends)) for e in (2, 5, 39)]
    with open_reader(name, paths, threads=3, split=split) as reader:
        reader.read(reads)
    assert [content(r) for r in reads] == [expected(r) for r in reads]


@pytest.mark.parametrize("seed", range(5))
def test_any_offset_and_length(paths, name, seed):
    rng = np.random.default_rng(seed)
    reads = []
    for _ in range(20):
        offset, size = int(rng.integers(0, BLOCK * 20)), int(rng.integers(1, BLOCK * 20))
        buffers = cut(memory(size, int(rng.integers(0, 5000))), int(rng.integers(1, size + 1)))
        buffers = tuple(b for b in buffers if len(b))
        reads.append(BlockRead(layer=7, expert=1, offset=offset, buffers=buffers))
    with open_reader(name, paths, threads=4, split=int(rng.integers(1, 6))) as reader:
        reader.read(reads)
    assert [content(r) for r in reads] == [expected(r) for r in reads]


def test_more_than_one_staging_buffer(paths, name):
    size = ways.STAGING_BYTES + 300_001
    read = BlockRead(layer=0, expert=0, offset=12289, buffers=cut(memory(size, 3), 99))
    with open_reader(name, paths) as reader:
        assert reader.read([read])[0].nbytes == size
    assert content(read) == expected(read)


def test_more_buffers_than_one_call_takes(paths, name):
    read = block(4, buffers=cut(memory(BLOCK), *range(10, BLOCK, 10)))
    with open_reader(name, paths) as reader:
        reader.read([read])
    assert content(read) == expected(read)


def test_small_block_makes_fewer_pieces(paths, name):
    read = BlockRead(layer=0, expert=0, offset=8192, buffers=(memory(5000),))
    with open_reader(name, paths, split=16) as reader:
        assert [(r.offset, r.nbytes) for r in reader.read([read])] == [(8192, 4096), (12288, 904)]
    assert content(read) == expected(read)


@pytest.mark.parametrize("most", [4096, 5000, 20000])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", PREADERS)
def test_short_reads_are_completed(paths, name, most, shift, monkeypatch):
    skip_if_refused(name, paths[0])
    calls = []

    def short(fd, buffers, offset):
        calls.append(offset)
        whole = real_preadv(fd, buffers, offset)
        return min(most, whole)

    monkeypatch.setattr(ways, "_preadv", short)
    reads = [block(e, buffers=cut(memory(BLOCK, shift), 3000, 16384)) for e in (1, 39)]
    with open_reader(name, paths, threads=2) as reader:
        reader.read(reads)
    assert len(calls) > len(reads)
    assert [content(r) for r in reads] == [expected(r) for r in reads]


def test_nothing_asked(paths, name):
    with open_reader(name, paths) as reader:
        pending = reader.submit([])
        assert pending.done and pending.wait() == []


def test_records_tell_when_and_where(paths, name):
    with open_reader(name, paths, threads=3, split=2) as reader:
        records = reader.read([block(e) for e in range(8)])
    assert all(r.submit_ns <= r.start_ns <= r.end_ns for r in records)
    assert {r.thread for r in records} <= {0, 1, 2, 3}  # 3 is the caller's
    assert [r.offset for r in records[:3]] == [0, BLOCK // 2, BLOCK]


def test_repr_says_what_it_is(paths):
    with open_reader("direct", paths, threads=3) as reader:
        assert repr(reader) == "DirectReader(2 files, threads=3, split=1)"
