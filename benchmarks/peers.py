"""The same geometry and bits through llama.cpp, mlx-lm and ours, in turn.

Every measurement is a process of its own, cold or warm as its case says; the order of the programs
is reversed every second time. Each goes through a prompt of random tokens and then through random
tokens one by one, without sampling. llama.cpp runs with and without repacked weights where it has
the memory for that; mlx-lm only where everything fits.

* in memory: everything is loaded before the clock starts.
* under a limit (--limit-gib): a memory cgroup, page cache included; needs root. Every file is
  dropped from the page cache before each run.

    flashmoe-lab synth 397b four --layers 4 --bits 4
    python benchmarks/write_gguf.py four four.gguf
    python benchmarks/peers.py four --gguf four.gguf --llama-bench .../llama-bench \
        --mlx-python .../bin/python
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memory_limit
import numpy as np
from emptied import empty
from interleave import Samples, order
from record import record

from flashmoe_lab import native
from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.storage.page_cache import warm

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One program: how it is started, what it reads, and what its output says.

    Attributes:
        command: the whole command line.
        speeds: its output -> {"prefill": tokens/s, "decode": tokens/s}, None where not measured.
        maps: a file that it maps, to be brought into the page cache where everything fits.
    """

    name: str
    command: list[str]
    speeds: Callable[[str], dict[str, float | None]]
    maps: Path | None = None


def peers_of(options: argparse.Namespace, logits: Path) -> list[Peer]:
    """Those that were asked for and can run in this case."""
    limited = options.limit_gib is not None
    settings = dict(options.settings)
    settings |= {"bank_gb": options.bank_gb} if limited else {"resident": True}
    counts = ["--prompt", str(options.prompt), "--tokens", str(options.tokens)]
    ours = [sys.executable, str(HERE / "one_run.py"), str(options.packed), *counts]
    ours += ["--settings", json.dumps(settings)]
    peers = [Peer(name="flashmoe_lab", command=ours, speeds=_of_json)]
    if options.llama_bench:
        tokens = _count(options, "llama.cpp", "tokens")
        for repack in (0,) if limited else (0, 1):
            peers.append(_llama(options, tokens, repack))
    if options.mlx_python and not limited:
        few = ["--prompt", str(options.mlx_prompt), "--tokens", str(options.mlx_tokens)]
        command = [options.mlx_python, str(HERE / "peer_mlx_lm.py"), str(options.packed), *few]
        command += ["--logits", str(logits / "mlx-lm.npy")]
        peers.append(Peer(name="mlx-lm", command=command, speeds=_of_json))
    return peers


def _llama(options: argparse.Namespace, tokens: int, repack: int) -> Peer:
    command = [options.llama_bench, "-m", str(options.gguf), "-t", str(options.threads)]
    command += ["-p", str(options.llama_prompt), "-n", str(tokens), "-r", "1", "-o", "jsonl"]
    command += ["--repack", str(repack), "-lm", "mmap"]
    if options.limit_gib is not None:
        command.append("--no-warmup")
    name = "llama.cpp, repacked" if repack else "llama.cpp"
    return Peer(name=name, command=command, speeds=_of_llama, maps=options.gguf)


def _of_json(output: str) -> dict[str, float | None]:
    found = json.loads(output.splitlines()[-1])
    return {phase: found[phase]["tokens_per_second"] for phase in ("prefill", "decode")}


def _of_llama(output: str) -> dict[str, float | None]:
    speeds: dict[str, float | None] = {"prefill": None, "decode": None}
    for line in output.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            speeds["decode" if row["n_gen"] else "prefill"] = row["avg_ts"]
    return speeds


def measure(options: argparse.Namespace, peers: list[Peer]) -> dict[str, dict[str, Samples]]:
    """Speeds by phase and peer."""
    found = {phase: {peer.name: Samples() for peer in peers} for phase in ("prefill", "decode")}
    by_name = {peer.name: peer for peer in peers}
    for repetition in range(options.repetitions):
        for name in order(list(by_name), repetition):
            for phase, speed in run_once(options, by_name[name]).items():
                if speed is not None:
                    found[phase][name].values.append(speed)
                    print(f"{repetition + 1}: {name}: {phase} {speed:.3f} tokens/s", flush=True)
    return found


