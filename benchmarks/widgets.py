"""What the Playground costs: speed while it shows a run, and memory after many.

    python benchmarks/widgets.py live --tokens 64 256 1000
    python benchmarks/widgets.py memory --rounds 3

`live` starts a kernel, as a notebook has one, and receives what it sends. There the Run button and
`play`, which makes and records the same run and shows nothing, come in turn, in reversed order
every second time. Speed is from the first token's way through the model to the last one's, on the
record's clock: what is drawn after the last token is not in it, as the text is then whole. A ratio
is the median of the repetitions' own. Runs go on after an end token, so that they are as long as
asked for, and must give the same text.

`memory` runs as the engine was opened, then ten times with changing K, bits and bank, then as at
first, and so on, each line after the same run, once cycles are collected: all that is in memory
(RSS), and without the files that are mapped, which other processes may share (anonymous). Changes
are against the first run, which opened no other engine, and against the first round.
"""

import argparse
import gc
import statistics
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from interleave import interleave
from jupyter_client.manager import start_new_kernel

import flashmoe_lab as fl
from flashmoe_lab.trace import Trace
from flashmoe_lab.widgets import Playground, play

DECODE_S = 600  # at the most, for one case in the kernel


def main() -> int:
    """Measure and print; exit code 1 if texts differ or threads are left."""
    options = _options()
    return memory(options) if options.what == "memory" else live(options)


def live(options: argparse.Namespace) -> int:
    """Have a kernel do it, and print what it says."""
    manager, client = start_new_kernel()
    said = list[str]()

    def heard(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])
            print(said[-1], end="", flush=True)

    folder = str(Path(__file__).parent)
    try:
        print(f"{'tokens':>6}{'without':>9}{'with':>9}{'ratio':>8}{'quartiles':>16}")
        for tokens in options.tokens:
            asked = tokens, options.repetitions, options.bank_gb
            code = f"import sys; sys.path.insert(0, {folder!r}); import widgets; "
            client.execute_interactive(
                f"{code}widgets.live_here{asked}", output_hook=heard, timeout=DECODE_S
            )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return int(len(said) < len(options.tokens) or "differ" in "".join(said))


def live_here(tokens: int, repetitions: int, bank_gb: float) -> None:
    """In the kernel: one line."""
    with fl.load("demo", bank_gb=bank_gb) as engine:
        engine.config = replace(engine.config, eos_token_ids=())
        playground = Playground(engine)
        controls, texts = playground.controls, set[str]()
        controls.max_tokens.value = tokens

        def shown() -> float:
            playground.start()
            played = playground.wait()
            assert played is not None
            texts.add(played.text)
            return speed(played.trace)

        def alone() -> float:
            played = play(engine, controls.prompt, controls.setting())
            texts.add(played.text)
            return speed(played.trace)

        cases = {"without": alone, "with": shown}
        interleave(cases, 1)
        found = interleave(cases, repetitions)
    pairs = zip(found["with"].values, found["without"].values, strict=True)
    ratios = [mine / plain for mine, plain in pairs]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print(
        f"{tokens:>6}{found['without'].median:>9.0f}{found['with'].median:>9.0f}"
        f"{statistics.median(ratios):>8.3f}{f'{low:.3f} to {high:.3f}':>16}"
        + (" THE TEXTS DIFFER" if len(texts) > 1 else "")
    )


def speed(trace: Trace) -> float:
    """Tokens a second, from the first one's way through the model to the last one's."""
    tokens = trace.tokens
    starts = tokens.start_ns[(tokens.phase == "decode") & (tokens.end_ns > 0)]
    return (len(starts) - 1) / ((starts.max() - starts.min()) / 1e9)


def memory(options: argparse.Namespace) -> int:
    """Print a line a round."""
    with fl.load("demo", bank_gb=options.bank_gb) as engine:
        playground = Playground(engine)
        controls = playground.controls
        controls.max_tokens.value = 12
        own = controls.bits.value, controls.k.value, controls.bank.value
        lines = list[tuple[int, int, int]]()
        for turn in range(options.rounds + 1):
            controls.bits.value, controls.k.value, controls.bank.value = own
            run(playground)
            lines.append((*used_kb(), threading.active_count()))
            print(f"{turn * 10:3} runs", *told(lines), f"{lines[-1][2]} threads", flush=True)
            for number in range(10):
                change(playground, number)
                run(playground)
    return int(lines[-1][2] > lines[min(1, options.rounds)][2])


def told(lines: list[tuple[int, int, int]]) -> list[str]:
    """Both kinds of memory, and how much more that is than at first and after a round."""
    found = list[str]()
    for number, name in enumerate(("RSS", "anonymous")):
        now, first, second = (line[number] for line in (lines[-1], lines[0], lines[:2][-1]))
        found.append(f"{name} {now / 1e3:.0f} MB {now / first - 1:+.1%} {now / second - 1:+.1%} ")
    return found


def change(playground: Playground, turn: int) -> None:
    """Other bits, bank and K."""
    controls = playground.controls
    bits, banks = list(controls.bits.options), [bank for _, bank in controls.bank.options]
    controls.bits.value = bits[turn % len(bits)]
    controls.bank.value = banks[turn % len(banks)]
    controls.k.value = 1 + 3 * turn % controls.k.max


def run(playground: Playground) -> None:
    """Press the button and wait."""
    playground.start()
    playground.wait()


def used_kb() -> tuple[int, int]:
    """In memory, and of that what is no file's, on Linux."""
    gc.collect()
    with open("/proc/self/smaps_rollup") as lines:
        found = {words[0]: words[1] for words in map(str.split, lines)}
    return int(found["Rss:"]), int(found["Anonymous:"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("live", "memory"))
    parser.add_argument("--bank-gb", type=float, default=0.006)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1000])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
