"""`python -m megatron_muon.profile`: the command line. torch is imported only once a subcommand runs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_muon.profile.settings import BACKENDS, DTYPE_BYTES, GROUP_KINDS, SWEPT, LinkSettings, Sweep

_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand named in `argv` (default: the process's arguments) and returns its exit code.

    Raises:
        SystemExit: If the command line is bad, or help is asked for.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["report"]:
        # It has a parser of its own.
        from megatron_muon.profile import profile_report as report

        return report.main(words[1:])
    args = _parser().parse_args(words)
    return int(args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron_muon.profile", description="Bandwidth profiling.")
    subparsers = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")
    _add_links_parser(subparsers)
    subparsers.add_parser("report", help="merge what a run with --muon-profile wrote into one HTML page")
    _add_facts_parser(subparsers)
    return parser


def size_bytes(text: str) -> int:
    """A size as nccl-tests takes it: a number, with K, M or G for powers of 1024; 0 is allowed.

    Raises:
        ArgumentTypeError: If it is none.
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
        help="measure collectives over a layout's process groups, as nccl-tests does",
        description=(
            "Measures the collectives of Distributed Muon and its neighbours over a layout's process groups. Run it "
            "under torchrun with as many processes as the layout has ranks: one for each GPU, or over Gloo on a CPU."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=_run_links)
    defaults = {f.name: f.default for f in (*dataclasses.fields(LinkSettings), *dataclasses.fields(Sweep))}

    def add(group: Any, *flags: str, **settings: Any) -> None:
        group.add_argument(*flags, default=defaults[flags[-1][2:].replace("-", "_")], **settings)

    layout = parser.add_argument_group("layout, as in Megatron; data parallelism takes the rest of the ranks")
    for flag, text in (("--tp", "tensor"), ("--pp", "pipeline"), ("--ep", "expert")):
        add(layout, flag, type=int, metavar="N", help=f"{text}-parallel size")
    add(layout, "--etp", type=int, metavar="N", help="expert-tensor-parallel size; None: --tp")
    add(layout, "--instances", type=int, metavar="N", help="distributed-optimizer instances")
    what = parser.add_argument_group("what to measure")
    add(what, "--groups", nargs="+", choices=GROUP_KINDS, help="None: all of more than one rank")
    add(what, "--collectives", nargs="*", choices=SWEPT, help="those swept over sizes")
    add(what, "--model", help="whose plan gives all_to_allv its split sizes: as for `megatron_muon plan`")
    add(what, "--traffic", type=Path, metavar="FILE", help="split sizes that --save-traffic or a run recorded")
    add(what, "--save-traffic", type=Path, metavar="FILE", help="write the split sizes of --model's plan")
    add(what, "--exchange-dtype", help="of --model's plan, bf16 or fp32; None: Muon's default")
    add(what, "--rounds", type=int, metavar="N", help="measure the N rounds of the plan that move most")
    add(what, "--pair-bytes", type=size_bytes, metavar="SIZE", help="between every two ranks; 0: leave them out")
    how = parser.add_argument_group("how, with nccl-tests' letters")
    add(how, "-b", "--min-bytes", type=size_bytes, metavar="SIZE", help="smallest size")
    add(how, "-e", "--max-bytes", type=size_bytes, metavar="SIZE", help="largest size")
    add(how, "-f", "--factor", type=int, metavar="N", help="from one size to the next")
    add(how, "-d", "--dtype", choices=tuple(DTYPE_BYTES), help="of the elements")
    add(how, "-w", "--warmup", type=int, metavar="N", help="calls before those that are timed")
    add(how, "-n", "--iterations", type=int, metavar="N", help="calls that are timed")
    add(how, "--backend", choices=BACKENDS, help="auto: nccl where CUDA works, else gloo")
    output = parser.add_argument_group("output")
    add(output, "--json", type=Path, metavar="FILE", help="write everything, with each rank's times")
    add(output, "--plot", type=Path, metavar="FILE", help="draw bus bandwidth over size")
    add(output, "--flight-recorder", type=Path, metavar="DIR", help="write each rank's Flight Recorder dump")


def _run_links(args: argparse.Namespace) -> int:
    from megatron_muon.profile import links_command

    values = {key: value for key, value in vars(args).items() if key != "run"}
    try:
        sweep = Sweep(**{f.name: values.pop(f.name) for f in dataclasses.fields(Sweep)})
        for name in ("groups", "collectives"):
            values[name] = None if values[name] is None else tuple(values[name])
        settings = LinkSettings(sweep=sweep, **values)
    except ValueError as error:
        print(f"links: {error}", file=sys.stderr)
        return 2
    return links_command.run(settings)


def _add_facts_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "facts",
        help="read Flight Recorder dumps, NCCL Inspector files and NCCL_DEBUG=INFO logs",
        description=(
            "Sums up what NCCL and torch wrote into a directory: Flight Recorder dumps (JSON or pickle), NCCL "
            "Inspector JSON lines, NCCL_DEBUG=INFO logs. Files are recognized by their content."
        ),
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="searched with all below it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.set_defaults(run=_run_facts)


def _run_facts(args: argparse.Namespace) -> int:
    from megatron_muon.profile import nccl_facts

    return nccl_facts.run(args.directory, args.json)
