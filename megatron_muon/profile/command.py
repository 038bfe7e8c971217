"""`python -m megatron_muon.profile`: the command line. torch is imported only once a subcommand runs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_muon.profile import inspector, report_command
from megatron_muon.profile.settings import BACKENDS, GROUP_KINDS, LinkSettings

_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand named in `argv` (default: the process's arguments) and returns its exit code.

    Raises:
        SystemExit: If the command line is invalid, or help is asked for.
    """
    parser = argparse.ArgumentParser(prog="python -m megatron_muon.profile", description="Bandwidth of links and runs.")
    subparsers = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")
    _add_links_parser(subparsers)
    report_command.add_report_parser(subparsers)
    inspector.add_inspector_parser(subparsers)
    args = parser.parse_args(argv)
    return int(args.run(args))


def size_bytes(text: str) -> int:
    """A size as nccl-tests takes it: a number, with K, M or G for powers of 1024; 0 is allowed.

    Raises:
        ArgumentTypeError: If it is not one.
    """
    suffix = text[-1:].upper()
    number, factor = (text[:-1], _SUFFIXES[suffix]) if suffix in _SUFFIXES else (text, 1)
    try:
        value = int(float(number) * factor)
    except (ValueError, OverflowError):
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size in bytes such as 8, 64K or 1G")
    return value


def _add_links_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "links",
        help="measure a layout's process groups, a plan's exchange on them, and every pair of ranks",
        description=(
            "Measures what Distributed Muon's exchange reaches on the process groups of a layout, and which ranks and "
            "links are slow. Start it with torchrun as the run is started, one process for each GPU; over Gloo it runs "
            "on CPUs. For everything else about collectives, use NVIDIA's nccl-tests."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=_run_links)
    defaults = {f.name: f.default for f in dataclasses.fields(LinkSettings)}

    def add(group: Any, *flags: str, **settings: Any) -> None:
        group.add_argument(*flags, default=defaults[flags[-1][2:].replace("-", "_")], **settings)

    layout = parser.add_argument_group("layout, as in Megatron; data parallelism takes the rest of the ranks")
    for flag, text in (("--tp", "tensor"), ("--pp", "pipeline"), ("--ep", "expert")):
        add(layout, flag, type=int, metavar="N", help=f"{text}-parallel size")
    add(layout, "--etp", type=int, metavar="N", help="expert-tensor-parallel size; None: --tp")
    add(layout, "--instances", type=int, metavar="N", help="distributed-optimizer instances")
    what = parser.add_argument_group("what to measure")
    add(what, "--groups", nargs="+", choices=GROUP_KINDS, help="None: all of more than one rank")
    add(what, "--model", help="model whose plan is replayed, as for `megatron_muon plan`")
    add(what, "--exchange-dtype", help="dtype of the model's exchange, bf16 or fp32; None: Muon's default")
    add(what, "--transfers", type=int, metavar="N", help="measure the N transfers of the plan that move most")
    add(what, "--pair-bytes", type=size_bytes, metavar="SIZE", help="between every two ranks; 0: leave them out")
    how = parser.add_argument_group("how, with nccl-tests' letters")
    add(how, "-b", "--min-bytes", type=size_bytes, metavar="SIZE", help="smallest size of an all-to-all")
    add(how, "-e", "--max-bytes", type=size_bytes, metavar="SIZE", help="largest size")
    add(how, "-w", "--warmup", type=int, metavar="N", help="calls before those that are timed")
    add(how, "-n", "--iterations", type=int, metavar="N", help="calls that are timed")
    add(how, "--backend", choices=BACKENDS, help="auto: nccl where CUDA works, else gloo")
    add(how, "--json", type=Path, metavar="FILE", help="write the links file for --muon-links and `plan --links`")


def _run_links(args: argparse.Namespace) -> int:
    from megatron_muon.profile import links_command

    values = {key: value for key, value in vars(args).items() if key != "run"}
    values["groups"] = None if values["groups"] is None else tuple(values["groups"])
    try:
        settings = LinkSettings(**values)
    except ValueError as error:
        print(f"megatron_muon links: {error}", file=sys.stderr)
        return 2
    return links_command.run(settings)
