"""Safetensors files at the level of bytes: where a tensor lies, and reading a part of it.

Headers are parsed here rather than by a library because parts of a tensor are read and written by
position: one expert of a stack, some rows of an embedding. It holds no open files and maps nothing;
numbers in bfloat16 stay in their two bytes (NumPy has no such type) until somebody asks for
float32.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

# Storage types by safetensors name; BF16 is kept as its bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}
FLOATS = ("F32", "F16", "BF16")
_MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors format itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor in memory in its storage type; `data` has `DTYPES[dtype]`, so BF16 is uint16
    bits."""

    dtype: str
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.data.shape

    def float32(self) -> np.ndarray:
        """The values as float32, which is exact for all floating storage types."""
        if self.dtype == "BF16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        return self.data.astype(np.float32)

    def bytes_view(self) -> memoryview:
        """The raw little-endian bytes."""
        return memoryview(np.ascontiguousarray(self.data).reshape(-1).view(np.uint8))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """Where a tensor lies: `offset` counts bytes from the start of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return DTYPES[self.dtype].itemsize * prod(self.shape)

    def rows(self, start: int, stop: int) -> "TensorRef":
        """The part with first index start to stop - 1."""
        row = self.nbytes // self.shape[0]
        return TensorRef(
            name=self.name,
            file=self.file,
            dtype=self.dtype,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * row,
        )

    def __getitem__(self, index: int) -> "TensorRef":
        """The part with first index `index`, without that dimension."""
        part = self.rows(index, index + 1)
        return TensorRef(
            name=part.name,
            file=part.file,
            dtype=part.dtype,
            shape=part.shape[1:],
            offset=part.offset,
        )

    def head(self, nbytes: int) -> bytes:
        """The first `nbytes` bytes of the tensor, or all of it if it is smaller."""
        with self.file.open("rb", buffering=0) as stream:
            return os.pread(stream.fileno(), min(nbytes, self.nbytes), self.offset)

    def read(self) -> Tensor:
        """Read the tensor, or raise ValueError naming file and tensor if the file ends early."""
        buffer = np.empty(self.nbytes, np.uint8)
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            read_fully(descriptor, memoryview(buffer), self.offset, self.file, self.name)
        finally:
            os.close(descriptor)
        return Tensor(dtype=self.dtype, data=buffer.view(DTYPES[self.dtype]).reshape(self.shape))


def read_fully(descriptor: int, into: memoryview, offset: int, file: Path, what: str) -> None:
    """Fill `into` from `offset`; ValueError if the file ends before it is full."""
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            raise ValueError(
                f"{file}: {what} is cut off: wanted {len(into)} bytes at offset {offset}, "
                f"the file ends after {done} of them"
            )
        done += count


def read_header(file: Path) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Tensors of a safetensors file by name, and its metadata, without reading any data.

    Raises:
        ValueError: the header is not safetensors, or names bytes that the file does not have.
    """
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER_NBYTES):
            raise ValueError(
                f"{file}: not a safetensors file, or cut off: its header should be "
                f"{length} bytes, the file is {size}"
            )
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{file}: the safetensors header is damaged ({e!r})") from None
        try:
            metadata = header.pop("__metadata__", {})
            refs = {
                name: _ref(name, entry, file, 8 + length, size) for name, entry in header.items()
            }
        except (AttributeError, KeyError, TypeError) as e:
            raise ValueError(f"{file}: the safetensors header is damaged ({e!r})") from None
    return refs, metadata


def _ref(name: str, entry: Mapping[str, Any], file: Path, base: int, size: int) -> TensorRef:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    offsets = tuple(entry["data_offsets"])
    if len(offsets) != 2 or any(type(number) is not int for number in (*shape, *offsets)):
        raise TypeError(f"tensor {name}: shape and data_offsets must be whole numbers")
    begin, end = offsets
    if dtype not in DTYPES:
        raise ValueError(
            f"{file}: tensor {name} has type {dtype}; supported are {', '.join(DTYPES)}"
        )
    ref = TensorRef(name=name, file=file, dtype=dtype, shape=shape, offset=base + begin)
    if end - begin != ref.nbytes or begin < 0 or any(dim < 0 for dim in shape):
        raise ValueError(
            f"{file}: the header gives tensor {name} {end - begin} bytes; "
            f"{dtype} {list(shape)} needs {ref.nbytes}"
        )
    if base + end > size:
        raise ValueError(
            f"{file}: cut off: tensor {name} should end at byte {base + end}, the file has {size}"
        )
    return ref


def make_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    align: int = 8,
) -> tuple[bytes, dict[str, int]]:
    """A safetensors header for tensors laid one after another, and each one's offset in the file.

    Args:
        tensors: name -> (dtype, shape), in file order.
        metadata: text that goes along.
        align: the data begins at a multiple of this; the header is padded with spaces.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = DTYPES[dtype].itemsize * prod(shape)
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    base = 8 + len(text)
    offsets = {name: base + entries[name]["data_offsets"][0] for name in tensors}
    return len(text).to_bytes(8, "little") + text, offsets


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; OSError as the system gives it."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
