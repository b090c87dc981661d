"""Readers read in parallel, give memory back only when all pieces have ended, and leave nothing
behind."""

import errno
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flashmoe_lab.storage import python_crew, ways
from flashmoe_lab.storage.reader import ReadError
from tests.storage.made_blocks import (
    BLOCK,
    BLOCKS,
    LAYERS,
    block,
    content,
    expected,
    memory,
    open_reader,
    real_preadv,
)


def thread_ids() -> set[str]:
    """The kernel's numbers of this process's threads, Python's and others."""
    return set(os.listdir("/proc/self/task"))


def wait_until(condition) -> None:
    # The kernel may list a thread for a moment after it was joined.
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


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
