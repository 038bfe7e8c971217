"""`facts DIR`: finds Flight Recorder dumps, NCCL Inspector files and NCCL logs in a directory and sums them up.

What is in such files is not trusted: text is printed without control characters and without markup.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_muon.profile import flight_recorder, inspector, nccl_log

Kind = Literal["flight_recorder", "inspector", "nccl_log"]
_PROBE_BYTES = 1 << 20


def kind_of(path: Path) -> Kind | None:
    """What a file is, by its first bytes; None if nothing of these.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(_PROBE_BYTES)
    if start[:1] == b"\x80" and b"pg_config" in start:
        return "flight_recorder"
    if start[:1] == b"{":
        if b'"coll_perf"' in start:
            return "inspector"
        return "flight_recorder" if b'"comm_lib_version"' in start or b'"pg_config"' in start else None
    return "nccl_log" if any(word in start for word in (b"NCCL INFO", b"NCCL WARN", b"NCCL version")) else None


@dataclasses.dataclass
class Facts:
    """What a directory has.

    Attributes:
        dumps: Flight Recorder's, by rank.
        operations: NCCL Inspector's.
        log: Of all NCCL logs together; None if there is none.
        notes: What to know about files.
        problems: Files that could not be read.
    """

    dumps: list[flight_recorder.Dump] = dataclasses.field(default_factory=list)
    operations: list[inspector.Operation] = dataclasses.field(default_factory=list)
    log: nccl_log.LogFacts | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.dumps or self.operations or self.log)


def collect(directory: Path) -> Facts:
    """Reads every file below a directory that is recognized.

    Raises:
        ValueError: If it is no directory.
    """
    if not directory.is_dir():
        raise ValueError(f"DIR: got {directory}, expected a directory with dumps or logs")
    facts = Facts()
    logs = []
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        try:
            kind = kind_of(path)
            if kind == "flight_recorder":
                facts.dumps.append(flight_recorder.load_dump(path))
            elif kind == "inspector":
                operations, notes = inspector.load_operations(path)
                facts.operations += operations
                facts.notes += notes
            elif kind == "nccl_log":
                logs.append(path)
        except (OSError, ValueError) as error:
            facts.problems.append(str(error))
    if logs:
        facts.log = nccl_log.read_log(logs)
    facts.dumps.sort(key=lambda dump: dump.rank)
    ranks = [dump.rank for dump in facts.dumps]
    if len(set(ranks)) < len(ranks):
        facts.problems.append(
            f"{directory}: got dumps of ranks {ranks}, expected one of each; give one job's directory"
        )
    return facts


def run(directory: Path, json_path: Path | None) -> int:
    """Prints, and writes JSON if asked to.

    Returns:
        The exit code: 0; 1 if a file is damaged, whose name is on standard error, or JSON could not be written; 2 if
        there is nothing to read.
    """
    try:
        facts = collect(directory)
        if facts.is_empty and not facts.problems:
            raise ValueError(
                f"DIR: {directory} has no Flight Recorder dump, no NCCL Inspector file and no NCCL log; see "
                "docs/profiling.md for how to record them"
            )
    except ValueError as error:
        print(f"facts: {printable(str(error))}", file=sys.stderr)
        return 2
    _print(facts)
    if json_path is not None:
        try:
            json_path.write_text(json.dumps(to_json(facts)), encoding="utf-8")
        except OSError as error:
            facts.problems.append(f"--json: {error}")
    for problem in facts.problems:
        print(f"facts: {printable(problem)}", file=sys.stderr)
    return int(bool(facts.problems))


