"""What the native module must survive or refuse: no rows, shapes that do not fit, errors amid the
work, settings changed under a call, a fork."""

import os
import subprocess
import sys
import textwrap
import threading
from typing import Any

import numpy as np
import pytest

from flashmoe_lab import native

if not native.available:
    pytest.skip("the native kernels were not built", allow_module_level=True)
raw: Any = native._native

PRELUDE = """
import sys
import numpy as np
from flashmoe_lab import _native as raw

def matrix(rows, columns, slots=0):
    shape = (slots, rows, columns) if slots else (rows, columns)
    return raw.Matrix(np.ones(shape, np.float32), None, None, 0, 0, "float32", bool(slots))

def zeros(*shape):
    return np.zeros(shape, np.float32)

def refused(message, call, *arguments):
    try:
        call(*arguments)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")
"""


def run(code, **environment):
    """Run code in a process of its own, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def plain(rows, columns):
    return raw.Matrix(np.ones((rows, columns), np.float32), None, None, 0, 0, "float32")


def test_no_rows_give_no_rows():
    run("""
    none = zeros(0, 8)
    matrix(4, 8).product(none, 0, zeros(0, 4))
    raw.SharedExpert(matrix(4, 8), matrix(4, 8), matrix(8, 4), matrix(1, 8))(none, 0, none)
    raw.route(zeros(0, 4), 0, 2, True, np.zeros((0, 2), np.int32), zeros(0, 2))
    stacks = matrix(4, 8, 2), matrix(4, 8, 2), matrix(8, 4, 2)
    number = np.zeros(0, np.int64)
    raw.expert_mlp(*stacks, none, 0, number, number, none)
    raw.after(*stacks, none, none, none, number.reshape(0, 2), zeros(0, 2), none)
    heads = zeros(2, 16), zeros(1), zeros(1), zeros(4), 1e-6, 2, 1, 6, 1, 4
    projections = matrix(16, 8), matrix(4, 8), matrix(1, 8), matrix(1, 8), matrix(8, 4)
    mixer = raw.DeltaNet(*projections, *heads)
    conv, recurrent = np.ones((1, 16), np.float32), np.ones((1, 4, 6), np.float32)
    mixer(none, 0, conv, recurrent, none)
    assert (conv == 1).all() and (recurrent == 1).all()
    attention = raw.Attention(
        matrix(16, 8), matrix(4, 8), matrix(4, 8), matrix(8, 8), zeros(4), zeros(4), 1e-6, 1e4,
        2, 1, 4, 2)
    attention(none, 0, 3, zeros(1, 8, 4), zeros(1, 8, 4), none)
    """)


def test_a_matrix_without_columns_is_refused():
    run("""
    refused("must have columns", matrix, 4, 0)
    words = np.zeros((4, 0), np.uint32)
    refused("must have columns", raw.Matrix, words, zeros(4, 0), zeros(4, 0), 4, 32, "float32")
    refused("must have columns", raw.rms_norm, zeros(0), zeros(0), 1e-6, zeros(0))
    """)


@pytest.mark.parametrize("setting", ["isa", "integer"])
def test_settings_do_not_change_under_a_call(rng, setting):
    """Every result is that of one setting, whatever another thread does meanwhile."""
    isas = raw.isas()
    if setting == "isa" and len(isas) < 2:
        pytest.skip("this machine has one instruction set")
    rows, columns, tokens = 256, 2048, 64
    scales = (rng.normal(size=(rows, columns // 32)) / 500).astype(np.float32)
    words = rng.integers(0, 2**32, (rows, columns // 8), dtype=np.uint32)
    matrix = raw.Matrix(words, scales, -8 * scales, 4, 32, "float32")
    x = rng.normal(size=(tokens, columns)).astype(np.float32)

    def product():
        out = np.empty((tokens, rows), np.float32)
        matrix.product(x, tokens, out)
        return out

    isa, integer, stop = raw.isa(), raw.integer(), threading.Event()
    if setting == "isa":
        raw.set_integer(True)
        changes = [lambda name=name: raw.set_isa(name) for name in isas[:2]]
    else:
        changes = [lambda: raw.set_integer(False), lambda: raw.set_integer(True)]

    def change():
        while True:
            for one in changes:
                one()
                if stop.wait(0.0003):
                    return

    other = threading.Thread(target=change)
    try:
        right = set()
        for one in changes:
            one()
            right.add(product().tobytes())
        other.start()
        assert all(product().tobytes() in right for _ in range(1000))
    finally:
        stop.set()
        other.join()
        raw.set_isa(isa)
        raw.set_integer(integer)


def test_a_wrong_isa_in_the_environment_is_named():
    run(
        """
    refused("FLASHMOE_ISA is 'foo'; this machine has", raw.isa)
    raw.set_threads(2)
    refused("FLASHMOE_ISA is 'foo'; this machine has", raw.read, np.ones(1 << 20))
    """,
        FLASHMOE_ISA="foo",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_an_error_amid_parallel_work_reaches_the_caller():
    """Queries of 250,000 numbers want 32 MB in each thread and 42 before that; there are 60 MB."""
    run("""
    import resource
    raw.set_threads(2)
    dim = 250_000
    attention = raw.Attention(
        matrix(4 * dim, 1), matrix(2 * dim, 1), matrix(2 * dim, 1), matrix(1, 2 * dim), zeros(dim),
        zeros(dim), 1e-6, 1e4, 2, 2, dim, 0)
    x, out, keys, values = zeros(1, 1), zeros(1, 1), zeros(2, 4, dim), zeros(2, 4, dim)
    raw.read(np.ones(1 << 20))  # the threads are there
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000, resource.RLIM_INFINITY))
    try:
        attention(x, 1, 0, keys, values, out)
    except MemoryError:
        pass
    else:
        raise AssertionError("no error")
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    attention(x, 1, 0, keys, values, out)
    """)


def test_experts_of_other_forms_are_refused():
    run("""
    def coded(bits):
        scales = zeros(2, 4, 2)
        words = np.zeros((2, 4, 2 * bits), np.uint32)
        return raw.Matrix(words, scales, scales, bits, 32, "float32", True)

    one, down, number = np.zeros(1, np.int64), matrix(64, 4, 2), np.ones(1, np.int64)
    x = zeros(1, 64)
    arguments = x, 1, one, one, x
    raw.expert_mlp(coded(4), coded(4), down, *arguments)
    refused("do not fit together", raw.expert_mlp, coded(4), coded(8), down, *arguments)
    slots, weights = np.ones((1, 1), np.int64), zeros(1, 1)
    rest = x, x, x, slots, weights, x
    raw.after(coded(4), coded(4), down, *rest)
    refused("a slot number", raw.after, coded(4), coded(4), matrix(64, 4, 1), *rest)
    refused("do not fit together", raw.after, coded(4), coded(8), down, *rest)
    refused("do not fit together", raw.after, coded(4), coded(4), matrix(32, 4, 2), *rest)
    refused("a slot number", raw.expert_mlp, coded(4), coded(4), matrix(64, 4, 1), x, 1, one,
            number, x)
    """)


def test_a_shared_expert_that_does_not_fit_is_refused():
    right = {"gate": (4, 8), "up": (4, 8), "down": (8, 4), "scalar_gate": (1, 8)}
    raw.SharedExpert(*(plain(*shape) for shape in right.values()))
    for name, shape in (
        ("scalar_gate", (400_000, 8)),
        ("scalar_gate", (1, 9)),
        ("up", (4, 9)),
        ("up", (5, 8)),
        ("down", (8, 5)),
        ("down", (9, 4)),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            raw.SharedExpert(*(plain(*one) for one in (right | {name: shape}).values()))


def delta_net(k_heads: int = 1, v_heads: int = 2, **changes: Any):
    width, channels = 4 * v_heads, 2 * 6 * k_heads + 4 * v_heads
    shapes = {"qkv": (channels, 8), "z": (width, 8), "b": (v_heads, 8), "a": (v_heads, 8)}
    matrices = [plain(*one) for one in (shapes | {"out": (8, width)} | changes).values()]
    sizes = ((2, channels), (v_heads,), (v_heads,), (4,))
    vectors = (np.zeros(size, np.float32) for size in sizes)
    return raw.DeltaNet(*matrices, *vectors, 1e-6, 2, k_heads, 6, v_heads, 4)


def attention(heads: int = 2, kv_heads: int = 1, rotary_dim: int = 2, **changes: Any):
    shapes = {"q": (8 * heads, 8), "k": (4 * kv_heads, 8), "v": (4 * kv_heads, 8)}
    matrices = [plain(*one) for one in (shapes | {"out": (8, 4 * heads)} | changes).values()]
    norms = np.zeros(4, np.float32), np.zeros(4, np.float32)
    return raw.Attention(*matrices, *norms, 1e-6, 1e4, heads, kv_heads, 4, rotary_dim)


def test_a_mixer_that_does_not_fit_is_refused():
    delta_net()
    attention()
    changes: dict[str, Any]
    for changes in ({"z": (8, 9)}, {"b": (2, 9)}, {"a": (2, 7)}, {"out": (9, 8)}):
        with pytest.raises(ValueError, match="do not fit together"):
            delta_net(**changes)
    for changes in ({"k": (4, 9)}, {"v": (4, 7)}, {"out": (9, 8)}):
        with pytest.raises(ValueError, match="do not fit together"):
            attention(**changes)
    for heads in ({"k_heads": 2, "v_heads": 3}, {"k_heads": 0}):
        with pytest.raises(ValueError, match="multiple of its key heads"):
            delta_net(**heads)
    for heads in ({"heads": 3, "kv_heads": 2}, {"kv_heads": 0}):
        with pytest.raises(ValueError, match="multiple of its key heads"):
            attention(**heads)
    for rotary_dim in (-2, 3, 6):
        with pytest.raises(ValueError, match="rotary part"):
            attention(rotary_dim=rotary_dim)


def test_a_layer_that_does_not_fit_is_refused():
    norm = np.zeros(8, np.float32)
    shared = raw.SharedExpert(plain(4, 8), plain(4, 8), plain(8, 4), plain(1, 8))
    raw.Block(norm, 1e-6, delta_net(), norm, 1e-6, plain(5, 8), True, shared)
    wide = np.zeros(9, np.float32)
    with pytest.raises(ValueError, match="parts of a layer do not fit"):
        raw.Block(wide, 1e-6, attention(), wide, 1e-6, plain(5, 9), True, shared)


@pytest.mark.parametrize("position", [-1, 6, 2**63 - 1])
def test_a_position_outside_of_the_keys_is_refused(position):
    x, keys, values = (np.zeros(shape, np.float32) for shape in ((3, 8), (1, 8, 4), (1, 8, 4)))
    with pytest.raises(ValueError, match="no room"):
        attention()(x, 3, position, keys, values, np.empty_like(x))


def test_a_child_of_fork_keeps_its_number_of_threads():
    run("""
    import os
    raw.set_threads(3)
    child = os.fork()
    if not child:
        os._exit(0 if raw.threads() == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """)


@pytest.mark.parametrize("act", ["use", "close", "drop", "drop both", "exit"])
def test_a_child_of_fork_leaves_the_reader_behind(act):
    """It has none of its threads: it may neither wait for them nor destroy what they wait on."""
    run(
        """
    import os, signal, time
    pool, memory = raw.ReadPool(3), np.zeros(1, np.uint8)
    time.sleep(0.05)  # the threads sleep: they are waiters of the pool's condition
    gate, feed = os.pipe()
    numbers, where = np.array([[gate, 0, 1]]), np.array([[memory.ctypes.data, 1]], np.uint64)
    def submit():
        return pool.submit(numbers, where, memory, 1, False, False)
    ticket = submit()
    ticket.wait()  # a pipe cannot be read at an offset; the read has failed
    child = os.fork()
    if not child:
        signal.alarm(20)
        for call in () if ACT != "use" else (submit, ticket.wait, lambda: ticket.done):
            try:
                call()
            except RuntimeError as error:
                assert "open another one" in str(error)
            else:
                os._exit(1)
        if ACT == "close":
            pool.close()
        if ACT in ("drop", "drop both"):
            del pool
        if ACT == "drop both":
            del ticket
        if ACT == "exit":
            sys.exit(0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ticket = submit()
    ticket.wait()
    assert ticket.done
    pool.close()
    """.replace("ACT", repr(act))
    )


def test_silu_of_what_is_far_below_zero_is_nothing(isa):
    """Its limit is 0; a NaN stays in sight."""

    def one(value):
        return raw.Matrix(np.array([[value]], np.float32), None, None, 0, 0, "float32")

    def silu(value):
        out = np.empty((1, 1), np.float32)
        raw.SharedExpert(one(value), one(1), one(1), one(0))(np.ones((1, 1), np.float32), 1, out)
        return 2 * float(out[0, 0])  # sigmoid(0) of it came

    for value in (-89.0, -200.0, -1e30, -3e38, -np.inf):
        assert abs(silu(value)) < 1e-35
    assert np.isnan(silu(np.nan)) and silu(np.inf) == np.inf
    for value in (-87.0, -3.0, 3.0, 100.0):
        np.testing.assert_allclose(silu(value), value / (1 + np.exp(-value)), rtol=1e-6)


def test_room_for_many_tokens_is_given_back():
    """After some tokens of decoding, and not between two chunks."""
    expert = raw.SharedExpert(plain(512, 32), plain(512, 32), plain(32, 512), plain(1, 32))

    def held(tokens, times=1):
        x, out = (np.zeros((tokens, 32), np.float32) for _ in range(2))
        for _ in range(times):
            expert(x, tokens, out)
        return raw.scratch_nbytes()

    few, many = held(1), held(4000)
    assert many > few + 16_000_000
    assert held(1, 100) == many and held(4000) == many and held(1, 100) == many
    assert held(1, 200) < few + 2_000_000
    assert held(4000) == many


@pytest.mark.parametrize("kind, name", [(np.int32, "i"), (np.float16, "e"), (np.float64, "d")])
def test_numbers_of_another_type_are_refused_by_name(kind, name):
    x, out = np.zeros((1, 8), kind), np.zeros((1, 4), np.float32)
    with pytest.raises(ValueError, match=f"x must be 8 packed float32 .* 8 of type '{name}'"):
        plain(4, 8).product(x, 1, out)
    norm = np.zeros(8, np.float32)
    shared = raw.SharedExpert(plain(4, 8), plain(4, 8), plain(8, 4), plain(1, 8))
    block = raw.Block(norm, 1e-6, delta_net(), norm, 1e-6, plain(5, 8), True, shared)
    conv, recurrent = np.zeros((1, 20), kind), np.zeros((2, 4, 6), np.float32)
    rest = [np.zeros(8, np.float32)] * 6
    with pytest.raises(ValueError, match=f"conv must be 20 packed float32 .* 20 of type '{name}'"):
        block.before(rest[0], 1, 1, 0, conv, recurrent, *rest)
