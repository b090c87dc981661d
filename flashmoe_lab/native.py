"""The C++ kernels of `flashmoe_lab._native`, as stages call them: MLX arrays in and out.

The package runs without them, on MLX's operations, and says once that it is slower. Nothing here
chooses between implementations (kernels.py does) or knows a stage's mathematics (kernels/cpu does).

An evaluated array's memory is read where it lies, through the buffer protocol. What is made of
weights holds an alias of them: `weight *= 2` gives the caller's object other memory, and what is
kept must then neither read memory that was freed nor go on with the old numbers (see Kept). Nothing
of a call's arguments outlives the call.
"""

import ctypes
import operator
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.config import Quantization


class _Missing:
    """Stands for the extension module where it is not to be had."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"flashmoe_lab._native {self._why}")


missing: str | None = None  # why the native kernels are not there; None where they are
try:
    import flashmoe_lab._native as _native
except ImportError as error:
    absent = isinstance(error, ModuleNotFoundError) and error.name == "flashmoe_lab._native"
    missing = "was not built here" if absent else f"does not load: {error}"
    _native: Any = _Missing(missing)

available: bool = missing is None
_KINDS = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}


def isas() -> list[str]:
    """The instruction sets that this machine has kernels for, the best first; none without the
    native kernels."""
    return _native.isas() if available else []


def isa() -> str | None:
    """The instruction set in use."""
    return _native.isa() if available else None


def set_isa(name: str) -> None:
    """Use another instruction set; FLASHMOE_ISA says it from the start.

    Raises:
        ValueError: this machine does not have it.
        RuntimeError: there are no native kernels; so too from all that follows here.
    """
    _native.set_isa(name)


def threads() -> int:
    """Threads that work on one operation; by default one for each processor of this process."""
    return _native.threads() if available else 1


def set_threads(count: int) -> None:
    """Set that number; results do not depend on it."""
    _native.set_threads(count)


def set_integer(on: bool) -> None:
    """Whether wide quantised matrices take 16-bit activations (see kernels.use)."""
    _native.set_integer(on)


def read(array: np.ndarray) -> int:
    """Read memory with all threads and give the xor of its words: what a kernel is measured
    against."""
    return _native.read(array)


def floats(x: mx.array) -> np.ndarray:
    """The numbers of a float32 array, evaluated and packed, without a copy where they are so."""
    return np.ascontiguousarray(np.asarray(x))


def exactly(kind: type, *parts: Any) -> bool:
    """Whether all are of this very class, so that its kernel does what calling them would."""
    for part in parts:  # noqa: SIM110  (asked for every layer and token)
        if type(part) is not kind:
            return False
    return True


def alias(array: mx.array) -> mx.array:
    """Another object of the same numbers, which no `*=` or `[0] = ` on the first one changes."""
    return array[:]


_ARRAY_AT = object.__basicsize__ + 8  # of an mx.array, where nanobind's header of it ends


def _where(array: mx.array) -> ctypes.c_size_t:
    """The word by which an array's object says where its numbers are. MLX has no cheaper answer:
    a buffer takes ten times as long, and a layer has some forty arrays to ask."""
    return ctypes.c_size_t.from_address(id(array) + _ARRAY_AT)


def _where_is_right() -> bool:
    """Whether this MLX's arrays are as `_where` takes them to be."""
    if mx.array.__basicsize__ < _ARRAY_AT + 8:
        return False
    array = mx.zeros(1)
    other = alias(array)
    before = _where(array).value
    array += 1
    return _where(other).value == before != _where(array).value


_WHERE_IS_RIGHT = _where_is_right()


class Places:
    """Where the numbers of some arrays were, to be asked whether they still are there. The arrays
    must live as long, and an alias of each, so that no other can come to the same place."""

    __slots__ = ("_words",)

    def __init__(self, parts: tuple[Any, ...]) -> None:
        words = [_where(part) for part in parts if isinstance(part, mx.array)]
        self._words = [(word, word.value if _WHERE_IS_RIGHT else -1) for word in words]

    def same(self) -> bool:
        """Whether no array was written in place; where that cannot be known, False."""
        for word, before in self._words:  # noqa: SIM110  (asked some ten times a layer and token)
            if word.value != before:
                return False
        return True


