"""What a long beginning costs the second time: time to the first token of two prompts with it.

Each repetition has a fresh cache: the first prompt reads everything and makes the snapshots, the
second has the same beginning and another question. Beside them the first prompt without a cache,
so that what making snapshots costs is seen, interleaved. The distribution at the second prompt's
first token must be that of a run without a cache, bit for bit on a CPU; so must its tokens.

    python benchmarks/prefix_cache.py --tokens 2000
    python benchmarks/prefix_cache.py --model PACKED --tokens 8000
"""

import argparse
import statistics
import sys
import time
from typing import Any

import mlx.core as mx
import numpy as np
from interleave import Samples
from record import record

import flashmoe_lab as fl

QUESTION = 20  # tokens that follow the beginning


def main() -> int:
    """Measure and print a table; exit code 1 if a number differs."""
    options = _options()
    rng = np.random.default_rng(options.seed)
    with fl.load(options.model, resident=options.resident) as engine:
        end = engine.config.eos_token_ids[0]
        vocabulary = engine.tokenizer.size if engine.tokenizer else engine.config.vocab_size

        def text(count: int) -> list[int]:
            return rng.integers(0, vocabulary - 256, count).tolist()

        beginning = [*text(options.tokens - 1), end]
        first_ms(engine, text(600))
        names = ("without a cache", "first time", "second time")
        samples, right = {name: Samples() for name in names}, True
        for _ in range(options.repetitions):
            cache = fl.PrefixCache()
            one, two = (beginning + [*text(QUESTION), end] + text(4) for _ in range(2))
            asked = (one, None), (one, cache), (two, cache)
            found = {name: first_ms(engine, *what) for name, what in zip(names, asked, strict=True)}
            for name in names:
                samples[name].values.append(found[name][0])
            same = np.array_equal(found[names[2]][1], first_ms(engine, two)[1])
            right &= same or mx.default_device() != mx.cpu
        known = found["second time"][2]
        conditions: dict[str, Any] = {
            "K": engine.num_experts_per_tok,
            "experts": engine.checkpoint.label,
            "resident": options.resident,
            "reader": str(engine.reading),
        }
    first, second = samples["first time"].values, samples["second time"].values
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    print(
        f"time to the first token, {options.model}, {options.tokens} tokens that are shared and "
        f"{QUESTION + 5} that are not, {known} of them known the second time, "
        f"{options.repetitions} repetitions, K={conditions['K']}, {conditions['experts']}, "
        f"{'resident' if options.resident else conditions['reader']}"
    )
    print(f"{'':18}{'median ms':>10}{'best':>9}{'spread':>9}")
    for name in names:
        this = samples[name]
        print(f"{name:18}{this.median:>10.1f}{min(this.values):>9.1f}{this.spread:>9.1f}")
        record(
            options.json,
            benchmark="prefix_cache",
            case=f"{options.model}, {options.tokens} tokens",
            variant=name,
            value=this.median,
            unit="ms",
            repetitions=len(this),
            spread=this.spread,
            ratio_to="first time",
            ratio=this.median / samples["first time"].median,
            best=min(this.values),
            known=known,
            same_bits=right,
            **conditions,
        )
    print(
        f"second over first: median {statistics.median(ratios):.2%}, of the best "
        f"{min(second) / min(first):.2%}; same bits: {'yes' if right else 'NO'}"
    )
    return 0 if right else 1


def first_ms(
    engine: fl.Engine, prompt: list[int], cache: fl.PrefixCache | None = None
) -> tuple[float, np.ndarray, int]:
    """Milliseconds to the first token, its distribution, and how many tokens were known."""
    run = engine.stream_generate(prompt, 1, cache=cache)
    start = time.perf_counter()
    step = next(iter(run))
    taken = time.perf_counter() - start
    return taken * 1e3, step.logprobs, run.cached_tokens


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="a packed checkpoint, or demo")
    parser.add_argument("--tokens", type=int, default=2000, help="that both prompts begin with")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--resident", action="store_true", help="hold every expert in memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="append one line a case to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
