"""What only the native reading threads have: short reads, errors and the keeping of memory."""

import errno
import gc
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from flashmoe_lab.storage import native_crew
from flashmoe_lab.storage.blocks import BlockBatch, BlockRead, ReadError
from flashmoe_lab.storage.ways import MmapReader, PreadReader, open_reader

pytestmark = pytest.mark.skipif(not native_crew.is_built(), reason="_native is not built")

NBYTES = 300_000
SHORT_PREADV = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>
static int calls;
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) {
    if (__sync_fetch_and_add(&calls, 1) % 3 == 0) { errno = EINTR; return -1; }
    ssize_t got = pread(fd, parts[0].iov_base, parts[0].iov_len, offset);
    return got > 10000 ? 10000 : got;
}
ssize_t preadv64(int fd, const struct iovec *p, int n, off_t o) { return preadv(fd, p, n, o); }
"""
READ_ALL = """
import sys
from pathlib import Path
import numpy as np
from flashmoe_lab.storage.blocks import BlockRead
from flashmoe_lab.storage.ways import open_reader
path, name = Path(sys.argv[1]), sys.argv[2]
whole = np.fromfile(path, np.uint8)
memory = np.zeros(len(whole) + 8192, np.uint8)
start = -memory.ctypes.data % 4096
cuts = [0, 4096, 16384, len(whole)]
parts = tuple(memoryview(memory)[start + a : start + b] for a, b in zip(cuts, cuts[1:]))
with open_reader(name, {0: path}, threads=3, split=4, native=True) as reader:
    reader.read([BlockRead(layer=0, expert=0, offset=0, buffers=parts)])
assert (memory[start : start + len(whole)] == whole).all()
print("equal")
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(NBYTES))
    return path


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and cc")
@pytest.mark.parametrize("name", ["pread", "direct"])
def test_short_and_interrupted_reads_are_completed(path, tmp_path, name):
    """Every system call says that it got 10,000 bytes at most, and every third is interrupted."""
    (tmp_path / "short.c").write_text(SHORT_PREADV)
    library = tmp_path / "short.so"
    build = ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "short.c")]
    subprocess.run(build, check=True)
    run = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(path), name],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": str(library)},
        cwd=Path(__file__).parents[2],
    )
    if "refuses direct I/O" in run.stderr:
        pytest.skip("the file system refuses O_DIRECT")
    assert (run.stdout, run.returncode) == ("equal\n", 0), run.stderr


def test_system_error_keeps_its_number(tmp_path):
    """A directory opens and cannot be read."""
    memory = memoryview(bytearray(100))
    read = BlockRead(layer=3, expert=5, offset=64, buffers=(memory,))
    with PreadReader({3: tmp_path}, native=True) as reader, pytest.raises(ReadError) as caught:
        reader.read([read])
    assert caught.value.errno == errno.EISDIR
    for part in (str(tmp_path), "layer 3", "expert 5", "offset 64", "wanted 100 bytes"):
        assert part in str(caught.value)


def batch_of(memory, experts=(0, 1)):
    return BlockBatch(
        layer=0,
        experts=np.array(experts),
        offsets=np.array(experts) * 4096,
        addresses=(memory.ctypes.data + np.arange(len(experts)) * 4096).astype(np.uint64)[:, None],
        part_nbytes=np.array([4096], np.uint64),
        owner=memory,
    )


@pytest.mark.parametrize("native", [True, False])
def test_batch_is_read_as_its_blocks_are(path, native):
    memory = np.zeros(3 * 4096, np.uint8)
    batch = batch_of(memory, (7, 2, 5))
    with PreadReader({0: path}, threads=2, split=2, native=native) as reader:
        records = reader.read(batch)
    whole = path.read_bytes()
    for place, expert in enumerate((7, 2, 5)):
        found = memory[place * 4096 : (place + 1) * 4096].tobytes()
        assert found == whole[expert * 4096 : (expert + 1) * 4096]
    assert [record.expert for record in records] == [7, 2, 5]
    assert records.nbytes == memory.nbytes


def test_memory_is_kept_until_the_reads_have_ended(path):
    """A caller that loses interest must not leave threads writing into freed memory."""

    class Owner:
        pass

    memory, owner = np.zeros(2 * 4096, np.uint8), Owner()
    batch = batch_of(memory)
    object.__setattr__(batch, "owner", owner)
    alive = weakref.ref(owner)
    del owner
    with PreadReader({0: path}, native=True) as reader:
        pending = reader.submit(batch)
        del batch
        gc.collect()
        assert alive() is not None
        del pending
        gc.collect()
        assert alive() is None
    assert memory.tobytes() == path.read_bytes()[: memory.nbytes]


def test_landed_gives_each_block_once(path):
    memory = np.zeros(16 * 4096, np.uint8)
    batch = batch_of(memory, tuple(range(16)))
    with PreadReader({0: path}, threads=3, split=2, native=True) as reader:
        pending = reader.submit(batch)
        groups = list(pending.landed(3))
    assert all(len(group) >= 3 for group in groups[:-1])
    assert sorted(sum(groups, [])) == list(range(16))
    assert list(pending.landed()) == []
    assert len(pending.wait()) == 16


def test_landed_leaves_out_what_failed(path):
    memory = np.zeros(3 * 4096, np.uint8)
    batch = batch_of(memory, (0, 200, 1))  # the file has 73 whole pages
    with PreadReader({0: path}, threads=1, native=True) as reader:
        pending = reader.submit(batch)
        assert sorted(sum(pending.landed(), [])) == [0, 2]
        with pytest.raises(ReadError, match=r"expert 200: .*got 0: the file ends too early"):
            pending.wait()


def test_a_way_without_native_threads(path):
    with pytest.raises(ValueError, match="'mmap' has no native threads"):
        MmapReader({0: path}, native=True)
    with open_reader("mmap", {0: path}) as reader:
        assert not reader.native
    with open_reader("pread", {0: path}) as reader:
        assert reader.native


@pytest.mark.skipif(sys.platform != "linux", reason="RWF_NOWAIT is of Linux")
def test_small_cached_reads_wake_no_thread(path, tmp_path):
    memory = np.zeros(4 * 4096, np.uint8)
    large = tmp_path / "large"
    large.write_bytes(bytes(3 << 20))
    with PreadReader({0: path, 1: large}, threads=2, native=True) as reader:
        assert {r.thread for r in reader.read(batch_of(memory, (0, 1, 2, 3)))} == {2}
        buffer = memoryview(bytearray(2 << 20))
        records = reader.read([BlockRead(layer=1, expert=0, offset=0, buffers=(buffer,))])
        assert {r.thread for r in records} <= {0, 1}
    assert memory.tobytes() == path.read_bytes()[: memory.nbytes]
