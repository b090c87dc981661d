"""What a reader writes through `buffers` is what MLX sees in the components, without a copy."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_lab import ModelConfig, Quantization, geometries
from flashmoe_lab.checkpoint.layer_file import BlockLayout
from flashmoe_lab.storage.free_memory import available_memory_nbytes
from flashmoe_lab.storage.reader import BlockRead
from flashmoe_lab.storage.slot_pool import SlotPool
from flashmoe_lab.storage.ways import PreadReader

LAYOUTS = {
    "F32": (None, "F32"),
    "F16": (None, "F16"),
    "BF16": (None, "BF16"),
    "4 bits, F32": (Quantization(bits=4, group_size=32), "F32"),
    "4 bits, F16": (Quantization(bits=4), "F16"),
    "4 bits, BF16": (Quantization(bits=4), "BF16"),
    "3 bits, BF16": (Quantization(bits=3), "BF16"),
}
STORED = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32}
on_forms = pytest.mark.parametrize("form", ["block", "stacked"])


@pytest.fixture(params=LAYOUTS)
def layout(request, config):
    return BlockLayout.of(config, *LAYOUTS[request.param])


def random_block(layout, seed):
    """A block without NaN in any type, so that equality is equality of bits."""
    block = np.zeros(layout.block_nbytes, np.uint8)
    payload = np.random.default_rng(seed).integers(0, 60, layout.payload_nbytes, np.uint8)
    block[: layout.payload_nbytes] = payload
    return block


def write(pool, slot, block):
    start = 0
    for buffer in pool.buffers(slot):
        buffer[:] = memoryview(block[start : start + len(buffer)])
        start += len(buffer)
    assert start == pool.layout.block_nbytes


def stored(array):
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


@on_forms
def test_components_show_what_is_written(layout, form):
    pool = SlotPool(layout, 5, form)
    blocks = {slot: random_block(layout, slot) for slot in (4, 0, 2)}
    for slot, block in blocks.items():
        write(pool, slot, block)
    for slot, block in blocks.items():
        parts = layout.split(block)
        for component in layout.components:
            array = pool.components[component.name]
            assert array.shape == (5, *component.shape)
            projection, part = component.name.split(".")
            found = stored(mx.contiguous(array[slot]))
            assert found.dtype == STORED[component.dtype]
            np.testing.assert_array_equal(found, parts[projection][part].data)
        np.testing.assert_array_equal(pool.block(slot), block)


@on_forms
def test_components_show_what_is_written_later(layout, form):
    """An array that was used already is no copy of what was there then."""
    pool, name = SlotPool(layout, 2, form), layout.components[0].name
    before = stored(mx.contiguous(pool.components[name][1]))
    block = random_block(layout, 1)
    write(pool, 1, block)
    after = stored(mx.contiguous(pool.components[name][1]))
    assert not before.any()
    np.testing.assert_array_equal(after, layout.split(block)["gate_proj"]["weight"].data)


@on_forms
def test_slots_do_not_overlap(layout, form):
    pool = SlotPool(layout, 3, form)
    write(pool, 0, random_block(layout, 0))
    write(pool, 2, random_block(layout, 2))
    assert not pool.block(1).any()
    write(pool, 1, np.full(layout.block_nbytes, 255, np.uint8))
    for slot in (0, 2):
        np.testing.assert_array_equal(pool.block(slot), random_block(layout, slot))


@on_forms
def test_block_is_a_copy_with_clean_padding(layout, form):
    pool = SlotPool(layout, 1, form)
    payload = random_block(layout, 0)[: layout.payload_nbytes]
    noisy = np.full(layout.block_nbytes, 255, np.uint8)
    noisy[: len(payload)] = payload
    write(pool, 0, noisy)
    found = pool.block(0)
    np.testing.assert_array_equal(found[: len(payload)], payload)
    found[:] = 0
    np.testing.assert_array_equal(pool.block(0)[: len(payload)], payload)


@on_forms
def test_a_read_lands_there(layout, form, tmp_path: Path):
    block = random_block(layout, 7)
    (tmp_path / "file").write_bytes(b"head" + block.tobytes())
    pool = SlotPool(layout, 2, form)
    with PreadReader({0: tmp_path / "file"}, threads=2, split=2) as reader:
        reader.read([BlockRead(layer=0, expert=0, offset=4, buffers=pool.buffers(1))])
    np.testing.assert_array_equal(pool.block(1), block)


@on_forms
def test_sizes(layout, form):
    pool = SlotPool(layout, 3, form)
    assert pool.nbytes == 3 * layout.block_nbytes
    assert sum(map(len, pool.buffers(0))) == layout.block_nbytes
    assert set(pool.components) == {component.name for component in layout.components}


def test_blocks_begin_on_pages(layout):
    pool = SlotPool(layout, 3, "block")
    for slot in range(3):
        (buffer,) = pool.buffers(slot)
        assert np.frombuffer(buffer, np.uint8).ctypes.data % 4096 == 0


def test_more_elements_than_32_bits_count():
    if (available_memory_nbytes() or 0) < 7e9:
        pytest.skip("needs 7 GB of free memory")
    config = ModelConfig.from_dict(geometries()["397b"])
    layout = BlockLayout.of(config, Quantization(bits=4), "BF16")
    slots = 2**32 // layout.block_nbytes + 2  # more than 2**31 values of 16 bits
    pool = SlotPool(layout, slots, "block")
    scales = next(c for c in layout.components if c.name == "down_proj.scales")
    (buffer,) = pool.buffers(slots - 1)
    buffer[scales.offset : scales.offset + 2] = b"\x80\x3f"  # 1.0
    assert pool.components["down_proj.scales"][slots - 1, 0, 0].item() == 1.0


@pytest.mark.parametrize(
    ("slots", "form", "message"),
    [
        (0, "block", "slots is 0; it must be at least 1"),
        (1, "list", "form is 'list'; it must be 'block' or 'stacked'"),
    ],
)
def test_wrong_arguments(config, slots, form, message):
    with pytest.raises(ValueError, match=message):
        SlotPool(BlockLayout.of(config, None, "F32"), slots, form)
