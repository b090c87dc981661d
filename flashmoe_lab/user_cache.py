"""Where this package keeps what it made once for this user and can make again, and locks there."""

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def user_cache_directory() -> Path:
    """FLASHMOE_CACHE, or `flashmoe_lab` in XDG_CACHE_HOME, ~/Library/Caches (macOS) or ~/.cache.

    It may not exist yet.
    """
    own = os.environ.get("FLASHMOE_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    everyone = os.environ.get("XDG_CACHE_HOME")
    if everyone and Path(everyone).is_absolute():  # a relative one is to be ignored
        return Path(everyone) / "flashmoe_lab"
    home = Path("~").expanduser()
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "flashmoe_lab"


def make_directory(directory: Path) -> Path:
    """Create a directory of the cache, or say how to have the cache elsewhere."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError("no right to write there")
    except OSError as error:
        raise OSError(
            f"{directory}: cannot be used as a cache ({error.strerror or error}); "
            "FLASHMOE_CACHE names another place"
        ) from None
    return directory


@contextmanager
def locked(file: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock among processes meanwhile; it ends with the process, however that ends.

    Args:
        file: what the lock hangs on; it is made, and stays.
        waiting: called once, if somebody else holds it.
    """
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
