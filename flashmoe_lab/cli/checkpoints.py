"""Commands about a checkpoint on disk: inspect, pack, verify, synth."""

import argparse
import sys
from pathlib import Path

from flashmoe_lab.checkpoint.pack import PackPlan, PackSettings, pack
from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.checkpoint.source import Source
from flashmoe_lab.checkpoint.synthetic import SyntheticSource, published_files, write_published
from flashmoe_lab.cli.options import Commands, add_k, add_model, add_quiet, auto_or_bits, bits
from flashmoe_lab.config import Quantization, geometries, read_json
from flashmoe_lab.demo import demo_directory, is_demo, open_checkpoint
from flashmoe_lab.inspection import inspect
from flashmoe_lab.progress import ProgressLine

# inspect


def _add_inspect(commands: Commands) -> None:
    command = commands.add_parser(
        "inspect", help="show a model's geometry and what it costs, without loading weights"
    )
    names = ", ".join(geometries())
    command.add_argument("path", help=f"a checkpoint, a config.json, or one of demo, {names}")
    command.add_argument("--bits", type=int, default=4, help="plan for this many bits (default 4)")
    command.add_argument("--group-size", type=int, default=64)
    add_k(command)
    command.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    quantization = Quantization(bits=options.bits, group_size=options.group_size)
    path = str(demo_directory()) if is_demo(options.path) else options.path
    print(inspect(path, quantization, options.num_experts_per_tok).text())
    return 0


# pack and verify


def _add_pack(commands: Commands) -> None:
    command = commands.add_parser("pack", help="turn a published checkpoint into what runs")
    command.add_argument(
        "source", help="a directory with config.json and .safetensors files, or demo"
    )
    command.add_argument("destination")
    command.add_argument(
        "--bits",
        type=auto_or_bits,
        default="auto",
        help="2, 3, 4, 5, 6 or 8 for the experts, or none to keep them as they are; "
        "default: 4, or what the source is quantised to",
    )
    command.add_argument("--group-size", type=int, default=64, help="32, 64 (default) or 128")
    command.add_argument("--router-bits", type=bits, default=8, help="of the gates (default 8)")
    command.add_argument(
        "--resident-bits", type=int, help="of what stays in memory (default: --bits, at least 4)"
    )
    command.add_argument("--workers", type=int, default=0, help="experts quantised side by side")
    add_quiet(command)
    command.set_defaults(run=_pack)


def _pack(options: argparse.Namespace) -> int:
    source = Source(demo_directory() if is_demo(options.source) else options.source)
    plan = PackPlan.make(source, options.destination, _pack_settings(options, source))
    with ProgressLine("pack", plan.nbytes, options.quiet) as progress:
        pack(plan, progress, options.workers)
    checkpoint = PackedCheckpoint(options.destination)
    skipped = ", ".join(f"{n} {kind}" for kind, n in source.skipped.items())
    print(
        f"{options.destination}: {checkpoint.config.num_hidden_layers} layers, experts "
        f"{checkpoint.label}, {checkpoint.expert_nbytes / 1e9:.2f} GB of experts, "
        f"{checkpoint.resident_nbytes / 1e9:.2f} GB resident"
        + (f"; left aside: {skipped} tensors" if skipped else ""),
        file=sys.stderr,
    )
    return 0


def _pack_settings(options: argparse.Namespace, source: Source) -> PackSettings:
    bits = options.bits
    if bits == "auto":
        bits = None if source.expert_quantization(0) else 4
    return PackSettings.of(bits, options.group_size, options.router_bits, options.resident_bits)


def _add_verify(commands: Commands) -> None:
    command = commands.add_parser("verify", help="read a packed checkpoint, check every checksum")
    add_model(command)
    add_quiet(command)
    command.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.model, options.bits, options.quiet)
    total = checkpoint.resident_nbytes + checkpoint.expert_nbytes
    with ProgressLine("verify", total, options.quiet) as progress:
        problems = list(checkpoint.verify(progress))
    for problem in problems:
        print(f"flashmoe-lab: error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{options.model}: every checksum is right", file=sys.stderr)
    elif is_demo(options.model):
        print(f"remove {checkpoint.path} and it is packed anew", file=sys.stderr)
    return 2 if problems else 0


# synth


def _add_synth(commands: Commands) -> None:
    command = commands.add_parser(
        "synth", help="write a checkpoint of a real geometry with random weights"
    )
    command.add_argument("geometry", help=f"{', '.join(geometries())}, or a config.json")
    command.add_argument("destination")
    command.add_argument("--layers", type=int, help="keep this many layers (default all)")
    command.add_argument(
        "--bits",
        type=bits,
        default=4,
        help="write the packed form at these bits (default 4); "
        "none writes the published layout in bfloat16, to be packed",
    )
    command.add_argument("--group-size", type=int, default=64)
    command.add_argument("--seed", type=int, default=0)
    add_quiet(command)
    command.set_defaults(run=_synth)


def _synth(options: argparse.Namespace) -> int:
    known = geometries()
    config = known.get(options.geometry) or read_json(Path(options.geometry))
    quantization = None
    if options.bits is not None:
        quantization = Quantization(bits=options.bits, group_size=options.group_size)
    source = SyntheticSource(config, options.layers, quantization, options.seed)
    if quantization is None:
        files = published_files(source)
        total = sum(tensor.nbytes for group in files.values() for tensor in group)
        with ProgressLine("synth", total, options.quiet) as progress:
            write_published(source, Path(options.destination), progress)
        return 0
    plan = PackPlan.make(source, options.destination, PackSettings.of(None))
    with ProgressLine("synth", plan.nbytes, options.quiet) as progress:
        pack(plan, progress)
    return 0


COMMANDS = (_add_inspect, _add_pack, _add_verify, _add_synth)
