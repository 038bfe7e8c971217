"""A rank's trace in Chrome's trace event format, and what reads it back.

Every step leaves the file complete, so that a rank that dies loses no step that it has profiled. Writing never raises:
a file that cannot be written is given up, with one line that says why.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_muon.observe.timing.ranks import RankStep
from megatron_muon.observe.timing.recording import Recorded, Span

PATTERN = "trace.rank*.json"
# A viewer cannot show much more, and a run may have a million steps.
MAX_STEPS = 500

_HEAD = '{"displayTimeUnit":"ms","otherData":'
_BODY = ',"traceEvents":['
_TAIL = b"\n]}\n"
_STEP, _BUSY, _EXCHANGE = 0, 1, 2
_THREADS = {_STEP: "step", _BUSY: "phases", _EXCHANGE: "exchange, in flight"}


def file_name(rank: int) -> str:
    """Of a rank's trace."""
    return f"trace.rank{rank:05d}.json"


@dataclass
class TraceFile:
    """A rank's trace.

    Attributes:
        path: Of the file; replaced if it exists.
        rank: Global rank.
        info: Goes into the file's `otherData`; JSON's types.
        problem: Why nothing is written any more; empty while all is well.
    """

    path: Path
    rank: int
    info: Mapping[str, Any]
    problem: str = ""
    _end: int = field(default=0, init=False)
    _steps: int = field(default=0, init=False)

    def create(self) -> None:
        """Makes the directory and a file without steps."""
        names = [_event("M", "process_name", self.rank, 0, args={"name": f"rank {self.rank}"})]
        names += [
            _event("M", "thread_name", self.rank, thread, args={"name": name}) for thread, name in _THREADS.items()
        ]
        head = f"{_HEAD}{json.dumps(dict(self.info))}{_BODY}\n"
        content = head.encode() + _joined(names)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("wb", buffering=0) as file:
                _write(file.fileno(), content + _TAIL)
        except OSError as error:
            self._give_up(error)
            return
        self._end = len(content)

    def append(self, recorded: Recorded, record: RankStep, sync_ns: int) -> None:
        """Adds a step.

        Args:
            recorded: Its spans.
            record: Its numbers.
            sync_ns: When the ranks last met, on this rank's clock; aligns ranks of different hosts.
        """
        if self.problem or self._steps >= MAX_STEPS:
            return
        self._steps += 1
        added = b",\n" + _joined(events(recorded, record, sync_ns))
        try:
            with self.path.open("r+b", buffering=0) as file:
                try:
                    os.lseek(file.fileno(), self._end, os.SEEK_SET)
                    _write(file.fileno(), added + _TAIL)
                except OSError:
                    # Back to the steps before. What is written here was there already, so that it fits.
                    with contextlib.suppress(OSError):
                        os.ftruncate(file.fileno(), self._end)
                        os.lseek(file.fileno(), self._end, os.SEEK_SET)
                        _write(file.fileno(), _TAIL)
                    raise
        except OSError as error:
            self._give_up(error)
            return
        self._end += len(added)

    def _give_up(self, error: OSError) -> None:
        self.problem = f"rank {self.rank} cannot write its profile to {self.path}: {error.strerror or error}"


def _write(descriptor: int, content: bytes) -> None:
    """All of it: a full disk takes a part before it refuses."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _joined(entries: Sequence[Mapping[str, Any]]) -> bytes:
    """One event a line, so that what is left of a broken file can be read."""
    return b",\n".join(json.dumps(entry, separators=(",", ":")).encode() for entry in entries)


def _event(ph: str, name: str, rank: int, thread: int, **fields: Any) -> dict[str, Any]:
    return {"ph": ph, "name": name, "pid": rank, "tid": thread, **fields}


def events(recorded: Recorded, record: RankStep, sync_ns: int) -> list[dict[str, Any]]:
    """The events of a step. Times are in microseconds of the rank's monotonic clock.

    Collectives in flight are asynchronous events, since several overlap; everything else nests.
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
        path: The file.
        info: Its `otherData`.
        events: All of its events.
        broken: Whether the file ends in the middle: its rank died while it wrote, or the disk was full.
    """

    path: Path
    info: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    broken: bool

    def steps(self) -> Iterator[Mapping[str, Any]]:
        """The events that hold a step's record."""
        for event in self.events:
            if event.get("cat") == "step" and isinstance(event.get("args"), dict):
                yield event

    def records(self) -> dict[int, RankStep]:
        """Step -> its numbers.

        Raises:
            ValueError: If one is no record.
        """
        try:
            found = [RankStep.from_json(event["args"].get("record") or {}) for event in self.steps()]
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return {record.step: record for record in found}


def read_trace(path: Path) -> Trace:
    """Reads a trace; of one that ends in the middle, all whole events.

    Raises:
        ValueError: If the file is no trace.
        OSError: If it cannot be read.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        content = json.loads(text)
        info = dict(content["otherData"])
        int(info["rank"])
        return Trace(path, info, [entry for entry in content["traceEvents"] if isinstance(entry, dict)], False)
    head, *lines = text.split("\n")
    try:
        info = dict(json.loads(head + "]}")["otherData"])
        int(info["rank"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: got no trace of --muon-profile; remove it from the directory") from None
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line.rstrip(","))
            if isinstance(entry, dict) and "ph" in entry:
                found.append(entry)
    return Trace(path, info, found, True)
