"""NCCL Inspector's files: a JSON object for each collective that a rank finished, with its time and bandwidth.

Source: NVIDIA/nccl, plugins/profiler/inspector (before: ext-profiler/inspector), README, format v4.0.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

KNOWN_VERSIONS = ("v4.0",)


@dataclass(frozen=True)
class Operation:
    """A collective as one rank saw it.

    Attributes:
        communicator: Its hash.
        rank: Within the communicator.
        num_ranks: Of the communicator.
        num_nodes: Of the communicator.
        host: Where the rank runs.
        collective: NCCL's name.
        sequence: Number within the communicator.
        size_bytes: Of the message.
        time_us: From start to end on this rank.
        timing: How it was timed, such as `kernel_gpu`; "" if the file does not say.
        algbw_gbps: As NCCL reckons it.
        busbw_gbps: As NCCL reckons it.
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
    timing: str
    algbw_gbps: float
    busbw_gbps: float


def load_operations(path: Path) -> tuple[list[Operation], list[str]]:
    """Reads a file; a last line that was cut off is left out.

    Returns:
        The operations, and what a reader should know of the file.

    Raises:
        ValueError: If it is none of Inspector's.
    """
    out, notes = [], []
    versions = set()
    with path.open(encoding="utf-8", errors="replace") as lines:
        broken = 0
        for number, line in enumerate(lines, start=1):
            if broken:
                raise ValueError(f"{path}: line {broken} is no record of NCCL Inspector; remove it")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                header, metadata, performance = record["header"], record["metadata"], record["coll_perf"]
                operation = Operation(
                    communicator=str(header["id"]),
                    rank=int(header["rank"]),
                    num_ranks=int(header["n_ranks"]),
                    num_nodes=int(header["nnodes"]),
                    host=str(metadata["hostname"]),
                    collective=str(performance["coll"]),
                    sequence=int(performance["coll_sn"]),
                    size_bytes=int(performance["coll_msg_size_bytes"]),
                    time_us=float(performance["coll_exec_time_us"]),
                    timing=str(performance.get("coll_timing_source", "")),
                    algbw_gbps=float(performance["coll_algobw_gbs"]),
                    busbw_gbps=float(performance["coll_busbw_gbs"]),
                )
                versions.add(str(metadata["inspector_output_format_version"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                broken = number
                continue
            out.append(operation)
    if not out:
        raise ValueError(f"{path}: got no record of NCCL Inspector, expected a JSON object in each line")
    if broken:
        notes.append(f"{path.name}: line {broken}, the last one, was cut off and is left out")
    unknown = sorted(versions - set(KNOWN_VERSIONS))
    if unknown:
        notes.append(f"{path.name}: format {', '.join(unknown)}, known are {', '.join(KNOWN_VERSIONS)}")
    return out, notes


@dataclass(frozen=True)
class Summary:
    """Operations that are alike, over all communicators of a shape.

    Attributes:
        collective: NCCL's name.
        num_ranks: Of each communicator.
        num_nodes: Of each communicator.
        size_bytes: Of the message.
        count: Records.
        median_us: Of their times.
        median_busbw_gbps: Of their bus bandwidths.
        lowest_busbw_gbps: Of their bus bandwidths.
    """

    collective: str
    num_ranks: int
    num_nodes: int
    size_bytes: int
    count: int
    median_us: float
    median_busbw_gbps: float
    lowest_busbw_gbps: float


def summaries(operations: Sequence[Operation]) -> list[Summary]:
    """By collective, shape of the communicator and size."""
    groups: dict[tuple[str, int, int, int], list[Operation]] = defaultdict(list)
    for o in operations:
        groups[o.collective, o.num_ranks, o.num_nodes, o.size_bytes].append(o)
    return [
        Summary(
            *key,
            count=len(group),
            median_us=median(o.time_us for o in group),
            median_busbw_gbps=median(o.busbw_gbps for o in group),
            lowest_busbw_gbps=min(o.busbw_gbps for o in group),
        )
        for key, group in sorted(groups.items())
    ]


@dataclass(frozen=True)
class LateRank:
    """Who came last in a communicator most often: the one that waited least, so that its own time is the shortest.

    Attributes:
        communicator: Its hash.
        rank: Within it.
        host: Where the rank runs.
        times_last: In how many collectives it was the shortest.
        count: Collectives that several ranks recorded.
        waited_us: Median of what the others' mean exceeded it by, in those.
    """

    communicator: str
    rank: int
    host: str
    times_last: int
    count: int
    waited_us: float


def late_ranks(operations: Sequence[Operation]) -> list[LateRank]:
    """For each communicator of which several ranks recorded the same collectives."""
    matched: dict[str, dict[int, dict[int, Operation]]] = defaultdict(lambda: defaultdict(dict))
    for o in operations:
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
