# The extension module that kernels/cpu builds. Arrays are anything with a buffer; those named
# `out`, `conv`, `recurrent`, `keys` and `values` are written.
from typing import Any

def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def available_threads() -> int: ...
def scratch_nbytes() -> int: ...  # working memory that the calling thread holds
def integer() -> bool: ...
def set_integer(on: bool) -> None: ...
def read(array: Any, /) -> int: ...

class Matrix:
    def __init__(
        self,
        weight: Any,
        scales: Any | None,
        biases: Any | None,
        bits: int,
        group_size: int,
        kind: str,
        stacked: bool = False,
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    def product(self, x: Any, tokens: int, out: Any, /) -> None: ...
    def dequantize(self, rows: list[int], out: Any, /) -> None: ...

class SharedExpert:
    def __init__(self, gate: Matrix, up: Matrix, down: Matrix, scalar_gate: Matrix, /) -> None: ...
    def __call__(self, x: Any, tokens: int, out: Any, /) -> None: ...

class DeltaNet:
    def __init__(
        self,
        qkv: Matrix,
        z: Matrix,
        b: Matrix,
        a: Matrix,
        out: Matrix,
        conv1d: Any,  # [kernel, channels]
        A_log: Any,
        dt_bias: Any,
        norm: Any,
        eps: float,
        kernel: int,
        k_heads: int,
        k_dim: int,
        v_heads: int,
        v_dim: int,
        /,
    ) -> None: ...
    def __call__(self, x: Any, tokens: int, conv: Any, recurrent: Any, out: Any, /) -> None: ...

class Attention:
    def __init__(
        self,
        q: Matrix,
        k: Matrix,
        v: Matrix,
        out: Matrix,
        q_norm: Any,
        k_norm: Any,
        eps: float,
        rope_theta: float,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        /,
    ) -> None: ...
    def __call__(
        self, x: Any, tokens: int, position: int, keys: Any, values: Any, out: Any, /
    ) -> None: ...

class Block:
    def __init__(
        self,
        input_norm: Any,
        input_eps: float,
        mixer: DeltaNet | Attention,
        post_norm: Any,
        post_eps: float,
        router: Matrix,
        normalise: bool,
        shared: SharedExpert,
        /,
    ) -> None: ...
    def before(
        self,
        x: Any,
        tokens: int,
        k: int,
        position: int,
        first: Any,  # conv or keys
        second: Any,  # recurrent or values
        stream: Any,
        normed: Any,
        shared: Any,
        logits: Any,
        experts: Any,
        weights: Any,
        moments: Any = None,
        /,
    ) -> None: ...

def after(
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    normed: Any,
    stream: Any,
    shared: Any,
    slots: Any,
    weights: Any,
    out: Any,
    moments: Any = None,
    /,
) -> None: ...
def rms_norm(x: Any, weight: Any, eps: float, out: Any, /) -> None: ...
def route(
    logits: Any, tokens: int, k: int, normalise: bool, experts: Any, weights: Any, /
) -> None: ...
def expert_mlp(
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    x: Any,
    count: int,
    tokens: Any,
    slots: Any,
    out: Any,
    /,
) -> None: ...
def weighted_sum(y: Any, weights: Any, count: int, k: int, out: Any, /) -> None: ...
