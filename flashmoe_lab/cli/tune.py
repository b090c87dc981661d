"""Commands that measure this machine: tune."""

import argparse
import sys

from flashmoe_lab.cli.options import Commands, add_model, add_quiet


def _add_tune(commands: Commands) -> None:
    command = commands.add_parser(
        "tune", help="find the fastest right reader and kernels of this machine, and keep the table"
    )
    add_model(command)
    command.add_argument("--threads", type=int, nargs="+", help="reading threads to try")
    command.add_argument("--split", type=int, nargs="+", help="pieces of a block to try")
    command.add_argument("--repetitions", type=int, default=3, help="of each (default 3)")
    add_quiet(command)
    command.set_defaults(run=_tune)


def _tune(options: argparse.Namespace) -> int:
    from flashmoe_lab.demo import open_checkpoint
    from flashmoe_lab.tune import SPLITS, THREADS, tune

    def told(what: str) -> None:
        if not options.quiet:
            print(f"tune: {what}", file=sys.stderr, flush=True)

    found = tune(
        open_checkpoint(options.model, options.bits),
        threads=options.threads or THREADS,
        splits=options.split or SPLITS,
        repetitions=options.repetitions,
        told=told,
    )
    print(found.table())
    chosen = ", ".join(f"{name}={value!r}" for name, value in found.settings.items())
    print(f"\nkept; where no reader is named, such experts are read with {chosen}")
    print(f"fastest kernels: {found.kernels} (FLASHMOE_KERNELS chooses; nothing was changed)")
    return 0


COMMANDS = (_add_tune,)
