"""`python -m megatron_muon`: the table of subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from megatron_muon.checkpoints import command as checkpoints
from megatron_muon.checkpoints.huggingface import command as huggingface
from megatron_muon.estimate.command import add_plan_parser
from megatron_muon.profile.report_command import add_report_parser

# Each adds a parser with a default `run`, its action. What an action needs is imported only when it runs.
SUBCOMMANDS: tuple[Callable[[Any], argparse.ArgumentParser], ...] = (
    add_plan_parser,
    add_report_parser,
    checkpoints.add_inspect_parser,
    checkpoints.add_convert_parser,
    huggingface.add_export_parser,
    huggingface.add_import_parser,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand named in `argv` (default: the process's arguments) and returns its exit code.

    Raises:
        SystemExit: If the command line is bad, or help is asked for.
    """
    parser = argparse.ArgumentParser(prog="megatron_muon", description="Tools around Distributed Muon.")
    subparsers = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")
    for add_parser in SUBCOMMANDS:
        add_parser(subparsers)
    args = parser.parse_args(argv)
    return int(args.run(args))
