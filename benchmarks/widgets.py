"""What memory the Playground holds after rounds of ten runs with changing K, bits and bank.

    python benchmarks/widgets.py --rounds 3

Each line is taken after the same run, with the engine as it was opened. The first stands before any
other engine was open.
"""

import argparse
import threading

import flashmoe_lab as fl


def resident_mb() -> float:
    """Memory of this process, on Linux."""
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1e3


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=12)
    options = parser.parse_args()
    with fl.load("demo", bank_gb=0.006) as engine:
        playground = fl.widgets.Playground(engine)
        controls = playground.controls
        controls.max_tokens.value = options.max_tokens
        labels = list(controls.bits.options)
        banks = [bank for _, bank in controls.bank.options]
        own = controls.bits.value, controls.k.value, controls.bank.value
        first = 0.0
        for turn in range(options.rounds * 10 + 1):
            controls.bits.value, controls.k.value, controls.bank.value = own
            if turn % 10 == 0:
                playground.start()
                playground.wait()
                first = first or resident_mb()
                print(
                    f"{turn:3} runs {resident_mb():.0f} MB {resident_mb() / first - 1:+.1%} "
                    f"{threading.active_count()} threads",
                    flush=True,
                )
            controls.bits.value = labels[turn % len(labels)]
            controls.bank.value = banks[turn % len(banks)]
            controls.k.value = 1 + 3 * turn % controls.k.max
            playground.start()
            playground.wait()


if __name__ == "__main__":
    main()
