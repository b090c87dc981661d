"""The name `demo`: the bundled model, wherever a path of a model is expected.

It comes as a published checkpoint and is packed to the user's cache when it is first asked for, at
the bits asked for. The text `demo` always means it; a directory of that name is `./demo`.
"""

import sys
import warnings
from functools import partial
from pathlib import Path

from flashmoe_lab.bundled import bundled
from flashmoe_lab.checkpoint.pack import PackSettings
from flashmoe_lab.checkpoint.pack_cache import packed_copy
from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.checkpoint.source import Source
from flashmoe_lab.config import Quantization
from flashmoe_lab.progress import ProgressLine

NAME = "demo"
DEFAULT_BITS = 4
Bits = int | str  # 2, 3, 4, 5, 6 or 8 for the experts, or "none": as published


def is_demo(model: str | Path) -> bool:
    """Whether this names the bundled model; a Path never does."""
    return model == NAME


def demo_directory() -> Path:
    """The bundled published checkpoint.

    Raises:
        FileNotFoundError: this copy of the package came without the weights.
    """
    directory = bundled("demo_model")
    if not (directory / "model.safetensors.index.json").exists():
        raise FileNotFoundError(
            f"{directory}: the weights of the demo model are not in this copy of flashmoe-lab; "
            "install a wheel of it, or clone the repository whole"
        )
    if Path(NAME).is_dir():
        warnings.warn(
            f"{NAME} is the bundled model; the directory of that name is ./{NAME}", stacklevel=3
        )
    return directory


def open_checkpoint(
    model: str | Path, bits: Bits | None = None, quiet: bool = False
) -> PackedCheckpoint:
    """A packed checkpoint by its directory, or the demo model's.

    Args:
        bits: of the demo model's experts; None is 4. What stays in memory gets at least 4 bits, the
            gates 8; "none" keeps everything as published.
        quiet: no progress on standard error.

    Raises:
        FileNotFoundError, ValueError: what is wrong, naming the file and value.
        OSError: the cache cannot be written.
    """
    if is_demo(model):
        bits = DEFAULT_BITS if bits is None else bits
        return packed_at(Source(demo_directory()), NAME, bits, quiet)
    if bits is not None:
        raise ValueError(
            f"bits is {bits}: only {NAME} is packed as it is opened; {model} keeps the bits that "
            "it was packed with"
        )
    return PackedCheckpoint(model)


def packed_at(source: Source, name: str, bits: Bits, quiet: bool = False) -> PackedCheckpoint:
    """The packed form of a published checkpoint at some bits, from the user's cache."""
    if bits != "none" and bits not in Quantization.BITS:
        allowed = ", ".join(map(str, Quantization.BITS))
        raise ValueError(f'bits is {bits!r}; allowed are {allowed} and "none"')
    settings = PackSettings.of(None if bits == "none" else int(bits))
    label = "as-published" if bits == "none" else f"{bits}bit"
    return packed_copy(
        source,
        f"{name}-{label}",
        settings,
        partial(ProgressLine, f"pack {name}, {label}", quiet=quiet),
        lambda: print(f"waiting: another process packs {name}", file=sys.stderr),
    )
