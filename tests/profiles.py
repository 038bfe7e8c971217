"""Profiled runs made by hand: traces, and summaries of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_muon.config import MuonConfig
from megatron_muon.observe.timing.peaks import Ceiling, RunFacts
from megatron_muon.observe.timing.recording import Recorded, Span
from megatron_muon.observe.timing.steps import RankStep, Transfer
from megatron_muon.observe.timing.trace import TraceFile, file_name

LINK = Ceiling(40e9, "measured links")
FLOPS = Ceiling(989e12, "H100 data sheet")


def facts(*, device_type: str = "cuda", world_size: int = 2, rounds: int = 4, **muon: Any) -> RunFacts:
    """Of a run on GPUs with these settings."""
    return RunFacts(
        device_type=device_type,
        device_name="NVIDIA H100 80GB HBM3",
        world_size=world_size,
        rounds=rounds,
        overlap_param_gather=False,
        link=LINK,
        flops=FLOPS,
        settings=asdict(MuonConfig(**muon)),
    )


MS = 10**6  # nanoseconds


def recorded(begin_ns: int) -> Recorded:
    """A step of 10 ms in which a gather of 4 ms is hidden by 3 ms, and a scatter of 2 ms not at all."""

    def span(name: str, start: float, stop: float, round_index: int | None = 0, sent: int = 0) -> Span:
        return Span(name, "dense", round_index, begin_ns + round(start * MS), begin_ns + round(stop * MS), sent)

    return Recorded(
        span("step", 0, 10, None),
        (
            span("momentum", 0, 1),
            span("newton_schulz", 1, 4),
            span("wait", 4, 5),
            span("wait", 6, 8),
            span("apply", 8, 9),
        ),
        (span("gather", 1, 5, sent=8_000_000), span("scatter", 6, 8, sent=6_000_000)),
    )


PHASES = {"momentum": 1.0, "newton_schulz": 3.0, "wait": 3.0, "apply": 1.0}
KNOWN = {
    "sent_bytes": 14_000_000,
    "team_bytes": 0,
    "planned_bytes": 14_000_000,
    "planned_team_bytes": 0,
    "flops": 6_000_000_000,
    "team_flops": 0,
    "ns_flops": 6_000_000_000,
    "param_gather_bytes": 0,
}
TRANSFERS = (
    Transfer("dense 0 gather 0", "gather", 8_000_000, 4.0),
    Transfer("dense 0 scatter 0", "scatter", 6_000_000, 2.0),
)


def rank_record(
    rank: int,
    step: int,
    *,
    phases: Mapping[str, float] = MappingProxyType(PHASES),
    transfers: tuple[Transfer, ...] = TRANSFERS,
    throttled: tuple[str, ...] = (),
    **changes: float,
) -> RankStep:
    """What `recorded` comes to, with other milliseconds of phases, or other numbers."""
    numbers = {
        "wall_ms": 10.0,
        **{f"{name}_ms": ms for name, ms in phases.items()},
        "other_ms": 2.0,
        "ns_ms": phases["newton_schulz"],
        "in_flight_ms": 6.0,
        "exposed_ms": 3.0,
        **KNOWN,
        **changes,
    }
    return RankStep(step, rank, numbers, transfers, throttled)


def write_traces(
    directory: Path,
    steps: Mapping[int, range],
    *,
    hosts: Mapping[int, str] | None = None,
    run_facts: RunFacts | None = None,
    run: str = "run",
) -> None:
    """Traces of ranks on hosts whose clocks are a day apart for each host.

    Args:
        directory: Of the traces.
        steps: Rank -> the steps it has profiled.
        hosts: Rank -> its host.
        run_facts: Of the run.
        run: Its identifier.
    """
    hosts = hosts or {}
    days = {host: day for day, host in enumerate(sorted(set(hosts.values())))}
    for rank, own in steps.items():
        host = hosts.get(rank, "host")
        skew = days.get(host, 0) * 86_400 * 10**9
        described = run_facts or facts(world_size=len(steps))
        info = {"run": run, "rank": rank, "host": host, "clock": host, "facts": described.to_json()}
        trace = TraceFile(directory / file_name(rank), rank, info)
        trace.create()
        for step in own:
            # A rank begins 1 ms after the one before.
            begin = step * 100 * MS + rank * MS + skew
            trace.append(recorded(begin), rank_record(rank, step), step * 100 * MS + 20 * MS + skew)
        assert not trace.problem
