"""Free memory is the least of what the system and the groups of this process leave."""

import pytest

from flashmoe_lab.storage import free_memory
from flashmoe_lab.storage.free_memory import available_memory_nbytes

GB = 10**9


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {20 * GB // 1024} kB\n")
    return tmp_path


def write(root, path, content):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


def test_this_machine():
    assert 1e8 < (available_memory_nbytes() or 0) < 1e14


def test_system(root):
    assert available_memory_nbytes(root) == 20 * GB // 1024 * 1024


def test_unknown(tmp_path, monkeypatch):
    assert 1e8 < (available_memory_nbytes(tmp_path) or 0) < 1e14  # a system without /proc
    monkeypatch.setattr(free_memory.os, "sysconf", lambda name: int("unknown"))
    assert available_memory_nbytes(tmp_path) is None


@pytest.mark.parametrize("visible", [True, False])
def test_group_of_version_2(root, visible):
    """The page cache of a group gives way; in a container its path is that of the host."""
    write(root, "proc/self/cgroup", "0::/kubepods/pod\n")
    group = "sys/fs/cgroup/" + ("kubepods/pod/" if visible else "")
    write(root, group + "memory.max", f"{7 * GB}\n")
    write(root, group + "memory.current", f"{6 * GB}\n")
    stat = f"anon 3\nfile 9\ninactive_file {2 * GB}\nactive_file {GB}\ntotal_active_file 5\n"
    write(root, group + "memory.stat", stat)
    assert available_memory_nbytes(root) == 4 * GB
    write(root, group + "memory.max", "max\n")
    assert available_memory_nbytes(root) == 20 * GB // 1024 * 1024


def test_group_of_version_1(root):
    write(root, "proc/self/cgroup", "5:cpu:/a\n4:hugetlb,memory:/a/b\n0::/\n")
    for name, limit in (("", 2**63 - 4096), ("a/", 8 * GB), ("a/b/", 9 * GB)):
        group = f"sys/fs/cgroup/memory/{name}"
        write(root, group + "memory.limit_in_bytes", f"{limit}\n")
        write(root, group + "memory.usage_in_bytes", f"{2 * GB}\n")
        write(root, group + "memory.stat", "cache 7\nactive_file 7\ntotal_active_file 1000\n")
    assert available_memory_nbytes(root) == 6 * GB + 1000
    write(root, "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", f"{99 * GB}\n")
    assert available_memory_nbytes(root) == 0
