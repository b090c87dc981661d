"""`flashmoe-lab doctor`: does this machine do what the package relies on?

It checks the backend's arithmetic against the float64 references, that what a reader writes is what
a product sees, every reader, and the page cache. It measures no speed. Apple machines in
particular: the package was developed on Linux, so run this first there and report what fails.
"""

import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from flashmoe_lab import kernels, native
from flashmoe_lab.checkpoint.layer_file import BlockLayout
from flashmoe_lab.checkpoint.quantize import dequantize_reference, quantize
from flashmoe_lab.checkpoint.tensor_file import Tensor
from flashmoe_lab.config import ModelConfig, Quantization, geometries
from flashmoe_lab.storage import native_crew
from flashmoe_lab.storage.free_memory import available_memory_nbytes
from flashmoe_lab.storage.page_cache import evict, resident_bytes, warm
from flashmoe_lab.storage.reader import BlockRead
from flashmoe_lab.storage.slot_pool import SlotPool
from flashmoe_lab.storage.ways import READERS, open_reader
from flashmoe_lab.version import __version__
from flashmoe_lab.weights import activation_dtype

_FILE_NBYTES = 4 << 20
_TOKENS = 48
_TOLERANCE = {mx.float32: 2e-5, mx.bfloat16: 3e-2, mx.float16: 5e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check: `state` is "ok", "failed", "skipped" or, for a plain fact, "info"."""

    name: str
    state: str
    detail: str

    def line(self) -> str:
        """For the terminal."""
        return f"{self.state:<8}{self.name:<34}{self.detail}"


def examine(directory: Path) -> Iterator[Finding]:
    """Run every check, giving each finding as it is made; test files lie in `directory`
    meanwhile."""
    yield from _facts()
    for bits in Quantization.BITS:
        yield _checked(f"experts, {bits} bits", lambda bits=bits: _experts(bits))
    yield _checked("delta rule", _delta_rule)
    for form in ("block", "stacked"):
        yield _checked(f"bank memory, {form}", lambda form=form: _pool(form))
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        file = Path(folder) / "blocks"
        content = np.random.default_rng(0).integers(0, 256, _FILE_NBYTES, dtype=np.uint8)
        content.tofile(file)
        for name in READERS:
            yield _checked(f"reader {name}", lambda name=name: _reader(name, file, content))
        yield _checked("page cache", lambda: _page_cache(file))


def _facts() -> Iterator[Finding]:
    facts = {
        "flashmoe-lab": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "mlx": f"{version('mlx')} on {mx.default_device()}",
        "activations": str(activation_dtype(None)).removeprefix("mlx.core."),
    }
    facts["kernels"] = kernels.used() if mx.default_device() == mx.cpu else "MLX's"
    facts["reading threads"] = (
        "of C++"
        if native_crew.is_built()
        else f"of Python, slower with small blocks: flashmoe_lab._native {native.missing}"
    )
    memory = available_memory_nbytes()
    facts["memory free"] = "unknown" if memory is None else f"{memory / 1e9:.1f} GB"
    for name, value in facts.items():
        yield Finding(name=name, state="info", detail=value)


def _checked(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name=name, state="ok", detail=check())
    except NotImplementedError as error:
        return Finding(name=name, state="skipped", detail=str(error))
    except Exception as error:  # a doctor reports every failure and goes on
        return Finding(name=name, state="failed", detail=f"{type(error).__name__}: {error}")


def _experts(bits: int) -> str:
    rng, quantization = np.random.default_rng(bits), Quantization(bits=bits)
    dtype, hidden, width, slots = activation_dtype(None), 128, 64, 5
    inner, outer = (width, hidden), (hidden, width)
    shapes = {"gate_proj": inner, "up_proj": inner, "down_proj": outer}
    components: dict[str, list[mx.array]] = {}
    matrices: list[dict[str, np.ndarray]] = [{} for _ in range(slots)]
    for slot in range(slots):
        for name, shape in shapes.items():
            weight = rng.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[1])
            parts = quantize(Tensor(dtype="F32", data=weight.astype(np.float32)), quantization)
            arrays = [mx.array(parts["weight"].data)]
            arrays += [mx.array(parts[p].data).astype(dtype) for p in ("scales", "biases")]
            for part, array in zip(("weight", "scales", "biases"), arrays, strict=True):
                components.setdefault(f"{name}.{part}", []).append(array)
            scales, biases = (np.array(a.astype(mx.float32), np.float64) for a in arrays[1:])
            words = parts["weight"].data
            matrices[slot][name] = dequantize_reference(words, scales, biases, quantization)
    stacked = {name: mx.stack(arrays) for name, arrays in components.items()}
    # As in a prompt: enough pairs for the backend's matrix path, some slots without any.
    x = mx.array(rng.standard_normal((_TOKENS, hidden)).astype(np.float32)).astype(dtype)
    tokens = rng.permutation(np.repeat(np.arange(_TOKENS), 2))
    chosen = np.sort(rng.choice([0, 1, 4], 2 * _TOKENS))
    weights = kernels.ExpertWeights(components=stacked, quantization=quantization)
    out = np.array(kernels.expert_mlp(x, tokens, chosen, weights).astype(mx.float32))
    x64 = np.array(x.astype(mx.float32), np.float64)
    right = [
        kernels.expert_mlp_reference(x64[t : t + 1], matrices[s])[0]
        for t, s in zip(tokens, chosen, strict=True)
    ]
    return _close(out, np.array(right), dtype)


def _delta_rule() -> str:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((9, 4, 32)) / 6 for _ in range(2))
    v, state = rng.standard_normal((9, 4, 16)), rng.standard_normal((4, 16, 32))
    decay, beta = rng.uniform(0, 1, (9, 4)), rng.uniform(0, 1, (9, 4))
    right, right_after = kernels.delta_rule_reference(q, k, v, decay, beta, state)
    q, k, v, decay, beta, state = (
        mx.array(array.astype(np.float32)) for array in (q, k, v, decay, beta, state)
    )
    out, after = kernels.delta_rule(q, k, v, decay, beta, state)
    _close(np.array(after), right_after, mx.float32)
    return _close(np.array(out), right, mx.float32)


def _pool(form: str) -> str:
    config = ModelConfig.from_dict(geometries()["35b"])
    pool = SlotPool(BlockLayout.of(config, Quantization(bits=4), "BF16"), 2, form)
    block = np.random.default_rng(1).integers(0, 256, pool.layout.block_nbytes, dtype=np.uint8)
    for _ in range(2):  # the second time after the backend has used the memory
        position = 0
        for buffer in pool.buffers(1):
            buffer[:] = block[position : position + len(buffer)]
            position += len(buffer)
        for component in pool.layout.components:
            seen = pool.components[component.name][1]
            kind = {4: mx.uint32, 2: mx.uint16}[seen.itemsize]
            found = np.array(mx.contiguous(seen.view(kind) + 0)).view(np.uint8).ravel()
            wanted = block[component.offset : component.offset + component.nbytes]
            if not np.array_equal(found, wanted):
                raise ValueError(f"MLX does not see what was written to {component.name}")
        block = ~block
    return f"{pool.nbytes / 1e6:.1f} MB written and seen"


def _reader(name: str, file: Path, content: np.ndarray) -> str:
    into, size = np.zeros(content.size, np.uint8), 1 << 18
    parts = [memoryview(into)[i : i + size] for i in range(0, content.size, size)]
    reads = [
        BlockRead(layer=0, expert=i, offset=i * size, buffers=(part,))
        for i, part in enumerate(parts)
    ]
    with open_reader(name, {0: file}, threads=4, split=2) as reader:
        reader.read(reads)
    if not np.array_equal(into, content):
        raise ValueError("what it read is not what the file holds")
    return f"{content.size / 1e6:.1f} MB read right"


def _page_cache(file: Path) -> str:
    held = warm(file)
    left = evict(file)
    if held < _FILE_NBYTES or left or resident_bytes(file):
        raise ValueError(
            f"{held} of {_FILE_NBYTES} bytes were held after reading, {left} after eviction: "
            "cold runs cannot be measured here"
        )
    return "fills and empties when asked"


def _close(out: np.ndarray, right: np.ndarray, dtype: mx.Dtype) -> str:
    error = float(np.linalg.norm(out - right) / np.linalg.norm(right))
    if not error <= _TOLERANCE[dtype]:
        raise ValueError(f"relative error {error:.1e}, allowed is {_TOLERANCE[dtype]:.0e}")
    return f"relative error {error:.1e}"
