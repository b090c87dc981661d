"""An installation whose extension module is absent, or there and cannot be loaded: it runs, slower,
and says why."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, warnings
from pathlib import Path

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "flashmoe_lab._native":
            raise {error}

sys.meta_path.insert(0, Finder())
import mlx.core as mx
mx.set_default_device(mx.cpu)
from flashmoe_lab import kernels, native
from flashmoe_lab.storage.ways import open_reader

def error_of(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert kernels.used() == "mlx"
said = [str(one.message) for one in caught]
said += [error_of(lambda: native.set_threads(2)), error_of(lambda: native.set_isa("avx2"))]
said += [error_of(lambda: kernels.use("native"))]
assert len(said) == 4 and all({text!r} in one for one in said), said
assert "threads of Python" in said[0], said
with open_reader("pread", {{0: Path("none")}}) as reader:
    assert not reader.native
assert native.threads() == 1 and native.isa() is None
"""
ABSENT = "ModuleNotFoundError('No module', name='flashmoe_lab._native')"
BROKEN = "ImportError('libstdc++.so.6: version GLIBCXX_3.4.99 not found')"


@pytest.mark.parametrize(
    ("error", "text"),
    [(ABSENT, "_native was not built here"), (BROKEN, "does not load: libstdc++.so.6: version")],
    ids=["absent", "broken"],
)
def test_it_says_why(error, text):
    script = SCRIPT.format(error=error, text=text)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
