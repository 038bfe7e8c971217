"""`python -m megatron_muon inspect` and `convert`: checkpoints offline, on one CPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from megatron_muon.state_keys import Kind

Progress = Callable[[str, int, int], None]


def add_inspect_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `inspect` subcommand; `run` is its action."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect",
        help="parameters, optimizer state and layout of a checkpoint",
        description="Lists what a torch_dist checkpoint holds. Runs no code that the checkpoint may contain.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="directory of a run, or of one iteration")
    parser.add_argument("--no-norms", action="store_true", help="read the metadata only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run_inspect)
    return parser


def add_convert_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `convert` subcommand; `run` is its action."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "convert",
        help="make another optimizer's checkpoint of a checkpoint",
        description=(
            "Converts the optimizer state of a torch_dist checkpoint. adamw: Megatron's DistributedOptimizer; "
            "megatron-muon: Megatron-Core 0.19's layer-wise Muon; distributed-muon: this package."
        ),
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="directory of a run, or of one iteration")
    parser.add_argument("target", type=Path, metavar="DST", help="new directory, for --load")
    parser.add_argument("--from", dest="source_kind", choices=get_args(Kind), required=True)
    parser.add_argument("--to", dest="target_kind", choices=get_args(Kind), required=True)
    parser.add_argument(
        "--momentum",
        choices=("exp_avg", "zeros"),
        default="exp_avg",
        help="exp_avg: keep the mean gradient (default); zeros: start anew",
    )
    parser.add_argument(
        "--muon-momentum",
        type=float,
        default=None,
        help="--muon-momentum of the run that will load it (default: the source's, or 0.95)",
    )
    parser.add_argument(
        "--muon-router", choices=("muon", "adam"), default="muon", help="--muon-router of the run that will load it"
    )
    parser.set_defaults(run=run_convert)
    return parser


def run_inspect(args: argparse.Namespace) -> int:
    """Runs `inspect`; returns 0, or 2 if the checkpoint is bad: then the message is on standard error."""
    from rich.console import Console

    from megatron_muon.checkpoints.inspection import inspect, print_inspection
    from megatron_muon.checkpoints.reader import Checkpoint

    try:
        with _progress() as progress:
            found = inspect(Checkpoint(args.checkpoint), norms=not args.no_norms, progress=progress)
    except ValueError as error:
        return _fail("inspect", error)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        # Into a file or a pipe, rich would fold everything into 80 columns.
        print_inspection(found, Console() if sys.stdout.isatty() else Console(width=150))
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Runs `convert`; returns 0, or 2 if an option, the source or the disk is bad."""
    from megatron_muon.checkpoints.convert import Options, convert

    options = Options(args.source_kind, args.target_kind, args.momentum, args.muon_momentum, args.muon_router)
    try:
        with _progress() as progress:
            result = convert(args.source, args.target, options, progress)
    except (ValueError, RuntimeError, OSError) as error:
        return _fail("convert", error)
    print(f"wrote {result.directory}: {result.copied} tensors copied, {result.scaled} scaled, verified")
    if result.squared:
        print(
            f"{result.squared} parameters keep Muon's mean gradient as exp_avg; their exp_avg_sq is one number per "
            "matrix, by which AdamW's first update has an RMS of 0.2, as Muon's"
        )
    if result.fresh:
        print(f"{len(result.fresh)} parameters start with an optimizer state of zeros")
    if result.restart_factor is not None:
        print(
            f"their first updates by AdamW are up to {result.restart_factor:.2f} times the usual size: its step count "
            "goes on"
        )
    return 0


def _fail(name: str, error: Exception) -> int:
    print(f"megatron_muon {name}: {error}", file=sys.stderr)
    return 2


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error, gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda key, done, total: bar.update(task, description=key, completed=done, total=total)
