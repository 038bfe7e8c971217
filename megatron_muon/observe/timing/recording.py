"""Records when the phases of one step begin and end on this rank.

On a CPU, times are those of the monotonic clock. On a GPU they are events in the stream that runs the phase, which are
read after the step. Neither waits for anything during the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from megatron_muon.exchange.phases import Busy, Flight, label

Interval = tuple[float, float]
"""Begin and end, in seconds."""


class HostClock:
    """The monotonic clock, which no change of the system's time affects. A mark may be of any type.

    Attributes:
        on_host: Whether a mark is taken at once, in any thread, and touches no stream.
    """

    on_host = True

    def mark(self) -> Any:
        """Now; on a GPU, when the current stream gets here."""
        return time.perf_counter_ns()

    def read(self, marks: Sequence[Any]) -> list[int]:
        """The marks in nanoseconds of `time.perf_counter_ns`. Waits until all of them have passed."""
        return list(marks)


class CudaClock(HostClock):
    """Events of the device, brought to the host's monotonic clock by one event that the host has waited for.

    Args:
        device: Device of the marked streams.
    """

    on_host = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        event: Any = torch.cuda.Event
        mark = event(enable_timing=True)
        mark.record()
        return mark

    def read(self, marks: Sequence[Any]) -> list[int]:
        torch.cuda.synchronize(self.device)
        anchor = self.mark()
        anchor.synchronize()
        at = time.perf_counter_ns()
        return [at - round(1e6 * mark.elapsed_time(anchor)) for mark in marks]


def clock_for(device: torch.device) -> HostClock:
    """The clock of what runs on a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Span:
    """A phase of this rank, or a collective from its issue to its completion.

    Attributes:
        name: One of `phases.BUSY` or `phases.FLIGHTS`.
        kind: `dense` or `experts`; empty for what they share.
        round_index: Round; None where there are no rounds.
        start_ns: Begin, in nanoseconds of `time.perf_counter_ns`.
        stop_ns: End, on the same clock.
        sent_bytes: Bytes that this rank sends to others in a collective.
    """

    name: str
    kind: str
    round_index: int | None
    start_ns: int
    stop_ns: int
    sent_bytes: int = 0

    @property
    def ms(self) -> float:
        return (self.stop_ns - self.start_ns) / 1e6


@dataclass(frozen=True)
class Recorded:
    """A step as one rank saw it.

    Attributes:
        whole: The recording from begin to end.
        busy: Phases in the order in which they began. They do not overlap: an inner phase divides the outer one.
        flights: Collectives of the exchange that ended while this was recorded.
    """

    whole: Span
    busy: tuple[Span, ...]
    flights: tuple[Span, ...]


@dataclass
class Recording:
    """One step that is being recorded; it begins when this is made.

    Attributes:
        clock: Clock of the device that runs the step.
    """

    clock: HostClock
    _begin: Any = field(init=False)
    _busy: list[tuple[str, str, int | None, Any, Any]] = field(default_factory=list)
    _flights: list[_Flying] = field(default_factory=list)
    _current: tuple[str, str, int | None, Any] | None = None

    def __post_init__(self) -> None:
        self._begin = self.clock.mark()

    def watch(self, kind: str) -> RecordingWatch:
        """A `phases.Watch`; its phases are recorded as those of `kind`."""
        return RecordingWatch(self, kind)

    @contextmanager
    def phase(self, name: Busy, round_index: int | None = None, kind: str = "") -> Iterator[None]:
        """Times what runs inside. The time of a phase within another one is not the outer one's."""
        begin = self.clock.mark()
        outer, self._current = self._current, (name, kind, round_index, begin)
        if outer is not None:
            self._busy.append((*outer, begin))
        with record_function(label(name, round_index)):
            yield
        end = self.clock.mark()
        self._busy.append((*self._current, end))
        self._current = None if outer is None else (*outer[:3], end)
        if name == "wait":
            for flying in self._flights:
                if (flying.kind, flying.round_index) == (kind, round_index) and flying.ended is None:
                    flying.end = flying.end or [end]

    def collective(
        self, name: Flight, round_index: int, sent_bytes: int, issue: Callable[[], dist.Work | None], kind: str
    ) -> dist.Work | None:
        """Records when a collective is issued and when it ends: on the host when it completes, on a GPU at its wait."""
        with record_function(label(name, round_index)):
            begin = self.clock.mark()
            work = issue()
        if work is not None:
            flying = _Flying(name, kind, round_index, sent_bytes, begin)
            if self.clock.on_host:
                try:
                    # Runs on Gloo's thread when the collective ends. On a GPU it would run on a stream of its own,
                    # which holds up the others if there is one hardware queue: there a flight ends with its wait.
                    flying.ended = work.get_future().then(lambda _: flying.end.append(self.clock.mark()))
                except RuntimeError:
                    return work
            self._flights.append(flying)
        return work

    def finish(self) -> Recorded:
        """Ends the recording. Waits for the device, and on the host only for what the step has waited for already."""
        end = self.clock.mark()
        for flying in self._flights:
            if flying.ended is not None:
                # The collective is complete, but the thread that notes it may be a moment behind.
                flying.ended.wait()
        self._flights = [flying for flying in self._flights if flying.end]
        marks = [self._begin, end]
        marks += [mark for *_, begin, stop in self._busy for mark in (begin, stop)]
        marks += [mark for flying in self._flights for mark in (flying.begin, *flying.end)]
        times = iter(self.clock.read(marks))
        whole = Span("step", "", None, next(times), next(times))
        busy = [Span(name, kind, at, next(times), next(times)) for name, kind, at, *_ in self._busy]
        flights = [Span(f.name, f.kind, f.round_index, next(times), next(times), f.sent_bytes) for f in self._flights]
        return Recorded(whole, tuple(sorted(busy, key=lambda span: span.start_ns)), tuple(flights))


@dataclass
class _Flying:
    name: str
    kind: str
    round_index: int
    sent_bytes: int
    begin: Any
    end: list[Any] = field(default_factory=list)
    ended: Any = None


@dataclass(frozen=True)
class RecordingWatch:
    """A `phases.Watch` that records.

    Attributes:
        recording: Where phases are recorded.
        kind: Kind under which they are recorded.
    """

    recording: Recording
    kind: str

    def phase(self, name: Busy, round_index: int | None = None) -> Any:
        return self.recording.phase(name, round_index, self.kind)

    def collective(
        self, name: Flight, round_index: int, sent_bytes: int, issue: Callable[[], dist.Work | None]
    ) -> dist.Work | None:
        return self.recording.collective(name, round_index, sent_bytes, issue, self.kind)


def hidden_share(in_flight: Iterable[Interval], waiting: Iterable[Interval]) -> float:
    """The share of an exchange's time that its rank spent on other things than waiting for it.

    Args:
        in_flight: For each collective, from its issue to its completion. They may overlap.
        waiting: When the rank stood still until a collective had completed. They may overlap.

    Returns:
        One minus the time in which both hold over the time in which anything is in flight: 1 if no time is lost.

    Raises:
        ValueError: If nothing was in flight.
    """
    flights, waits = union(in_flight), union(waiting)
    total = sum(stop - start for start, stop in flights)
    if total <= 0:
        raise ValueError("hidden_share: got no collective that took time, expected at least one")
    exposed = sum(max(min(a[1], b[1]) - max(a[0], b[0]), 0.0) for a in flights for b in waits)
    return 1.0 - exposed / total


def union(spans: Iterable[Interval]) -> list[Interval]:
    """The same times as spans that do not overlap."""
    out: list[Interval] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out
