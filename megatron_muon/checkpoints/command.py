"""`python -m megatron_muon inspect` and `convert`: checkpoints offline, on one CPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from megatron_muon.state_keys import OptimizerKind


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
    parser.add_argument("--from", dest="source_kind", choices=get_args(OptimizerKind), required=True)
    parser.add_argument("--to", dest="target_kind", choices=get_args(OptimizerKind), required=True)
    parser.add_argument(
        "--momentum",
        choices=("exp_avg", "zeros"),
        default="exp_avg",
        help="exp_avg: keep the mean gradient (default); zeros: start from zero",
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
    from megatron_muon.checkpoints.inspection import inspect, print_inspection
    from megatron_muon.checkpoints.reader import Checkpoint
    from megatron_muon.observe.console import progress_bar

    try:
        with progress_bar() as progress:
            found = inspect(Checkpoint(args.checkpoint), norms=not args.no_norms, progress=progress)
    except ValueError as error:
        return fail("inspect", error)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_inspection(found)
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Runs `convert`; returns 0, or 2 if an option, the source or the disk is bad."""
    from megatron_muon.checkpoints.convert import ConversionOptions, convert
    from megatron_muon.observe.console import progress_bar

    options = ConversionOptions(args.source_kind, args.target_kind, args.momentum, args.muon_momentum, args.muon_router)
    try:
        with progress_bar() as progress:
            result = convert(args.source, args.target, options, progress)
    except (ValueError, RuntimeError, OSError) as error:
        return fail("convert", error)
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
            f"their first updates by AdamW are up to {result.restart_factor:.2f} times the usual size, since its step "
            "count continues"
        )
    return 0


def fail(command: str, error: Exception) -> int:
    """Prints an error in one line on standard error; returns the exit code."""
    print(f"megatron_muon {command}: {error}", file=sys.stderr)
    return 2
