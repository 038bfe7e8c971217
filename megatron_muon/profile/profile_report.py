"""`python -m megatron_muon.profile report DIR`: one page about a run that was trained with --muon-profile.

Reads the traces of all ranks and writes, in DIR/report: index.html, which holds its pictures and opens without a
network; a PNG of each; and trace.json, all ranks on one clock, for https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_muon.observe.page import items, page, paragraph, section, table
from megatron_muon.observe.timing.findings import find
from megatron_muon.observe.timing.steps import median_step
from megatron_muon.observe.timing.table import caption, rows
from megatron_muon.profile import plots
from megatron_muon.profile.merge import Merged, merge

DIRECTORY = "report"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 2 if DIR holds no profile.

    Args:
        argv: The words after `report`; those of the process by default.

    Raises:
        SystemExit: If the command line is bad, or help is asked for.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_muon.profile report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="--muon-profile-dir of the run")
    parser.add_argument("--out", type=Path, help=f"where to write (default: DIR/{DIRECTORY})")
    parser.add_argument("--step", type=int, help="the step to show in detail (default: one of median length)")
    args = parser.parse_args(argv)
    try:
        merged = merge(args.directory)
        path = write(merged, args.out or args.directory / DIRECTORY, title=str(args.directory), step=args.step)
    except (ValueError, OSError) as error:
        print(f"report: {error}")
        return 2
    print(f"{len(merged.records)} profiled steps of {len(merged.traces)} ranks: {path}")
    for note in merged.notes:
        print(f"note: {note}")
    return 0


def write(merged: Merged, out: Path, *, title: str, step: int | None = None) -> Path:
    """Writes the page, its pictures and the merged trace.

    Args:
        merged: The run.
        out: Directory, made if it is missing.
        title: Of the page.
        step: The step to show in detail; None takes one of median length.

    Returns:
        The page's path.

    Raises:
        ValueError: If `step` was not profiled.
    """
    shown = _shown_step(merged, step)
    summary = median_step(merged.summaries())
    facts = merged.facts
    out.mkdir(parents=True, exist_ok=True)
    records = [record for of_step in merged.records.values() for record in of_step.values()]
    first, *rest = find(summary, facts)
    body = [items([f"Bottleneck: {first}", *map(str, rest)])]
    if merged.notes:
        body.append(items([f"Note: {note}" for note in merged.notes]))
    body.append(f"<h2>Phases, median of {summary.steps} steps</h2>")
    header = ("phase", "ms, mean", "slowest", "rank", "slowest / mean", "most on a rank", "rate", "share of rate")
    body.append(
        table(
            header,
            [
                (label, f"{s.mean:.2f}", f"{s.largest:.2f}", str(s.rank), f"{s.imbalance:.2f}", most, rate, share)
                for label, s, most, rate, share in rows(summary, facts)
            ],
        )
    )
    body.append(paragraph(caption(summary)))
    for name, heading, text, picture in (
        ("timeline", "Timeline", _TIMELINE, plots.timeline(merged, shown)),
        ("phases", "Ranks", _RANKS, plots.phases(merged.records[shown], shown)),
        ("roofline", "Roofline of Newton-Schulz", _ROOFLINE, plots.roofline(records, facts)),
        ("bandwidth", "Bandwidth against peak", _BANDWIDTH, plots.bandwidths(records, facts)),
    ):
        if picture is not None:
            (out / f"{name}.png").write_bytes(picture)
            body.append(section(heading, text, picture))
    body.append(_ranks_table(merged))
    merged.write_trace(out / "trace.json")
    path = out / "index.html"
    steps = f"steps {min(merged.records)} to {max(merged.records)}, {len(merged.records)} profiled"
    line = f"{steps}; {len(merged.traces)} of {facts.world_size} ranks, {facts.device_name}; rounds: {facts.rounds}"
    path.write_text(page(title, line, body), encoding="utf-8")
    return path


def _shown_step(merged: Merged, step: int | None) -> int:
    """The step asked for, or the one whose length is the median's, of those that most ranks have profiled."""
    if step is None:
        lengths = {summary.step: summary.wall_ms.largest for summary in merged.summaries() if summary.step > 1}
        if not lengths:
            return max(merged.records)
        middle = statistics.median_low(lengths.values())
        return next(step for step, length in lengths.items() if length == middle)
    if step not in merged.records:
        profiled = ", ".join(map(str, sorted(merged.records)[:8]))
        raise ValueError(f"--step: got {step}, expected a profiled step: {profiled}, ...")
    return step


def _ranks_table(merged: Merged) -> str:
    last = {rank: record for _, of_step in sorted(merged.records.items()) for rank, record in of_step.items()}
    cells = [
        (
            str(rank),
            str(merged.traces[rank].info.get("host")),
            str(record.step),
            f"{record.wall_ms:.2f}",
            f"{record.ns_ms:.2f}",
            f"{(record.flops + record.team_flops) / 1e9:.4g}",
            str(record.sent_bytes),
            str(record.planned_bytes),
            str(record.team_bytes),
            str(record.planned_team_bytes),
        )
        for rank, record in sorted(last.items())
    ]
    header = (
        "rank", "host", "last step", "ms", "Newton-Schulz ms", "GFLOP", "sent B", "planned B", "teams sent B",
        "planned B",
    )  # fmt: skip
    return f"<details><summary>Ranks, in their last profiled step</summary>{table(header, cells)}</details>"


_TIMELINE = (
    "What each rank did in one step. An exchange is hidden while its bar lies below Newton-Schulz's; dark gray above "
    "it is time that is lost. Ranks of different hosts are aligned at an all-gather after each step."
)
_RANKS = "The same step added up. A rank that waits long waits for one that computes long, or for the links."
_ROOFLINE = (
    "Points near the flat line are bound by arithmetic, points near the slope by memory. Points far below both are "
    "bound by neither: matrices too small to fill the device, or starting operations."
)
_BANDWIDTH = (
    "Of a collective the time of the rank that issued it last, who waits for no other. Small messages are bound by "
    "latency and lie on a slope; large ones should come near the lines."
)


if __name__ == "__main__":
    raise SystemExit(main())