def run_once(options: argparse.Namespace, peer: Peer) -> dict[str, float | None]:
    """One process; stops everything if it fails, since a missing number is no zero."""
    limit = None
    if options.limit_gib is not None:
        limit = round(options.limit_gib * 2**30)
        empty(files_of(options))
    elif peer.maps is not None:
        warm(peer.maps)
    done = memory_limit.run(peer.command, limit, timeout=options.timeout)
    if done.returncode:
        raise SystemExit(f"{peer.name}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return peer.speeds(done.stdout)


def files_of(options: argparse.Namespace) -> list[Path]:
    """Every weight file of the case."""
    files = sorted(options.packed.rglob("*.safetensors"))
    return [*files, options.gguf] if options.gguf else files


def logits_differ(options: argparse.Namespace, logits: Path) -> float:
    """Relative rms between ours and mlx-lm's logits of the same last token."""
    ours = [sys.executable, str(HERE / "one_run.py"), str(options.packed)]
    ours += ["--prompt", str(options.mlx_prompt), "--tokens", str(options.mlx_tokens)]
    ours += ["--settings", json.dumps({"bank_gb": 1.0}), "--logits", str(logits / "ours.npy")]
    subprocess.run(ours, check=True, capture_output=True)
    one = np.load(logits / "ours.npy").astype(np.float64)
    other = np.load(logits / "mlx-lm.npy").astype(np.float64)
    return float(np.sqrt(np.mean((one - other) ** 2) / np.mean(other**2)))


def report(
    options: argparse.Namespace, found: dict[str, dict[str, Samples]], error: float | None
) -> None:
    """Print the table and append the lines."""
    checkpoint = PackedCheckpoint(options.packed)
    layers = checkpoint.config.num_hidden_layers
    where = "in memory" if options.limit_gib is None else f"limit {options.limit_gib:g} GiB, cold"
    print(f"\n{options.packed.name}: {layers} layers, {checkpoint.label}, {where}")
    print(f"{'':10}{'':22}{'tokens/s':>10}{'spread':>9}{'ours is':>9}{'best':>9}{'ours is':>9}")
    for phase, speeds in found.items():
        for name, samples in speeds.items():
            if not len(samples):
                continue
            own = speeds["flashmoe_lab"].values or [float("nan")]
            ours, best = statistics.median(own), max(samples.values)
            ratio = ours / samples.median
            print(
                f"{phase:10}{name:22}{samples.median:>10.3f}{samples.spread:>9.3f}{ratio:>8.1f}x"
                f"{best:>9.3f}{max(own) / best:>8.1f}x"
            )
            record(
                options.json,
                benchmark="peers",
                case=f"{phase}, {layers} layers of {options.geometry}, {where}",
                variant=name,
                value=samples.median,
                unit="tokens/s",
                repetitions=len(samples),
                spread=samples.spread,
                ratio_to="flashmoe_lab",
                ratio=samples.median / ours,
                error_rms=error if name == "mlx-lm" else None,
                error_is="logits against ours" if name == "mlx-lm" else None,
                best=best,
                K=checkpoint.config.num_experts_per_tok,
                bits=_bits(checkpoint),
                layers=layers,
                page_cache=where,
                threads=_threads(options, name),
                prompt=_count(options, name, "prompt"),
                tokens=_count(options, name, "tokens"),
                settings=options.settings,
                bank_gb=options.bank_gb if options.limit_gib is not None else None,
            )
    if error is not None:
        print(f"logits of ours and mlx-lm differ by {error:.1e} rms")


def _count(options: argparse.Namespace, name: str, what: str) -> int:
    if name == "mlx-lm":
        return getattr(options, f"mlx_{what}")
    if name.startswith("llama"):
        given = getattr(options, f"llama_{what}")
        return options.tokens if given is None else given
    return getattr(options, what)


def _threads(options: argparse.Namespace, name: str) -> int | None:
    """Of a program's arithmetic; mlx-lm chooses for itself."""
    if name.startswith("llama"):
        return options.threads
    return native.threads() if name == "flashmoe_lab" else None


def _bits(checkpoint: PackedCheckpoint) -> int | None:
    quantization = checkpoint.layers[0].layout.quantization
    return quantization.bits if quantization else None


def main() -> int:
    """Measure, print, append."""
    options = _options()
    if options.limit_gib is not None and (missing := memory_limit.available()):
        print(f"peers: no run under a memory limit: {missing}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        peers = peers_of(options, Path(folder))
        found = measure(options, peers)
        with_mlx = any(peer.name == "mlx-lm" for peer in peers)
        report(options, found, logits_differ(options, Path(folder)) if with_mlx else None)
    return 0


def _options() -> argparse.Namespace:
    def settings(text: str) -> dict[str, Any]:
        return json.loads(text)

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("--geometry", default="397b", help="what its layers are called in tables")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument(
        "--llama-bench", help="llama.cpp's program; without it llama.cpp is left out"
    )
    parser.add_argument(
        "--mlx-python", help="a Python that has mlx-lm; without it that is left out"
    )
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--llama-prompt", type=int, default=512)
    parser.add_argument("--llama-tokens", type=int, help="default: as ours")
    parser.add_argument("--mlx-prompt", type=int, default=16, help="0 of either leaves it out")
    parser.add_argument("--mlx-tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp's arithmetic")
    parser.add_argument("--settings", type=settings, default={"reader": "direct", "threads": 4})
    parser.add_argument("--limit-gib", type=float, help="memory that a program may have")
    parser.add_argument("--bank-gb", type=float, default=4.0, help="ours, under the limit")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds of one process")
    parser.add_argument("--json", type=Path, help="append one line a case to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
