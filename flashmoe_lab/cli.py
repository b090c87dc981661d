"""The command line: `flashmoe-lab COMMAND`. Every command is a thin cover over the package.

Text goes to standard output, progress and summaries to standard error. What cannot be done ends
with one line and exit code 2; an interrupt with 130, a closed pipe with 141.
"""

import argparse
import json
import os
import resource
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flashmoe_lab.checkpoint.pack import PackPlan, PackSettings, pack
from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.checkpoint.source import Source
from flashmoe_lab.checkpoint.synthetic import SyntheticSource, published_files, write_published
from flashmoe_lab.config import Quantization, geometries, read_json
from flashmoe_lab.engine import load
from flashmoe_lab.generation import PREFILL_CHUNK
from flashmoe_lab.inspection import inspect
from flashmoe_lab.progress import ProgressLine
from flashmoe_lab.run import Run
from flashmoe_lab.storage.policy import POLICIES
from flashmoe_lab.storage.ways import READERS
from flashmoe_lab.version import __version__
from flashmoe_lab.weights import DTYPES

# What a model writes must not steer the terminal.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160))}
for _kept in "\t\n":
    del _CONTROLS[ord(_kept)]
EXPECTED_ERRORS = (ValueError, OSError, MemoryError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _show_warning
            return options.run(options)
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except EXPECTED_ERRORS as error:
        print(f"flashmoe-lab: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nflashmoe-lab: interrupted; run the same command to go on", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="flashmoe-lab",
        description="Run Mixture-of-Experts models larger than memory, experts streamed from SSD.",
    )
    top.add_argument("--version", action="version", version=f"flashmoe-lab {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_pack, _add_verify, _add_synth, _add_generate, _add_doctor):
        add(commands)
    return top


# inspect


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "inspect", help="show a model's geometry and what it costs, without loading weights"
    )
    names = ", ".join(geometries())
    command.add_argument("path", help=f"a checkpoint, a config.json, or one of {names}")
    command.add_argument("--bits", type=int, default=4, help="plan for this many bits (default 4)")
    command.add_argument("--group-size", type=int, default=64)
    _add_k(command)
    command.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    quantization = Quantization(bits=options.bits, group_size=options.group_size)
    print(inspect(options.path, quantization, options.num_experts_per_tok).text())
    return 0


# pack and verify


def _add_pack(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("pack", help="turn a published checkpoint into what runs")
    command.add_argument("source", help="a directory with config.json and .safetensors files")
    command.add_argument("destination")
    command.add_argument(
        "--bits",
        type=_auto_or_bits,
        default="auto",
        help="2, 3, 4, 5, 6 or 8 for the experts, or none to keep them as they are; "
        "default: 4, or what the source is quantised to",
    )
    command.add_argument("--group-size", type=int, default=64, help="32, 64 (default) or 128")
    command.add_argument("--router-bits", type=_bits, default=8, help="of the gates (default 8)")
    command.add_argument(
        "--resident-bits", type=int, help="of what stays in memory (default: --bits, at least 4)"
    )
    command.add_argument("--workers", type=int, default=0, help="experts quantised side by side")
    _add_quiet(command)
    command.set_defaults(run=_pack)


def _pack(options: argparse.Namespace) -> int:
    source = Source(options.source)
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


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("verify", help="read a packed checkpoint, check every checksum")
    command.add_argument("path")
    _add_quiet(command)
    command.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    checkpoint = PackedCheckpoint(options.path)
    total = checkpoint.resident_nbytes + checkpoint.expert_nbytes
    with ProgressLine("verify", total, options.quiet) as progress:
        problems = list(checkpoint.verify(progress))
    for problem in problems:
        print(f"flashmoe-lab: error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{options.path}: every checksum is right", file=sys.stderr)
    return 2 if problems else 0


# synth


def _add_synth(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "synth", help="write a checkpoint of a real geometry with random weights"
    )
    command.add_argument("geometry", help=f"{', '.join(geometries())}, or a config.json")
    command.add_argument("destination")
    command.add_argument("--layers", type=int, help="keep this many layers (default all)")
    command.add_argument(
        "--bits",
        type=_bits,
        default=4,
        help="write the packed form at these bits (default 4); "
        "none writes the published layout in bfloat16, to be packed",
    )
    command.add_argument("--group-size", type=int, default=64)
    command.add_argument("--seed", type=int, default=0)
    _add_quiet(command)
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


# generate


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("generate", help="generate text, with experts read from disk")
    command.add_argument("model", help="a packed checkpoint")
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to go on from; - reads standard input")
    prompt.add_argument("--prompt-ids", type=_ids, help="the same as token ids: 1,2,3")
    command.add_argument("--max-tokens", type=int, default=128)
    _add_k(command)
    command.add_argument("--bank-gb", type=float, help="memory for experts, in 10**9 bytes")
    command.add_argument("--resident", action="store_true", help="hold every expert in memory")
    command.add_argument("--reader", choices=list(READERS), default="pread")
    command.add_argument("--threads", type=int, default=8, help="reading threads")
    command.add_argument("--split", type=int, default=1, help="pieces that a block is read in")
    command.add_argument("--policy", choices=list(POLICIES), default="lru")
    command.add_argument("--dtype", choices=list(DTYPES), help="of activations")
    command.add_argument("--prefill-chunk", type=int, default=PREFILL_CHUNK)
    command.add_argument("--verify", action="store_true", help="check each block when first read")
    command.add_argument("--checks", action="store_true", help="stop at the first NaN")
    command.add_argument("--stats", type=Path, help="write the run's figures to this JSON file")
    for name, default in (("temperature", 0.0), ("top-p", 1.0), ("min-p", 0.0)):
        command.add_argument(f"--{name}", type=float, default=default)
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--repetition-penalty", type=float, default=1.0)
    command.add_argument("--seed", type=int)
    command.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    if options.stats and not options.stats.absolute().parent.is_dir():
        raise FileNotFoundError(f"{options.stats}: there is no such directory for --stats")
    with load(
        options.model,
        bank_gb=options.bank_gb,
        resident=options.resident,
        reader=options.reader,
        threads=options.threads,
        split=options.split,
        policy=options.policy,
        dtype=options.dtype,
        num_experts_per_tok=options.num_experts_per_tok,
        verify=options.verify,
        checks=options.checks,
    ) as engine:
        prompt = options.prompt_ids or options.prompt
        if prompt == "-":
            prompt = sys.stdin.read()
        run = engine.stream_generate(
            prompt,
            options.max_tokens,
            prefill_chunk=options.prefill_chunk,
            progress=_prefill_progress if sys.stderr.isatty() else None,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
        )
        interrupted = False
        try:
            for step in run:
                text = step.text if engine.tokenizer else f"{step.token} "
                print(text.translate(_CONTROLS), end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        print(flush=True)
        print(engine.summary(run), file=sys.stderr)
        if options.stats:
            _write_stats(options.stats, engine.summary(run), run)
        return 130 if interrupted else 0


def _prefill_progress(done: int, total: int) -> None:
    end = "\r" if done < total else "\r\x1b[K"
    words = f"prefill {done} of {total} tokens" if done < total else ""
    print(words, end=end, file=sys.stderr, flush=True)


def _write_stats(file: Path, summary: str, run: Run) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {
        "summary": summary,
        "finish_reason": run.finish_reason,
        "tokens": run.tokens,
        "prefill": asdict(run.stats.prefill),
        "decode": asdict(run.stats.decode),
        "peak_rss_nbytes": peak if sys.platform == "darwin" else peak * 1024,
    }
    file.write_text(json.dumps(figures, indent=1) + "\n")


# doctor


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("doctor", help="check on this machine what the package relies on")
    command.add_argument("--directory", default=".", help="where test files are written")
    command.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from flashmoe_lab.doctor import examine

    failed = 0
    for finding in examine(Path(options.directory)):
        print(finding.line(), flush=True)
        failed += finding.state == "failed"
    return 1 if failed else 0


# Options shared by commands


def _add_k(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-K",
        "--num-experts-per-tok",
        type=int,
        help="experts of a token (default: the model's own)",
    )


def _add_quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quiet", action="store_true", help="draw no progress line")


def _bits(text: str) -> int | None:
    if text == "none":
        return None
    if text.isdecimal() and int(text) in Quantization.BITS:
        return int(text)
    allowed = ", ".join(map(str, Quantization.BITS))
    raise argparse.ArgumentTypeError(f"{text!r}; allowed are {allowed} and none")


def _auto_or_bits(text: str) -> int | str | None:
    return text if text == "auto" else _bits(text)


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers like 1,2,3") from None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"flashmoe-lab: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
