"""Writing the resident tensors: standard safetensors files, streamed row slice by row slice.

A file appears only when it is whole. Unlike a layer of experts, a file that was cut off is written
again from its start: it is at most 5 GB.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import xxhash

from flashmoe_lab.checkpoint.layer_file import PARTIAL, Progress
from flashmoe_lab.checkpoint.tensor_file import (
    DTYPES,
    Tensor,
    make_header,
    read_header,
    write_at,
)

MAX_FILE_NBYTES = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentTensor:
    """One tensor to write, with the parts it is stored as.

    Attributes:
        name: canonical name, ending in ".weight" where it is a matrix.
        parts: part ("weight", "scales", "biases", or "" for a tensor without parts) -> (dtype,
            shape).
        slices: gives the tensor's parts slice by slice, rows in order.
    """

    name: str
    parts: Mapping[str, tuple[str, tuple[int, ...]]]
    slices: Callable[[], Iterable[Mapping[str, Tensor]]]

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Full name -> (dtype, shape) of everything stored."""
        base = self.name.removesuffix(".weight")
        if set(self.parts) == {"weight"}:
            return {self.name: self.parts["weight"]}
        return {f"{base}.{part}": entry for part, entry in self.parts.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(DTYPES[dtype].itemsize * prod(shape) for dtype, shape in self.parts.values())


def split_files(
    tensors: Sequence[ResidentTensor], max_nbytes: int = MAX_FILE_NBYTES
) -> dict[str, list[ResidentTensor]]:
    """Tensors by file name, none over `max_nbytes` unless one tensor alone is."""
    groups: list[list[ResidentTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_nbytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {"resident.safetensors": groups[0]}
    count = len(groups)
    return {
        f"resident-{i + 1:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups)
    }


def write_resident(
    file: Path, tensors: Sequence[ResidentTensor], progress: Progress
) -> dict[str, str]:
    """Write one file unless it is there, and return each stored tensor's xxh3-64 in hexadecimal."""
    if not file.exists():
        write_tensors(file, tensors, progress)
    else:
        progress(sum(tensor.nbytes for tensor in tensors))
    return {
        name: f"{xxhash.xxh3_64_intdigest(ref.read().bytes_view()):016x}"
        for name, ref in read_header(file)[0].items()
    }


def write_tensors(file: Path, tensors: Sequence[ResidentTensor], progress: Progress) -> None:
    """Write a safetensors file slice by slice; it appears only when it is whole."""
    stored = {name: entry for tensor in tensors for name, entry in tensor.stored().items()}
    header, offsets = make_header(stored, {"format": "mlx"})
    partial = file.with_name(file.name + PARTIAL)
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_at(descriptor, memoryview(header), 0)
        for tensor in tensors:
            names = dict(zip(tensor.parts, tensor.stored(), strict=True))
            positions = {part: offsets[name] for part, name in names.items()}
            for parts in tensor.slices():
                for part, value in parts.items():
                    data = value.bytes_view()
                    write_at(descriptor, data, positions[part])
                    positions[part] += len(data)
                    progress(len(data))
            _check_complete(file, tensor, names, positions, offsets)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.rename(file)


def _check_complete(
    file: Path,
    tensor: ResidentTensor,
    names: Mapping[str, str],
    positions: Mapping[str, int],
    offsets: Mapping[str, int],
) -> None:
    for part, (dtype, shape) in tensor.parts.items():
        wanted = DTYPES[dtype].itemsize * prod(shape)
        written = positions[part] - offsets[names[part]]
        if written != wanted:
            raise ValueError(f"{file}: {names[part]}: wrote {written} bytes of {wanted}")
