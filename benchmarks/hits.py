"""What an expert that the bank holds costs: system calls, counted by strace, and copies.

Tokens go through the model under strace, which counts what every thread of the process asks of the
kernel between two marks. With every expert in the bank, and with a smaller bank that holds just
those that are asked for, waking threads (futex) should be all, but for a call in many tokens
by which a process gets memory. A run without a bank, from the page cache, stands beside them: there
the reads must be seen, or the counting would prove nothing.

Copies are ruled out by address: where a reader is told to put an expert is where the product of its
slot begins, and a number changed there by hand changes the next product of a hit.

    python benchmarks/hits.py                     the demo model, or --model PACKED
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from record import record

import flashmoe_lab as fl
from flashmoe_lab.demo import open_checkpoint

BEGIN, END = b"the measured tokens begin", b"the measured tokens end"
CASES: dict[str, dict[str, Any]] = {
    "every expert in the bank": {"resident": True},
    "hits in a partly filled bank": {"bank_share": 0.8},
    "no bank, page cache": {"bank_gb": 0.0, "reader": "pread"},
}
_MEMORY = 0.5  # calls a token by which a process gets memory now and then
_CALL = re.compile(rb"^\d+ +(\w+)\(")  # what goes on with "<... " was counted when it began


def main() -> int:
    """Count and print; exit code 1 if a hit costs a system call or a copy."""
    options = _options()
    if options.case:
        run(options)
        return 0
    if shutil.which("strace") is None:
        print("hits: nothing was counted: there is no strace here")
        return 0
    free, checkpoint = True, open_checkpoint(options.model)
    print(f"system calls a token, {options.tokens} tokens, all threads")
    for case in CASES:
        calls, hits = count(case, options)
        rest = {name: n / options.tokens for name, n in calls.most_common() if name != "futex"}
        words = ", ".join(f"{name} {n:.2f}" for name, n in rest.items()) or "none"
        print(f"{case:32}hits {hits}  futex {calls['futex'] / options.tokens:.2f}, others: {words}")
        asks = sum(rest.values())
        free &= asks > 1 if case.startswith("no bank") else asks < _MEMORY
        record(
            options.json,
            benchmark="hits",
            case=case,
            variant="system calls but futex",
            value=asks,
            unit="a token",
            repetitions=options.tokens,
            hits=hits,
            futex=calls["futex"] / options.tokens,
            K=checkpoint.config.num_experts_per_tok,
            experts=checkpoint.label,
            layers=checkpoint.config.num_hidden_layers,
        )
    with opened(options.model, "every expert in the bank") as engine:
        copies = copy_of(engine)
    print(f"copies: {copies or 'none'}")
    return 0 if free and not copies else 1


def count(case: str, options: argparse.Namespace) -> tuple[Counter[str], str]:
    """System calls of the measured tokens, and what the bank held of their experts."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, __file__, "--case", case, "--model", str(options.model)]
        command += ["--tokens", str(options.tokens)]
        done = subprocess.run(
            ["strace", "-f", "-qq", "-o", str(log), *command], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"hits: exit code {done.returncode}\n{done.stderr[-2000:]}")
        return calls_between(log.read_bytes().splitlines()), done.stdout.strip()


def calls_between(lines: list[bytes]) -> Counter[str]:
    """System calls between the marks, by name, of lines that strace wrote."""
    first, last = (next(n for n, line in enumerate(lines) if mark in line) for mark in (BEGIN, END))
    found = [_CALL.match(line) for line in lines[first + 1 : last]]
    return Counter(name[1].decode() for name in found if name)


def run(options: argparse.Namespace) -> None:
    """One case: the same tokens twice, marked the second time."""
    with opened(options.model, options.case) as engine:
        print(engine._thread.call(lambda: _marked(engine, options.tokens)))


def opened(model: str, case: str) -> fl.Engine:
    """The engine of a case."""
    settings = dict(CASES[case])
    share = settings.pop("bank_share", None)
    if share is not None:
        settings["bank_gb"] = open_checkpoint(model).expert_nbytes * share / 1e9
    return fl.load(model, **settings)


def _marked(engine: fl.Engine, tokens: int) -> str:
    ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, tokens).tolist()
    mark = os.open(os.devnull, os.O_WRONLY)
    for measured in (False, True):
        state = engine.model.empty_state()
        before = engine.bank.counts.hits, engine.bank.counts.misses
        for number, token in enumerate(ids):
            if measured and number == 0:
                os.write(mark, BEGIN)
            np.array(engine.model([token], state)[0])
    os.write(mark, END)
    counts = engine.bank.counts
    hits, misses = counts.hits - before[0], counts.misses - before[1]
    return f"{hits} of {hits + misses} in {engine.bank.slots} slots"


def copy_of(engine: fl.Engine) -> str:
    """What is wrong with "a hit is computed with where it was read to"; empty if nothing is."""
    return engine._thread.call(lambda: _copy_of(engine))


def _copy_of(engine: fl.Engine) -> str:
    layer = engine.layers[0]
    pool = engine.bank.pool(0)
    told = pool.addresses(range(pool.slots))[:, 0]
    part = next(c for c in pool.layout.components if c.name == "gate_proj.weight")
    seen = np.asarray(memoryview(pool.components[part.name]))  # pyright: ignore[reportArgumentType]
    used = seen.ctypes.data + np.arange(pool.slots) * seen.strides[0]
    if not np.array_equal(told + part.offset, used):
        return "the product does not begin where the reader was told to put the expert"
    x = mx.ones((1, engine.config.hidden_size))
    routing = layer.router(x)
    before = np.array(layer.experts(x, routing, layer.fetch(routing)))
    expert = int(np.array(routing.experts)[0, 0])
    slot = layer.fetch(routing).placed.slots[expert]
    memory = np.frombuffer(pool.buffers(slot)[0], np.uint8)
    memory[part.offset : part.offset + part.nbytes] ^= 0x11
    after = np.array(layer.experts(x, routing, layer.fetch(routing)))
    return "" if not np.array_equal(before, after) else "the product does not see the slot"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--json", type=Path, help="append one line a case to this file")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
