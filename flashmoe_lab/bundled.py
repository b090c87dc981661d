"""Where the data that comes with the package lies: inside it when installed, in `data/` in a
clone."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def bundled(name: str) -> Path:
    """The place of a file or directory of the bundled data; it may be missing.

    In a clone `data/` counts, even where a wheel was built in place.
    """
    clone = _PACKAGE.parent
    if (clone / "pyproject.toml").exists() and (clone / "data").is_dir():
        return clone / "data" / name
    return _PACKAGE / "data" / name
