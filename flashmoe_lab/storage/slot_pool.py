"""Memory for experts: fixed slots of one block each, seen by MLX as stacked tensors.

Two forms, chosen by the backend:
* `block` (CPU): one stretch of memory, a block a slot at the start of a page, so that a read,
  direct I/O too, lands where the product reads it. Huge pages are asked for. MLX sees strided
  views; native kernels need only `address`, `stride_nbytes` and the layout's offsets.
* `stacked` (GPU): one contiguous MLX array per component, because GPU kernels index experts as
  packed stacks (CUDA's refuse other strides, Metal's would copy the bank). A read scatters over the
  nine arrays.

A pool knows slots, not experts: which expert lies in which slot is the bank's business.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from flashmoe_lab.checkpoint.layer_file import BlockLayout
from flashmoe_lab.storage.huge_pages import touch_in_huge_pages

_PAGE = 4096  # what direct reads ask of an address
_TYPES = {
    "F32": (mx.uint32, mx.float32),
    "F16": (mx.uint16, mx.float16),
    "BF16": (mx.uint16, mx.bfloat16),
    "U32": (mx.uint32, mx.uint32),
}


class SlotPool:
    """`slots` slots for blocks of one layout.

    Attributes:
        layout: what a block holds.
        form: "block" or "stacked".
        components: component name -> MLX array [slots, *component shape] that sees what is read.
        address, stride_nbytes: of form "block": slot s lies at address + s * stride_nbytes.
        part_nbytes: uint64 [parts]: lengths of what `addresses` gives.
    """

    address: int
    stride_nbytes: int

    def __init__(self, layout: BlockLayout, slots: int, form: str) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}; it must be at least 1")
        if form not in ("block", "stacked"):
            raise ValueError(f"form is {form!r}; it must be 'block' or 'stacked'")
        self.layout, self.slots, self.form = layout, slots, form
        self.components: dict[str, mx.array] = {}
        self._padding = np.empty(layout.block_nbytes - layout.payload_nbytes, np.uint8)
        self._memory: list[mx.array] = []
        self._views: list[np.ndarray] = []  # uint8 [slots, nbytes], in block order
        if form == "block":
            self._allocate_block()
        else:
            self._allocate_stacked()
        mx.eval(self.components)
        self._set_addresses()

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.layout.block_nbytes

    def buffers(self, slot: int) -> tuple[memoryview, ...]:
        """Writable memory of a slot, in block order; together `layout.block_nbytes` long."""
        parts = [memoryview(view[slot]) for view in self._views]
        if self.form == "stacked" and len(self._padding):
            parts.append(memoryview(self._padding))
        return tuple(parts)

    def addresses(self, slots: Sequence[int]) -> np.ndarray:
        """Where the memory of `buffers` begins, for many slots at once: uint64 [slots, parts]."""
        return self._starts + np.asarray(slots, np.uint64)[:, None] * self._strides

    def block(self, slot: int) -> np.ndarray:
        """A copy of a slot's block, uint8 [block_nbytes]; padding is zero."""
        block = np.zeros(self.layout.block_nbytes, np.uint8)
        content = np.concatenate([view[slot] for view in self._views])
        block[: len(content)] = content
        return block

    def _allocate_block(self) -> None:
        # A row is a block and a page more, so that the block can begin where a page does. Views are
        # made of slices, never of the flattened memory: MLX counts elements of an axis in 32 bits.
        nbytes, row = self.layout.block_nbytes, self.layout.block_nbytes + _PAGE
        memory = mx.zeros((self.slots, row // 4), dtype=mx.uint32)
        mx.eval(memory)
        raw = _host_bytes(memory)
        shift = -raw.ctypes.data % _PAGE
        if shift % 4:
            raise MemoryError("MLX gave memory that is not aligned to 4 bytes")
        if mx.default_device() == mx.cpu:  # a GPU's memory is not malloc's
            touch_in_huge_pages(raw)
        self._memory = [memory]
        self.address, self.stride_nbytes = raw.ctypes.data + shift, row
        self._views = [raw.reshape(self.slots, row)[:, shift : shift + nbytes]]
        for component in self.layout.components:
            item = 4 if component.dtype in ("U32", "F32") else 2
            start = (shift + component.offset) // item
            columns = memory.view(_TYPES[component.dtype][1])[
                :, start : start + component.nbytes // item
            ]
            self.components[component.name] = columns.reshape(self.slots, *component.shape)

    def _allocate_stacked(self) -> None:
        for component in self.layout.components:
            storage, kind = _TYPES[component.dtype]
            memory = mx.zeros((self.slots, *component.shape), dtype=storage)
            mx.eval(memory)
            self._memory.append(memory)
            raw = _host_bytes(memory)
            self._views.append(raw.reshape(self.slots, component.nbytes))
            self.components[component.name] = memory if kind is storage else memory.view(kind)

    def _set_addresses(self) -> None:
        parts = [(view.ctypes.data, view.strides[0], view.shape[1]) for view in self._views]
        if self.form == "stacked" and len(self._padding):
            parts.append((self._padding.ctypes.data, 0, len(self._padding)))
        self._starts, self._strides, self.part_nbytes = np.array(parts, np.uint64).T.copy()


def _host_bytes(array: mx.array) -> np.ndarray:
    """The memory of an evaluated array as writable uint8, without a copy."""
    view = memoryview(array)  # pyright: ignore[reportArgumentType]  # MLX's stubs name no buffer
    return np.frombuffer(view.cast("B"), np.uint8)
