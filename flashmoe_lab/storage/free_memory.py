"""Memory that can still be had without swapping: by the system's account, and by the limit that a
container sets. The page cache counts as free, for it gives way."""

import os
from pathlib import Path

_UNLIMITED = 1 << 60  # what version 1 says for "no limit" is about 2**63
# By version: the folder, its files of limit and use, and the lines of memory.stat that give way.
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = ("", "memory.max", "memory.current", "")


def available_memory_nbytes(root: Path = Path("/")) -> int | None:
    """Bytes that are free, or all there are where the system does not say; None if unknown."""
    found = [_of_the_system(root), *_of_control_groups(root)]
    known = [nbytes for nbytes in found if nbytes is not None]
    return min(known) if known else None


def _of_the_system(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _of_control_groups(root: Path) -> list[int | None]:
    """What the groups of this process leave it, each and those above it; within a container the
    path of the group may not be visible, and the uppermost is its own."""
    found: list[int | None] = []
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version = _V2 if number == "0" else _V1
        top = root / "sys/fs/cgroup" / version[0]
        group = top / path.lstrip("/")
        found += [_room(folder, *version[1:]) for folder in (group, *group.parents)
                  if folder.is_relative_to(top)]  # fmt: skip
    return found


def _room(group: Path, limit: str, used: str, prefix: str) -> int | None:
    limits, uses = _lines(group / limit), _lines(group / used)
    if not (limits and uses and limits[0].isdecimal()) or int(limits[0]) >= _UNLIMITED:
        return None
    words = (line.split() for line in _lines(group / "memory.stat"))
    stat = {pair[0]: int(pair[1]) for pair in words if len(pair) == 2}
    cache = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return max(0, int(limits[0]) - int(uses[0]) + cache)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
