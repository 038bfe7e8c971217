"""`profile inspector DIR`: sums up the files of NCCL Inspector, which hold NCCL's own bandwidth of each collective.

What is in such files is not trusted: text is printed without control characters and without markup.
Source: NVIDIA/nccl, plugins/profiler/inspector (before: ext-profiler/inspector), README, format v4.0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

KNOWN_VERSIONS = ("v4.0",)


def add_inspector_parser(subparsers: Any) -> None:
    """Adds the subcommand `inspector`."""
    parser = subparsers.add_parser(
        "inspector", help="bandwidths and late ranks from NCCL Inspector's files", description=__doc__.splitlines()[0]
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="NCCL_INSPECTOR_DUMP_DIR of one job")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Returns 0; 1 if a file is damaged; 2 if there is nothing to read. Messages are on standard error."""
    from megatron_muon.observe.console import console, print_list, printable

    records: list[InspectorRecord] = []
    notes: list[str] = []
    problems: list[str] = []
    for path in sorted(p for p in args.directory.rglob("*") if p.is_file()):
        try:
            found, more = load_records(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        else:
            records += found
            notes += more
    if not records and not problems:
        problems.append(f"DIR: got {args.directory}, expected a directory with files of NCCL Inspector")
    if records:
        to = console()
        to.print(summary_table(records))
        for late in late_ranks(records):
            notes.append(
                f"communicator {late.communicator}: rank {late.rank} on {late.host} came last in {late.times_last} of "
                f"{late.count} collectives; the others waited {late.waited_us:.0f} us for it (median)"
            )
        print_list(to, notes)
    for problem in problems:
        print(f"megatron_muon inspector: {printable(problem)}", file=sys.stderr)
    return 0 if not problems else 1 if records else 2


@dataclass(frozen=True)
class InspectorRecord:
    """A collective as one rank recorded it.

    Attributes:
        communicator: Hash of the communicator.
        rank: Rank within the communicator.
        num_ranks: Number of ranks in the communicator.
        num_nodes: Number of nodes in the communicator.
        host: Host of the rank.
        collective: NCCL's name of it.
        sequence: Running number within the communicator.
        size_bytes: Size of the message.
        time_us: Time from start to end on this rank.
        busbw_gbps: Bus bandwidth as NCCL computes it, in GB/s.
    """

    communicator: str
    rank: int
    num_ranks: int
    num_nodes: int
    host: str
    collective: str
    sequence: int
    size_bytes: int
    time_us: float
    busbw_gbps: float


# Of `InspectorRecord`, in its order: group and key in a file, and the type.
_FIELDS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("header", "id", str),
    ("header", "rank", int),
    ("header", "n_ranks", int),
    ("header", "nnodes", int),
    ("metadata", "hostname", str),
    ("coll_perf", "coll", str),
    ("coll_perf", "coll_sn", int),
    ("coll_perf", "coll_msg_size_bytes", int),
    ("coll_perf", "coll_exec_time_us", float),
    ("coll_perf", "coll_busbw_gbs", float),
)


def load_records(path: Path) -> tuple[list[InspectorRecord], list[str]]:
    """Reads a file; a last line that was cut off is left out.

    Returns:
        The records, and notes about the file.

    Raises:
        ValueError: If the file was not written by NCCL Inspector.
    """
    out, notes = [], []
    versions = set()
    with path.open(encoding="utf-8", errors="replace") as lines:
        broken = 0
        for number, line in enumerate(lines, start=1):
            if broken:
                raise ValueError(f"{path}: line {broken} is not a record of NCCL Inspector; remove it")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                made = InspectorRecord(*(kind(record[group][key]) for group, key, kind in _FIELDS))
                versions.add(str(record["metadata"]["inspector_output_format_version"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                broken = number
                continue
            out.append(made)
    if not out:
        raise ValueError(f"{path}: got no record of NCCL Inspector, expected a JSON object in each line")
    if broken:
        notes.append(f"{path.name}: line {broken}, the last one, was cut off and is left out")
    unknown = sorted(versions - set(KNOWN_VERSIONS))
    if unknown:
        notes.append(f"{path.name}: format {', '.join(unknown)}, known are {', '.join(KNOWN_VERSIONS)}")
    return out, notes


def summary_table(records: Sequence[InspectorRecord]) -> Any:
    """Medians and the lowest bandwidth by collective, shape of the communicator and size."""
    from megatron_muon.observe.console import table

    alike: dict[tuple[str, int, int, int], list[InspectorRecord]] = defaultdict(list)
    for record in records:
        alike[record.collective, record.num_ranks, record.num_nodes, record.size_bytes].append(record)
    rows = []
    for (collective, ranks, nodes, size), own in sorted(alike.items()):
        busbw = [record.busbw_gbps for record in own]
        times = f"{median(record.time_us for record in own):.0f}"
        rows.append((collective, ranks, nodes, size, len(own), times, f"{median(busbw):.1f}", f"{min(busbw):.1f}"))
    numbers = ("ranks", "nodes", "bytes", "records", "median us", "median busbw (GB/s)", "lowest busbw (GB/s)")
    return table(("collective", *numbers), rows, title=f"NCCL Inspector: {len(records)} records", numbers=numbers)


@dataclass(frozen=True)
class LateRank:
    """The rank of a communicator that came last most often: it waits for nobody, so its own time is the shortest.

    Attributes:
        communicator: Hash of the communicator.
        rank: Rank within the communicator.
        host: Host of the rank.
        times_last: Number of collectives in which its time was the shortest.
        count: Number of collectives that several ranks recorded.
        waited_us: Median, over these, of the mean time of the others minus its own.
    """

    communicator: str
    rank: int
    host: str
    times_last: int
    count: int
    waited_us: float


def late_ranks(records: Sequence[InspectorRecord]) -> list[LateRank]:
    """For each communicator of which several ranks recorded the same collectives."""
    matched: dict[str, dict[int, dict[int, InspectorRecord]]] = defaultdict(lambda: defaultdict(dict))
    for o in records:
        matched[o.communicator][o.sequence][o.rank] = o
    out = []
    for communicator, by_sequence in sorted(matched.items()):
        rounds = [by_rank for by_rank in by_sequence.values() if len(by_rank) > 1]
        if not rounds:
            continue
        last = [min(by_rank.values(), key=lambda o: (o.time_us, o.rank)) for by_rank in rounds]
        rank, times = Counter(o.rank for o in last).most_common(1)[0]
        waits = [
            sum(o.time_us for r, o in by_rank.items() if r != rank) / (len(by_rank) - 1) - shortest.time_us
            for by_rank, shortest in zip(rounds, last, strict=True)
            if shortest.rank == rank
        ]
        host = next(o.host for o in last if o.rank == rank)
        out.append(LateRank(communicator, rank, host, times, len(rounds), median(waits)))
    return out
