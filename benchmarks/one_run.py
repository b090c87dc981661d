"""One engine, one measurement, in a process of its own: what the comparing programs start.

A prompt of random tokens goes through the model, then random tokens one after another, as
llama-bench does it, so that text and sampling play no part and experts vary. Prints one JSON
object.

    python benchmarks/one_run.py PACKED --prompt 512 --tokens 64 --settings '{"bank_gb": 4}'
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import flashmoe_lab as fl
from flashmoe_lab.generation import prefill
from flashmoe_lab.storage.page_cache import process_read_nbytes


def measure(
    engine: fl.Engine,
    options: argparse.Namespace,
    keep: Callable[[np.ndarray], None] = lambda logits: None,
) -> dict[str, Any]:
    """Seconds, bytes and hits of prefill and decode; to be called in the engine's thread.

    `keep` is given the last token's logits.
    """
    rng = np.random.default_rng(options.seed)
    ids = rng.integers(0, engine.config.vocab_size, options.prompt + options.tokens).tolist()
    prompt, tokens = ids[: options.prompt], ids[options.prompt :]
    model, k = engine.model, options.num_experts_per_tok
    state, found = model.empty_state(), {}
    if options.warmup:  # caches of code and threads, not of experts: its own bank is kept
        np.array(model([0], model.empty_state(), k))
    logits = None
    with Phase(engine, found, "prefill", len(prompt)):
        if prompt:
            logits = prefill(model, prompt, state, k, options.prefill_chunk)
    with Phase(engine, found, "decode", len(tokens)):
        for token in tokens:
            logits = np.array(model([token], state, k))[0]
    if logits is not None:
        keep(logits)
    return found


class Phase:
    """Times one phase and notes what it read."""

    def __init__(self, engine: fl.Engine, found: dict[str, Any], name: str, tokens: int) -> None:
        self.engine, self.found, self.name, self.tokens = engine, found, name, tokens

    def __enter__(self) -> None:
        counts = self.engine.bank.counts
        self.before = counts.hits, counts.misses, counts.read_nbytes
        self.disk = process_read_nbytes() or 0
        self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        seconds = time.perf_counter() - self.start
        counts = self.engine.bank.counts
        after = counts.hits, counts.misses, counts.read_nbytes
        hits, misses, nbytes = (now - then for now, then in zip(after, self.before, strict=True))
        self.found[self.name] = {
            "tokens": self.tokens,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds if self.tokens else None,
            "hits": hits,
            "misses": misses,
            "read_nbytes": nbytes,
            "disk_nbytes": (process_read_nbytes() or 0) - self.disk,
        }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("--prompt", type=int, default=0, help="random tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="random tokens after it")
    parser.add_argument("--prefill-chunk", type=int, default=512)
    parser.add_argument("--num-experts-per-tok", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", action="store_true", help="one token first, not counted")
    parser.add_argument("--logits", type=Path, help="save the last token's logits here")
    parser.add_argument("--settings", type=json.loads, default={}, help="of the engine, as JSON")
    options = parser.parse_args()
    start = time.perf_counter()
    with fl.load(options.packed, **options.settings) as engine:
        opened = time.perf_counter() - start
        save = partial(np.save, options.logits) if options.logits else lambda logits: None
        found = engine._thread.call(lambda: measure(engine, options, save))
        found |= {"open_seconds": opened, "bank_slots": engine.bank.slots}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