class Kept:
    """Something made of arrays and plain values, made again only when one of them is another than
    before or an array was written in place."""

    __slots__ = ("_parts", "_places", "_aliases", "_made")

    def __init__(self) -> None:
        self._parts: tuple[Any, ...] | None = None
        self._places = Places(())
        self._aliases: list[mx.array] = []
        self._made: Any = None

    def get(self, parts: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gave for these very parts."""
        if (
            self._parts is None
            or not all(map(operator.is_, self._parts, parts))
            or not self._places.same()
        ):
            self._parts = None  # `make` may fail
            self._places = Places(parts)
            self._aliases = [alias(part) for part in parts if isinstance(part, mx.array)]
            self._made = make()
            self._parts = parts
        return self._made


def matrix(
    weight: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    quantization: Quantization | None,
    stacked: bool = False,
) -> Any:
    """A weight matrix [out, in], or with `stacked` many of them, as the kernels take it."""
    kind = _KINDS[weight.dtype if scales is None else scales.dtype]
    bits, group = (0, 0) if quantization is None else (quantization.bits, quantization.group_size)
    return raw_matrix(_own(weight), _own(scales), _own(biases), bits, group, kind, stacked)


def raw_matrix(
    weight: Any,
    scales: Any,
    biases: Any,
    bits: int,
    group_size: int,
    kind: str,
    stacked: bool = False,
) -> Any:
    """The same of any arrays with a buffer; `kind` is the type of scales, or of numbers where bits
    is 0."""
    return _native.Matrix(weight, scales, biases, bits, group_size, kind, stacked)


def product(weight: Any, x: mx.array) -> mx.array:
    """x [T, in] -> [T, out] float32."""
    rows = floats(x)
    out = np.empty((len(rows), weight.rows), np.float32)
    weight.product(rows, len(rows), out)
    return mx.array(out)


def dequantized_rows(weight: Any, index: mx.array) -> mx.array:
    """Rows of a matrix: [T] -> [T, in] float32."""
    wanted = np.asarray(index).tolist()
    out = np.empty((len(wanted), weight.columns), np.float32)
    weight.dequantize(wanted, out)
    return mx.array(out)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x [..., D] / rms(x) * weight, in float32."""
    rows = floats(x)
    out = np.empty_like(rows)
    _native.rms_norm(rows, weight, eps, out)
    return mx.array(out)


def route(
    logits: mx.array, num_experts_per_tok: int, norm_topk_prob: bool
) -> tuple[mx.array, mx.array]:
    """Experts int32 and weights float32, [T, K] each, of logits float32 [T, E]."""
    rows = floats(logits)
    experts = np.empty((len(rows), num_experts_per_tok), np.int32)
    weights = np.empty(experts.shape, np.float32)
    _native.route(rows, len(rows), num_experts_per_tok, norm_topk_prob, experts, weights)
    return mx.array(experts), mx.array(weights)


def expert_stacks(
    components: Mapping[str, mx.array], quantization: Quantization | None
) -> tuple[Any, ...]:
    """The matrices of many experts in their slots: gate, up, down."""
    return tuple(
        matrix(
            components[f"{projection}.weight"],
            components.get(f"{projection}.scales"),
            components.get(f"{projection}.biases"),
            quantization,
            stacked=True,
        )
        for projection in ("gate_proj", "up_proj", "down_proj")
    )


def expert_mlp(
    stacks: tuple[Any, ...], x: np.ndarray, tokens: np.ndarray, slots: np.ndarray
) -> np.ndarray:
    """`kernels.expert_mlp` on packed float32 rows: [P, hidden]."""
    gate, up, down = stacks
    out = np.empty((len(tokens), down.rows), np.float32)
    tokens, slots = (np.ascontiguousarray(part, np.int64) for part in (tokens, slots))
    _native.expert_mlp(gate, up, down, x, len(x), tokens, slots, out)
    return out


def weighted_sum(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """rows [T * K, hidden], weights [T, K] -> their sums [T, hidden], in the order of K."""
    tokens, k = weights.shape
    out = np.empty((tokens, rows.shape[-1]), np.float32)
    _native.weighted_sum(rows, weights, tokens, k, out)
    return out


def shared_expert(*matrices: Any) -> Any:
    """Of the matrices gate_proj, up_proj, down_proj and shared_expert_gate."""
    return _native.SharedExpert(*matrices)


def delta_net(*parts: Any) -> Any:
    """The mixer of a linear-attention layer; see `_native.pyi` for its parts."""
    return _native.DeltaNet(*map(_own, parts))


def attention(*parts: Any) -> Any:
    """The mixer of a full-attention layer; see `_native.pyi` for its parts."""
    return _native.Attention(*map(_own, parts))


def block(*parts: Any) -> Any:
    """A whole layer but its routed experts; see `_native.pyi` for its parts."""
    return _native.Block(*map(_own, parts))


def _own(part: Any) -> Any:
    return alias(part) if isinstance(part, mx.array) else part


def after(
    stacks: tuple[Any, ...],
    normed: np.ndarray,
    stream: np.ndarray,
    shared: np.ndarray,
    slots: np.ndarray,
    weights: np.ndarray,
    out: np.ndarray,
    moments: np.ndarray | None = None,
) -> None:
    """Write stream + experts(normed) + shared [T, hidden]; slots and weights [T, K]. `moments` are
    a TokenMemory's."""
    _native.after(*stacks, normed, stream, shared, slots, weights, out, moments)


def call(stage: Any, x: mx.array, *rest: Any) -> mx.array:
    """x [T, hidden] -> [T, hidden] through a native stage, which may change what is in `rest`."""
    rows = floats(x)
    out = np.empty_like(rows)
    stage(rows, len(rows), *rest, out)
    return mx.array(out)
