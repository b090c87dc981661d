"""The command that writes text: generate."""

import argparse
import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path

from flashmoe_lab.cli.options import Commands
from flashmoe_lab.cli.prompt import prompt_of
from flashmoe_lab.cli.running import add_running, open_engine, run_options
from flashmoe_lab.cli.terminal import follow, show_prefill
from flashmoe_lab.run import Run


def _add_generate(commands: Commands) -> None:
    command = commands.add_parser("generate", help="generate text, with experts read from disk")
    add_running(command, max_tokens=128)
    command.add_argument("--stats", type=Path, help="write the run's figures to this JSON file")
    command.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    if options.stats and not options.stats.absolute().parent.is_dir():
        raise FileNotFoundError(f"{options.stats}: there is no such directory for --stats")
    with open_engine(options) as engine:
        run = engine.stream_generate(
            prompt_of(options, engine),
            progress=show_prefill if sys.stderr.isatty() else None,
            **run_options(options),
        )
        interrupted = follow(run, ids=engine.tokenizer is None)
        print(engine.summary(run), file=sys.stderr)
        if options.stats:
            _write_stats(options.stats, engine.summary(run), run)
        return 130 if interrupted else 0


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


COMMANDS = (_add_generate,)
