"""`python -m megatron_muon report RUN [RUN ...]`: one HTML page about a run, or about several side by side.

A run is a directory. Below it are looked for: muon_metrics.jsonl (--muon-log-interval), the ranks' traces
(--muon-profile) and TensorBoard's files, for losses. The page holds everything and opens without a network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

PAGE_NAME = "report.html"


def add_report_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `report` subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="one HTML page about a run, or several: losses, metrics, where the time goes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="directory of a run; several are compared")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"page to write (default: {PAGE_NAME} in the first RUN)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="profiled step to show (default: one of median length)")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="also write all ranks' traces on one clock, for ui.perfetto.dev"
    )
    parser.set_defaults(run=_run)
    return parser


def _run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns 0, or 2 with a message on standard error if a run or an option does not fit."""
    from megatron_muon.observe.console import console, print_list, progress_bar
    from megatron_muon.profile.report import make_page
    from megatron_muon.profile.run_files import names_of, read_run

    try:
        names = names_of(args.runs)
        runs = []
        with progress_bar() as move:
            for number, (path, name) in enumerate(zip(args.runs, names, strict=True)):
                move(f"reading {name}", number, len(names) + 1)
                runs.append(read_run(path, name))
            move("drawing", len(names), len(names) + 1)
            content = make_page(runs, step=args.step)
        out = args.out or runs[0].directory / PAGE_NAME
        out.write_text(content, encoding="utf-8")
        if args.trace is not None:
            if len(runs) != 1 or runs[0].profile is None:
                raise ValueError(f"--trace: got {args.trace}, expected exactly one run, with traces of --muon-profile")
            runs[0].profile.write_trace(args.trace)
    except (ValueError, OSError) as error:
        print(f"megatron_muon report: {error}", file=sys.stderr)
        return 2
    to = console()
    for each in runs:
        parts = [f"{len(each.records)} logged steps"] if each.records else []
        parts += (
            [f"{len(each.profile.records)} profiled steps of {len(each.profile.traces)} ranks"] if each.profile else []
        )
        parts += [f"{len(curve)} points of {title.lower()}" for title, curve in each.losses.items()]
        to.print(f"{each.name}: {', '.join(parts)}", soft_wrap=True)
        print_list(to, each.notes)
    to.print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    return 0
