"""The table of a step's phases, and the summary of a run, as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from megatron_muon.exchange.phases import BUSY, FLIGHTS
from megatron_muon.observe.console import PIPE_WIDTH, as_text, print_list, table
from megatron_muon.observe.timing.findings import find
from megatron_muon.observe.timing.peaks import Ceiling, RunFacts
from megatron_muon.observe.timing.steps import Devices, Spread, StepSummary
from megatron_muon.observe.units import amount, arithmetic, bandwidth, work

COLUMNS = ("phase", "ms, mean", "slowest", "rank", "/ mean", "most on a rank", "rate", "share of peak")
NUMBERS = COLUMNS[1:]
LABELS: Mapping[str, str] = {
    "newton_schulz": "Newton-Schulz",
    "second_moment": "second moment",
    "param_gather": "param gather",
    "wait": "wait for exchange",
    **{name: f"{name} (in flight)" for name in FLIGHTS},
}


@dataclass(frozen=True)
class PhaseRow:
    """A phase, or collectives in flight, in the table of a step.

    Attributes:
        name: One of `phases.BUSY` or `phases.FLIGHTS`, or `other`.
        ms: Time.
        work: What the busiest rank sends or computes; empty if that is not known.
        rate: Rate of that.
        share: Rate over the best one that is known.
    """

    name: str
    ms: Spread
    work: str = ""
    rate: str = ""
    share: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """As `COLUMNS`."""
        ms = self.ms
        numbers = (f"{ms.mean:.2f}", f"{ms.largest:.2f}", str(ms.rank), f"{ms.imbalance:.2f}")
        return (LABELS.get(self.name, self.name), *numbers, self.work, self.rate, self.share)


def phase_rows(summary: StepSummary, facts: RunFacts) -> list[PhaseRow]:
    """A row for each phase that occurs; collectives in flight overlap with the phases and come last."""
    out = [_row(name, summary.busy_ms[name], summary, facts) for name in BUSY if name in summary.busy_ms]
    out.append(PhaseRow("other", summary.other_ms))
    return out + [_row(name, wire.ms, summary, facts) for name, wire in summary.wires.items()]


def _row(name: str, ms: Spread, summary: StepSummary, facts: RunFacts) -> PhaseRow:
    if name in FLIGHTS:
        wire = summary.wires[name]
        rate = wire.bytes_per_s
        return PhaseRow(name, ms, amount(wire.sent_bytes.largest), _rate(rate), _share(rate, facts.link))
    if name == "newton_schulz":
        rate = summary.ns_flops_per_s
        return PhaseRow(
            name, ms, work(summary.ns_flops.largest), arithmetic(rate) if rate else "", _share(rate, facts.flops)
        )
    if name == "teams":
        return PhaseRow(name, ms, amount(summary.team_bytes.largest), arithmetic(summary.team_flops_per_s))
    if name == "param_gather":
        rate = summary.param_gather_bytes_per_s
        return PhaseRow(name, ms, "", _rate(rate), _share(rate, facts.link))
    return PhaseRow(name, ms)


def _rate(bytes_per_s: float) -> str:
    return bandwidth(bytes_per_s) if bytes_per_s > 0 else ""


def _share(rate: float, ceiling: Ceiling) -> str:
    word = next((word for word in ("measured", "assumed") if ceiling.source.startswith(word)), "nominal")
    return f"{rate / ceiling.per_s:.0%} of {word}" if rate > 0 else ""


def step_title(summary: StepSummary) -> str:
    """What the table of a step is about."""
    what = f"step {summary.step}" if summary.steps == 1 else f"median of {summary.steps} steps"
    return f"Optimizer step, {what}: {summary.wall_ms.largest:.1f} ms on the slowest of {summary.ranks} ranks"


def step_notes(summary: StepSummary) -> list[str]:
    """What a step sent, hid and was planned to do, and what NVML counted."""
    notes = [f"sent {amount(summary.sent_bytes.mean)} a rank, {amount(summary.sent_bytes.largest)} at most"]
    if summary.hidden_share is not None:
        notes.append(f"{summary.hidden_share:.0%} of the exchange hidden")
    notes.append(f"plan's FLOPs: {summary.ns_flops.imbalance:.2f} of their mean on rank {summary.ns_flops.rank}")
    notes.append("bytes as planned" if not summary.unplanned_bytes else f"{summary.unplanned_bytes} BYTES UNPLANNED")
    return [*notes, *_device_notes(summary.devices)]


def _device_notes(devices: Devices | None) -> list[str]:
    if devices is None:
        return []
    notes = []
    if devices.power_w is not None:
        notes.append(f"{devices.power_w.mean:.0f} W a GPU")
    if devices.sm_clock_mhz is not None:
        notes.append(f"SM clocks from {devices.sm_clock_mhz:.0f} MHz")
    return notes + [f"SLOWED DOWN {entry}" for entry in devices.throttled]


def log_width() -> int:
    """Columns of what is printed into a training log."""
    return int(os.environ.get("COLUMNS") or 0) or (Console().width if sys.stdout.isatty() else PIPE_WIDTH)


def step_table(summary: StepSummary, facts: RunFacts, width: int) -> str:
    """A step, or the median of several."""

    def show(to: Console) -> None:
        cells = [row.cells for row in phase_rows(summary, facts)]
        to.print(table(COLUMNS, cells, title=step_title(summary), numbers=NUMBERS))
        print_list(to, ["; ".join(step_notes(summary))])

    return as_text(show, width)


def run_summary(summary: StepSummary, facts: RunFacts, width: int) -> str:
    """A run's profiled steps: the table of their median, the bottleneck, and the flag that would help."""
    first, *rest = find(summary, facts)
    found = [f"Bottleneck: {first}", *(f"Also: {finding}" for finding in rest)]
    return step_table(summary, facts, width) + as_text(lambda to: print_list(to, found), width)


def problem_line(problems: Sequence[str]) -> str:
    """One line about what ranks could not write; empty without problems."""
    if not problems:
        return ""
    more = f" (and {len(problems) - 1} other ranks)" if len(problems) > 1 else ""
    return f"megatron_muon: {problems[0]}{more}; training continues without these files"
