"""Run a program in a memory cgroup, so that a model is larger than the memory it has.

The limit counts the page cache as well, as a smaller machine would. It needs Linux, root and a
memory controller (version 1 or 2); `available` says what is missing.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def available() -> str | None:
    """None where a limit can be set, else why not."""
    if not ROOT.is_dir():
        return "no cgroups on this system"
    if os.geteuid() != 0:
        return "a memory limit needs root"
    if _version() is None:
        return "no memory controller in /sys/fs/cgroup"
    return None


def run(
    command: Sequence[str], limit_nbytes: int | None, **options: object
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with its output kept, under a limit unless that is None."""
    if limit_nbytes is None:
        return _run(command, None, options)
    with _group(limit_nbytes) as group:
        return _run(command, group, options)


def _run(
    command: Sequence[str], group: Path | None, options: dict[str, object]
) -> subprocess.CompletedProcess[str]:
    if group is not None:
        # A shell joins the group and becomes the program: nothing runs between fork and exec here.
        script = 'echo $$ > "$0" && exec "$@"'
        command = ["sh", "-c", script, str(group / "cgroup.procs"), *command]
    return subprocess.run(command, capture_output=True, text=True, **options)  # pyright: ignore


@contextmanager
def _group(limit_nbytes: int) -> Iterator[Path]:
    version = _version()
    parent = ROOT / "memory" if version == 1 else ROOT
    group = Path(tempfile.mkdtemp(prefix="flashmoe-bench-", dir=parent))
    try:
        name = "memory.limit_in_bytes" if version == 1 else "memory.max"
        (group / name).write_text(str(limit_nbytes))
        yield group
    finally:
        group.rmdir()


def _version() -> int | None:
    if (ROOT / "memory" / "memory.limit_in_bytes").exists():
        return 1
    controllers = ROOT / "cgroup.subtree_control"
    if controllers.exists() and "memory" in controllers.read_text().split():
        return 2
    return None