def printable(text: str) -> str:
    """Text without what could steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def to_json(facts: Facts) -> dict[str, Any]:
    """Everything that is printed, as plain values."""
    log = facts.log
    return {
        "version": 1,
        "flight_recorder": {
            "ranks": [dump.rank for dump in facts.dumps],
            "calls": [dataclasses.asdict(c) for c in flight_recorder.calls(facts.dumps)],
            "findings": flight_recorder.findings(facts.dumps),
        },
        "inspector": {
            "summaries": [dataclasses.asdict(s) for s in inspector.summaries(facts.operations)],
            "late_ranks": [dataclasses.asdict(r) for r in inspector.late_ranks(facts.operations)],
        },
        "nccl_log": None
        if log is None
        else {
            "versions": sorted(log.versions),
            "hosts": sorted(log.hosts),
            "communicators": log.communicators,
            "networks": sorted(log.networks),
            "links": [[*key, count] for key, count in sorted(log.links.items())],
            "algorithms": [[*key, count] for key, count in sorted(log.algorithms.items())],
            "graphs": [list(graph) for graph in sorted(log.graphs)],
            "warnings": dict(log.warnings),
            "hints": nccl_log.hints(log),
        },
        "notes": facts.notes,
        "problems": facts.problems,
    }


def _print(facts: Facts) -> None:
    from rich.console import Console

    # Into a file or a pipe, rich would fold everything into 80 columns.
    console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 130)
    if facts.dumps:
        _print_flight_recorder(console, facts.dumps)
    if facts.operations:
        _print_inspector(console, facts.operations)
    if facts.log is not None:
        _print_log(console, facts.log)
    for note in facts.notes:
        console.print(printable(note))


def _table(console: Any, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("call", "group", "collective", "transport") else "right")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console.print(table)


def _print_flight_recorder(console: Any, dumps: Sequence[flight_recorder.Dump]) -> None:
    rows = [
        (
            c.name,
            c.group,
            len(c.ranks),
            c.count,
            _bytes(c.bytes),
            "-" if c.duration_ms is None else f"{c.duration_ms:.3f}",
        )
        for c in flight_recorder.calls(dumps)
    ]
    title = f"Flight Recorder: {len(dumps)} ranks, {sum(len(d.entries) for d in dumps)} entries"
    _table(console, title, ("call", "group", "ranks", "calls a rank", "input bytes a rank", "median ms"), rows)
    found = flight_recorder.findings(dumps)
    for text in found or ["all ranks issued and completed the same"]:
        console.print(f"- {printable(text)}")


def _print_inspector(console: Any, operations: Sequence[inspector.Operation]) -> None:
    rows = [
        (
            s.collective,
            f"{s.num_ranks} on {s.num_nodes}",
            s.size_bytes,
            s.count,
            f"{s.median_us:.0f}",
            f"{s.median_busbw_gbps:.1f}",
            f"{s.lowest_busbw_gbps:.1f}",
        )
        for s in inspector.summaries(operations)
    ]
    columns = ("collective", "ranks on nodes", "bytes", "records", "median us", "median busbw", "lowest busbw")
    _table(console, f"NCCL Inspector: {len(operations)} records, busbw in GB/s", columns, rows)
    for late in inspector.late_ranks(operations):
        console.print(
            printable(
                f"- communicator {late.communicator}: rank {late.rank} on {late.host} came last in {late.times_last} "
                f"of {late.count} collectives; the others waited {late.waited_us:.0f} us for it (median)"
            )
        )


def _print_log(console: Any, log: nccl_log.LogFacts) -> None:
    head = f"NCCL log: version {', '.join(sorted(log.versions)) or 'unknown'}, {len(log.hosts)} hosts"
    rows = [
        (name, pairs, sum(count for (_, _, transport), count in log.links.items() if transport == name))
        for name, pairs in nccl_log.slowest_first(log)
    ]
    _table(console, head, ("transport", "rank pairs, one way", "channels"), rows)
    lines = [f"communicators: {', '.join(f'{i} ({n} ranks)' for i, n in sorted(log.communicators.items()))}"]
    lines += [f"{ranks} ranks on {nodes} nodes, {local} on each" for ranks, nodes, local in sorted(log.shapes)]
    lines += [f"network: {', '.join(sorted(log.networks))}"] if log.networks else []
    lines += [f"channels: {c} collective, {n} NVLS, {p} point-to-point" for c, n, p in sorted(log.channels)]
    lines += [f"NCCL reckons with {best:g} GB/s a GPU, {total:g} in all" for best, total in sorted(log.systems)]
    lines += [
        f"{pattern}: {count} channels, {near:g} GB/s each over {near_type}, {far:g} over {far_type}"
        for pattern, count, near, far, near_type, far_type in sorted(log.graphs)
    ]
    lines += [f"GPU Direct RDMA {'on' if on else 'off'}: {name}" for name, on in sorted(log.rdma)]
    lines += [
        f"{name} of {size} bytes: {algo}, {protocol} ({count} times)"
        for (name, size, algo, protocol), count in sorted(log.algorithms.items())
    ]
    lines += nccl_log.hints(log)
    lines += [f"WARN ({count} times) {text}" for text, count in log.warnings.most_common()]
    for line in lines:
        console.print(f"- {printable(line)}")


def _bytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
