"""Puts the traces of a run's ranks onto one clock, and lists the ranks that are missing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_muon.observe.timing.peaks import RunFacts
from megatron_muon.observe.timing.steps import RankStep, StepSummary, summarize_step
from megatron_muon.observe.timing.trace import PATTERN, Trace, read_trace


@dataclass(frozen=True)
class Merged:
    """A profiled run.

    Attributes:
        traces: Trace of each global rank.
        facts: Facts about the run.
        records: Step -> rank -> its numbers.
        notes: Ranks that are missing or ended early, and files that were left out.
    """

    traces: Mapping[int, Trace]
    facts: RunFacts
    records: Mapping[int, Mapping[int, RankStep]]
    notes: Sequence[str]

    def summaries(self) -> list[StepSummary]:
        """A summary of each step, of those that most ranks have profiled."""
        most = max(len(of_step) for of_step in self.records.values())
        return [summarize_step(list(r.values())) for _, r in sorted(self.records.items()) if len(r) == most]

    def aligned(self, rank: int) -> Iterator[Mapping[str, Any]]:
        """A rank's events, with times on the clock of the first rank's host."""
        offsets = self._offsets()
        clock = str(self.traces[rank].info.get("clock"))
        offset = 0.0
        for event in self.traces[rank].events:
            if event.get("cat") == "step":
                # A step's own event comes before the events in it.
                offset = offsets.get((clock, event["args"]["record"]["step"]), offset)
            yield {**event, "ts": event["ts"] + offset} if "ts" in event else event

    def _offsets(self) -> dict[tuple[str, int], float]:
        """(clock, step) -> microseconds to add: ranks left the step's all-gather at the same time."""
        synced: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for _, trace in sorted(self.traces.items()):
            for event in trace.steps():
                step = event["args"]["record"]["step"]
                synced[step][str(trace.info.get("clock"))].append(float(event["args"]["sync_us"]))
        reference = str(self.traces[min(self.traces)].info.get("clock"))
        out = {}
        for step, by_clock in synced.items():
            means = {clock: sum(times) / len(times) for clock, times in by_clock.items()}
            if reference in means:
                out.update({(clock, step): means[reference] - mean for clock, mean in means.items()})
        return out

    def write_trace(self, path: Path) -> None:
        """All ranks in one file for a trace viewer."""
        with path.open("w", encoding="utf-8") as file:
            file.write("[\n")
            file.write(",\n".join(json.dumps(event) for rank in sorted(self.traces) for event in self.aligned(rank)))
            file.write("\n]\n")


def merge(directory: Path) -> Merged:
    """Reads the traces of a run.

    Args:
        directory: Directory of `--muon-profile-dir`.

    Raises:
        ValueError: If there is no trace, a file is something else, or no step has been profiled.
    """
    found = sorted(directory.glob(PATTERN))
    if not found:
        raise ValueError(
            f"RUN: got {directory}, which has no {PATTERN}; train with --muon-profile N, and --muon-profile-dir or "
            "--tensorboard-dir"
        )
    notes: list[str] = []
    traces = _of_one_run([read_trace(path) for path in found], notes)
    records: dict[int, dict[int, RankStep]] = defaultdict(dict)
    for rank, trace in sorted(traces.items()):
        for step, record in trace.records().items():
            records[step][rank] = record
    if not records:
        raise ValueError(f"RUN: got {directory} with traces that have no step; the run has profiled none yet")
    facts = RunFacts.from_json(traces[min(traces)].info.get("facts"))
    notes += _missing(traces, records, facts.world_size)
    return Merged(traces, facts, records, notes)


def _of_one_run(traces: Sequence[Trace], notes: list[str]) -> dict[int, Trace]:
    """The traces of the newest run; the file that was written last belongs to it."""
    newest = max(traces, key=lambda trace: trace.path.stat().st_mtime).info.get("run")
    out = {}
    for trace in traces:
        if trace.info.get("run") != newest:
            notes.append(f"{trace.path.name} is left out, since another run wrote it")
        else:
            out[int(trace.info["rank"])] = trace
    return out


def _missing(
    traces: Mapping[int, Trace], records: Mapping[int, Mapping[int, RankStep]], world_size: int
) -> Iterator[str]:
    absent = [rank for rank in range(world_size) if rank not in traces]
    if absent:
        listed = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        yield f"{len(absent)} of {world_size} ranks have no trace here: {listed}"
    last = max(records)
    for rank, trace in sorted(traces.items()):
        steps = [step for step, of_step in records.items() if rank in of_step]
        if trace.broken:
            yield f"rank {rank}'s trace ends in the middle of a line: the rank died"
        if max(steps, default=0) < last:
            yield f"rank {rank} has no step after {max(steps, default=0)}; the last one of others is {last}"


# Rows of a timeline that can still be read.
_SHOWN_RANKS = 16


def shown_spans(merged: Merged, step: int) -> list[dict[str, Any]]:
    """The spans of a step for a timeline: `lane`, `phase`, `start` and `stop`, in ms from the step's begin.

    Each rank has two lanes, one for its phases and one for collectives in flight. Of many ranks, those are shown that
    compute longest.
    """
    records = merged.records[step]
    ranks = sorted(sorted(records, key=lambda rank: -records[rank].numbers["ns_ms"])[:_SHOWN_RANKS])
    spans: list[tuple[str, str, float, float]] = []
    for rank in ranks:
        busy, flights, begun = [], [], {}
        for event in merged.aligned(rank):
            if event.get("args", {}).get("step") != step and event["ph"] != "e":
                continue
            if event["ph"] == "X" and event.get("cat") != "step":
                busy.append((f"rank {rank}", str(event["name"]), event["ts"], event["ts"] + event["dur"]))
            elif event["ph"] == "b":
                begun[event["id"]] = event
            elif event["ph"] == "e" and event["id"] in begun:
                start = begun.pop(event["id"])
                flights.append((f"in flight {rank}", str(start["name"]), start["ts"], event["ts"]))
        spans += busy + flights
    begin = min((start for *_, start, _ in spans), default=0.0)
    return [
        {"lane": lane, "phase": phase, "start": (start - begin) / 1e3, "stop": (stop - begin) / 1e3}
        for lane, phase, start, stop in spans
    ]
