"""Commands about the record of a run: trace makes one, plot draws it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe_lab.cli.options import Commands
from flashmoe_lab.cli.prompt import prompt_of
from flashmoe_lab.cli.running import add_running, open_engine, run_options
from flashmoe_lab.cli.terminal import follow
from flashmoe_lab.units import format_nbytes

if TYPE_CHECKING:
    from flashmoe_lab.trace import Trace

_MODES = ("flow", "stages")
_FORMATS = ("png", "svg", "pdf")
_EXPORTS = ("csv", "chrome", "libcachesim")

# trace


def _add_trace(commands: Commands) -> None:
    command = commands.add_parser("trace", help="generate text and keep a record of the run")
    add_running(command, max_tokens=64)
    command.add_argument("--out", type=Path, required=True, help="directory for the tables")
    command.add_argument(
        "--mode",
        choices=_MODES,
        default="flow",
        help="flow (default) adds no waiting; stages times every stage exactly and is slower",
    )
    command.add_argument(
        "--record",
        metavar="PATTERN",
        action="append",
        default=[],
        help="keep arrays of stages too: 'layers.*.mixer.decay'; may be repeated",
    )
    command.add_argument("--record-gb", type=float, default=1.0, help="room for those (default 1)")
    command.add_argument(
        "--export",
        choices=_EXPORTS,
        action="append",
        default=[],
        help="beside Parquet: csv, chrome (trace.json.gz, opens in Perfetto) or libcachesim",
    )
    command.set_defaults(run=_trace)


def _trace(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)  # a place that cannot be is found out now
    with open_engine(options) as engine:
        run = engine.stream_generate(
            prompt_of(options, engine),
            trace=options.mode,
            record=options.record,
            record_gb=options.record_gb,
            **run_options(options),
        )
        if options.record:
            words = f"arrays: up to {format_nbytes(run.record_nbytes)}"
            print(f"{words} of {options.record_gb:g} GB allowed", file=sys.stderr)
        try:
            interrupted = follow(run, ids=engine.tokenizer is None)
            print(engine.summary(run), file=sys.stderr)
        finally:  # a run that fails leaves the record of what it did until then
            if run.trace is not None:
                _write(run.trace, options.out, options.export)
                words = f"written; to draw it: flashmoe-lab plot {options.out}"
                print(f"{options.out}: {words}", file=sys.stderr)
    return 130 if interrupted else 0


def _write(trace: "Trace", out: Path, exports: Sequence[str]) -> None:
    from flashmoe_lab.trace import export

    trace.write(out)
    if "csv" in exports:
        export.write_csv(trace, out)
    if "chrome" in exports:
        export.write_chrome(trace, out / "trace.json.gz")
    if "libcachesim" in exports:
        export.write_libcachesim(trace, out / "libcachesim.csv")


# plot


def _add_plot(commands: Commands) -> None:
    command = commands.add_parser("plot", help="draw every figure of a recorded run")
    command.add_argument("trace", type=Path, help="a directory that `trace` wrote")
    command.add_argument("--out", type=Path, help="directory for the figures (default: the same)")
    command.add_argument(
        "--format", choices=_FORMATS, action="append", help="default: png and svg; may be repeated"
    )
    command.add_argument(
        "--figure", action="append", metavar="NAME", help="only this one; may be repeated"
    )
    command.set_defaults(run=_plot)


def _plot(options: argparse.Namespace) -> int:
    from flashmoe_lab.plots import FIGURES, draw_all
    from flashmoe_lab.trace import Trace

    out, figures = options.out or options.trace, options.figure or list(FIGURES)
    if unknown := set(figures) - set(FIGURES):
        raise ValueError(f"figure {min(unknown)!r} is unknown; there are {', '.join(FIGURES)}")
    trace = Trace.read(options.trace)
    for name, plot, why_not in draw_all(trace, out, options.format or ("png", "svg"), figures):
        print(f"{out / name}: {plot.title}" if plot else f"{name}: not drawn: {why_not}")
    return 0


COMMANDS = (_add_trace, _add_plot)
