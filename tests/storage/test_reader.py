"""Readers bring the exact bytes, in parallel, or one clear error; and they leave nothing behind."""

import errno
import gc
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flashmoe_lab.storage import native_crew, python_crew, ways
from flashmoe_lab.storage.reader import BlockRead, ReadError
from flashmoe_lab.storage.ways import READERS

BLOCK = 49152  # bytes
BLOCKS = 40
LAYERS = (0, 7)
# A native crew reads without ways._preadv, so tests that replace it name the Python one.
PREADERS = ["pread/python", "direct/python"]
CREWS = ["pread", "direct", "mmap", *PREADERS] if native_crew.is_built() else list(READERS)
real_preadv = ways._preadv


DATA = {layer: np.random.default_rng(layer).bytes(BLOCK * BLOCKS) for layer in LAYERS}


@pytest.fixture
def paths(tmp_path):
    paths = {layer: tmp_path / f"layer_{layer:02}.safetensors" for layer in LAYERS}
    for layer, path in paths.items():
        path.write_bytes(DATA[layer])
    return paths


def open_reader(name, paths, **settings):
    """`ways.open_reader`; "pread/python" asks for the crew of Python threads."""
    way, _, crew = name.partition("/")
    return ways.open_reader(way, paths, native=False if crew else None, **settings)


@pytest.fixture(params=CREWS)
def name(request, paths):
    skip_if_refused(request.param, paths[0])
    return request.param


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


def thread_ids() -> set[str]:
    """The kernel's numbers of this process's threads, Python's and others."""
    return set(os.listdir("/proc/self/task"))


def wait_until(condition) -> None:
    # The kernel may list a thread for a moment after it was joined.
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


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


def test_records_tell_when_and_where(paths, name):
    with open_reader(name, paths, threads=3, split=2) as reader:
        records = reader.read([block(e) for e in range(8)])
    assert all(r.submit_ns <= r.start_ns <= r.end_ns for r in records)
    assert {r.thread for r in records} <= {0, 1, 2, 3}  # 3 is the caller's
    assert [r.offset for r in records[:3]] == [0, BLOCK // 2, BLOCK]


def test_small_block_makes_fewer_pieces(paths, name):
    read = BlockRead(layer=0, expert=0, offset=8192, buffers=(memory(5000),))
    with open_reader(name, paths, split=16) as reader:
        assert [(r.offset, r.nbytes) for r in reader.read([read])] == [(8192, 4096), (12288, 904)]
    assert content(read) == expected(read)


def test_nothing_asked(paths, name):
    with open_reader(name, paths) as reader:
        pending = reader.submit([])
        assert pending.done and pending.wait() == []


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


def test_error_waits_for_every_piece(paths, monkeypatch):
    """The first piece fails while the second is held; wait must not return before it is let go."""
    failed, let_go = threading.Event(), threading.Event()

    def preadv(fd, buffers, offset):
        if offset == 0:
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        let_go.wait()
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(ways, "_preadv", preadv)
    caught = []
    with open_reader("pread/python", paths, threads=2) as reader:
        slow = block(1)
        pending = reader.submit([block(0), slow])

        def wait() -> None:
            with pytest.raises(ReadError, match="expert 0"):
                pending.wait()
            caught.append(content(slow))

        waiter = threading.Thread(target=wait)
        waiter.start()
        assert failed.wait(30)
        assert not pending.done and not caught
        let_go.set()
        waiter.join()
    assert caught == [expected(slow)]


def test_interrupted_wait_still_waits(paths, monkeypatch):
    """Ctrl-C must not hand the memory back while a thread writes into it."""
    let_go = threading.Event()

    def held(fd, buffers, offset):
        let_go.wait()
        return real_preadv(fd, buffers, offset)

    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            if not let_go.is_set():
                let_go.set()
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(ways, "_preadv", held)
    with open_reader("pread/python", paths) as reader:
        reads = [block(e) for e in range(BLOCKS)]
        monkeypatch.setattr(python_crew.threading, "Event", Interrupted)
        pending = reader.submit(reads)
        with pytest.raises(KeyboardInterrupt):
            pending.wait()
        assert [content(r) for r in reads] == [expected(r) for r in reads]


@pytest.mark.parametrize("blocks, split", [(6, 1), (2, 3)])
def test_reads_run_at_once(paths, blocks, split, monkeypatch):
    """Six threads meet at a barrier inside the read; one that came alone would never pass it."""
    barrier = threading.Barrier(6, timeout=30)

    def meet(fd, buffers, offset):
        barrier.wait()
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(ways, "_preadv", meet)
    with open_reader("pread/python", paths, threads=6, split=split) as reader:
        records = reader.read([block(e) for e in range(blocks)])
    assert sorted(r.thread for r in records) == list(range(6))


def test_submit_does_not_wait(paths, monkeypatch):
    let_go = threading.Event()

    def held(fd, buffers, offset):
        let_go.wait()
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(ways, "_preadv", held)
    with open_reader("pread/python", paths, threads=2) as reader:
        batches = [reader.submit([block(e)]) for e in range(5)]
        assert not any(batch.done for batch in batches)
        let_go.set()
        assert [batch.wait()[0].expert for batch in batches] == list(range(5))
        assert batches[0].wait() == batches[0].wait()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc/self/fd")
@pytest.mark.parametrize("way", ["close", "drop"])
def test_nothing_is_left_behind(paths, name, way):
    threads, fds = thread_ids(), set(os.listdir("/proc/self/fd"))
    reader = open_reader(name, paths, threads=5)
    reader.read([block(1, layer=layer, buffers=(memory(BLOCK, 3),)) for layer in LAYERS])
    started = thread_ids() - threads
    assert len(started) == 5 and len(os.listdir("/proc/self/fd")) > len(fds)
    if way == "close":
        reader.close()
        reader.close()
    del reader
    gc.collect()
    wait_until(lambda: not started & thread_ids())
    # The listing itself opens one file, whose number may differ.
    assert len(os.listdir("/proc/self/fd")) == len(fds)


def test_close_finishes_what_was_submitted(paths, name):
    reads = [block(e) for e in range(BLOCKS)]
    reader = open_reader(name, paths, threads=2)
    pending = reader.submit(reads)
    reader.close()
    assert pending.done and len(pending.wait()) == BLOCKS
    assert [content(r) for r in reads] == [expected(r) for r in reads]
    with pytest.raises(ValueError, match="closed"):
        reader.submit(reads)


def test_dropped_reader_does_not_hold_the_process(paths):
    program = (
        "import sys; from pathlib import Path\n"
        "from flashmoe_lab.storage.reader import BlockRead\n"
        "from flashmoe_lab.storage.ways import open_reader\n"
        "r = open_reader('pread', {0: Path(sys.argv[1])})\n"
        "b = memoryview(bytearray(4096))\n"
        "print(len(r.read([BlockRead(layer=0, expert=0, offset=0, buffers=(b,))])))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(paths[0])],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "1\n", "")


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


def test_repr_says_what_it_is(paths):
    with open_reader("direct", paths, threads=3) as reader:
        assert repr(reader) == "DirectReader(2 files, threads=3, split=1)"
