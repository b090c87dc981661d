"""Commands about the machine: doctor."""

import argparse
from pathlib import Path

from flashmoe_lab.cli.options import Commands


def _add_doctor(commands: Commands) -> None:
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


COMMANDS = (_add_doctor,)
