"""Packed forms of published checkpoints that are made when first asked for and found again.

A pack's name in the cache is made of everything that it depends on, so another version of a
checkpoint, other bits or another format never opens an old pack. Nothing is removed here.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from flashmoe_lab.checkpoint.layer_file import Progress
from flashmoe_lab.checkpoint.pack import PackPlan, PackSettings, pack
from flashmoe_lab.checkpoint.packed import FORMAT_VERSION, MANIFEST, PackedCheckpoint
from flashmoe_lab.checkpoint.source import Source
from flashmoe_lab.user_cache import locked, make_directory, user_cache_directory

ProgressOf = Callable[[int], AbstractContextManager[Progress]]


def packed_copy(
    source: Source,
    name: str,
    settings: PackSettings,
    progress_of: ProgressOf,
    waiting: Callable[[], None] = lambda: None,
) -> PackedCheckpoint:
    """The packed form of a source from the user's cache, packed now if it is not there.

    An interrupted packing is gone on with. Of several processes one packs and the others wait.

    Args:
        name: what the pack's name in the cache begins with.
        progress_of: from the bytes to write, who is told of bytes written.
        waiting: called once, if another process is packing.

    Raises:
        ValueError: the source cannot be packed so.
        OSError: the cache cannot be written, or there is no room.
    """
    directory = user_cache_directory() / "packed" / f"{name}-{pack_key(source, settings)}"
    found = _opened(directory)
    if found is not None:
        return found
    make_directory(directory.parent)
    with locked(directory.with_name(directory.name + ".lock"), waiting):
        found = _opened(directory)
        if found is not None:
            return found
        if (directory / MANIFEST).exists():  # files were lost since
            shutil.rmtree(directory)
        plan = PackPlan.make(source, directory, settings)
        with progress_of(plan.nbytes) as progress:
            pack(plan, progress)
    return PackedCheckpoint(directory)


def pack_key(source: Source, settings: PackSettings) -> str:
    """A digest of all that a pack's content depends on."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {source.identity}\n".encode())
    digest.update(json.dumps(asdict(settings), sort_keys=True).encode())
    for file, content in sorted(source.kept_files().items()):
        digest.update(f"\n{file} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _opened(directory: Path) -> PackedCheckpoint | None:
    """The pack, or None if it is not whole; what merely cannot be read now is not made again."""
    if not (directory / MANIFEST).exists():
        return None
    try:
        return PackedCheckpoint(directory)
    except (FileNotFoundError, ValueError):
        return None
