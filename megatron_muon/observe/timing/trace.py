"""A rank's trace in Chrome's trace event format, and its reader.

The file is the format's JSON array, one event a line, without the closing bracket, which the format lets a writer
leave out: what a rank has written when it dies can be opened in https://ui.perfetto.dev as it is. Writing never raises:
a file that cannot be written is given up, and `TraceFile.problem` has the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_muon.observe.timing.recording import Recorded, Span
from megatron_muon.observe.timing.steps import RankStep

PATTERN = "trace.rank*.json"
# A viewer cannot show much more, and a run may have a million steps.
MAX_STEPS = 500

_RUN = "run"
_STEP, _BUSY, _EXCHANGE = 0, 1, 2
_THREADS = {_STEP: "step", _BUSY: "phases", _EXCHANGE: "exchange, in flight"}


def file_name(rank: int) -> str:
    """Name of a rank's trace."""
    return f"trace.rank{rank:05d}.json"


@dataclass
class TraceFile:
    """A rank's trace.

    Attributes:
        path: Path of the file; an existing one is replaced.
        rank: Global rank.
        info: Facts about the run and the rank, as JSON's types.
        problem: Reason why nothing is written any more; empty while all is well.
    """

    path: Path
    rank: int
    info: Mapping[str, Any]
    problem: str = ""
    _steps: int = field(default=0, init=False)

    def create(self) -> None:
        """Makes the directory and a file without steps."""
        names = [_event("M", "thread_name", self.rank, t, args={"name": name}) for t, name in _THREADS.items()]
        process = _event("M", "process_name", self.rank, 0, args={"name": f"rank {self.rank}"})
        run = _event("M", _RUN, self.rank, 0, args=dict(self.info))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"[\n" + _lines([run, process, *names]))
        except OSError as error:
            self._give_up(error)

    def append(self, recorded: Recorded, record: RankStep, sync_ns: int) -> None:
        """Adds a step, completely or not at all.

        Args:
            recorded: Spans of the step.
            record: Numbers of the step.
            sync_ns: Time at which the ranks last met, on this rank's clock; it aligns ranks of different hosts.
        """
        if self.problem or self._steps >= MAX_STEPS:
            return
        self._steps += 1
        content = memoryview(_lines(events(recorded, record, sync_ns)))
        try:
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    # A full disk takes a part before it refuses.
                    while content:
                        content = content[file.write(content) :]
                except OSError:
                    os.ftruncate(file.fileno(), size)
                    raise
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.problem = f"rank {self.rank} cannot write its profile to {self.path}: {error.strerror or error}"


def _lines(entries: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(entry, separators=(",", ":")).encode() + b",\n" for entry in entries)


def _event(ph: str, name: str, rank: int, thread: int, **fields: Any) -> dict[str, Any]:
    return {"ph": ph, "name": name, "pid": rank, "tid": thread, **fields}


def events(recorded: Recorded, record: RankStep, sync_ns: int) -> list[dict[str, Any]]:
    """The events of a step. Times are in microseconds of the rank's monotonic clock.

    Collectives in flight are asynchronous events, since several overlap.
    """
    rank, step = record.rank, record.step
    whole = {"step": step, "sync_us": sync_ns / 1e3, "record": record.to_json()}
    out = [_event("X", f"step {step}", rank, _STEP, cat="step", **_times(recorded.whole), args=whole)]
    for span in recorded.busy:
        args = {"step": step, "round": span.round_index}
        out.append(_event("X", span.name, rank, _BUSY, cat=span.kind or "all", **_times(span), args=args))
    for number, span in enumerate(recorded.flights):
        common = {"cat": span.kind or "all", "id": f"{rank}.{step}.{number}"}
        args = {"step": step, "round": span.round_index, "sent_bytes": span.sent_bytes}
        out.append(_event("b", span.name, rank, _EXCHANGE, **common, ts=span.start_ns / 1e3, args=args))
        out.append(_event("e", span.name, rank, _EXCHANGE, **common, ts=span.stop_ns / 1e3))
    return out


def _times(span: Span) -> dict[str, float]:
    return {"ts": span.start_ns / 1e3, "dur": (span.stop_ns - span.start_ns) / 1e3}


@dataclass(frozen=True)
class Trace:
    """A trace that was read.

    Attributes:
        path: Path of the file.
        info: `TraceFile.info`.
        events: All events but the first.
        broken: Whether the last line is incomplete: the rank died while it wrote.
    """

    path: Path
    info: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    broken: bool

    def steps(self) -> Iterator[Mapping[str, Any]]:
        """The events that hold the record of a step."""
        return (event for event in self.events if event.get("cat") == "step" and isinstance(event.get("args"), dict))

    def records(self) -> dict[int, RankStep]:
        """Step -> its numbers.

        Raises:
            ValueError: If an event holds something else.
        """
        try:
            found = [RankStep.from_json(event["args"].get("record") or {}) for event in self.steps()]
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return {record.step: record for record in found}


def read_trace(path: Path) -> Trace:
    """Reads a trace, without a last line that is incomplete.

    Raises:
        ValueError: If the file is not a trace of --muon-profile.
        OSError: If it cannot be read.
    """
    head, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line.removesuffix(","))
            if isinstance(entry, dict) and "ph" in entry:
                found.append(entry)
    run = found[0] if head == "[" and found else {}
    info = run.get("args")
    if run.get("name") != _RUN or not isinstance(info, dict) or not isinstance(info.get("rank"), int):
        raise ValueError(f"{path}: got no trace of --muon-profile; remove it from the directory")
    return Trace(path, info, found[1:], lines[-1] != "")
