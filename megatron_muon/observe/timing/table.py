"""The table of a step's phases, and the summary of a run, as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console

from megatron_muon.exchange.phases import FLIGHTS
from megatron_muon.observe.console import PIPE_WIDTH, as_text, print_list, table
from megatron_muon.observe.timing.findings import find
from megatron_muon.observe.timing.peaks import Ceiling, RunFacts
from megatron_muon.observe.timing.shown import SHOWN
from megatron_muon.observe.timing.steps import StepSummary
from megatron_muon.observe.units import amount, arithmetic, bandwidth, work

COLUMNS = ("phase", "ms, mean", "slowest", "rank", "/ mean", "most on a rank", "rate", "share of peak")
NUMBERS = COLUMNS[1:]


def phase_rows(summary: StepSummary, facts: RunFacts) -> dict[str, tuple[str, ...]]:
    """Name -> cells as `COLUMNS`, for each phase that occurs and for collectives in flight, which come last."""
    rows: dict[str, tuple[str, ...]] = {}
    for name, phase in SHOWN.items():
        ms = summary.spreads.get(f"{name}_ms")
        if ms is not None:
            numbers = (f"{ms.mean:.2f}", f"{ms.largest:.2f}", str(ms.rank), f"{ms.imbalance:.2f}")
            rows[name] = (phase.label, *numbers, *_work(name, summary, facts))
    return rows


def _work(name: str, summary: StepSummary, facts: RunFacts) -> tuple[str, str, str]:
    """What the busiest rank sends or computes, the rate of that, and its share of the best one that is known."""
    rate = summary.rates.get(name, 0.0)
    if name == "newton_schulz":
        return work(summary["ns_flops"].largest), arithmetic(rate) if rate else "", _share(rate, facts.flops)
    if name == "teams":
        return amount(summary["team_bytes"].largest), arithmetic(rate), ""
    if name in FLIGHTS or name == "param_gather":
        sent = amount(summary[f"{name}_bytes"].largest) if name in FLIGHTS else ""
        return sent, bandwidth(rate) if rate else "", _share(rate, facts.link)
    return "", "", ""


def _share(rate: float, ceiling: Ceiling) -> str:
    word = next((word for word in ("measured", "assumed") if ceiling.source.startswith(word)), "nominal")
    return f"{rate / ceiling.per_s:.0%} of {word}" if rate > 0 else ""


def step_title(summary: StepSummary) -> str:
    """What the table of a step is about."""
    what = f"step {summary.step}" if summary.steps == 1 else f"median of {summary.steps} steps"
    return f"Optimizer step, {what}: {summary['wall_ms'].largest:.1f} ms on the slowest of {summary.ranks} ranks"


def step_notes(summary: StepSummary) -> list[str]:
    """What a step sent, hid and was planned to do, and what NVML counted."""
    sent, flops = summary["sent_bytes"], summary["ns_flops"]
    notes = [f"sent {amount(sent.mean)} a rank, {amount(sent.largest)} at most"]
    if summary.hidden_share is not None:
        notes.append(f"{summary.hidden_share:.0%} of the exchange hidden")
    notes.append(f"plan's FLOPs: {flops.imbalance:.2f} of their mean on rank {flops.rank}")
    unplanned = summary.unplanned_bytes
    notes.append(f"{unplanned:.0f} BYTES UNPLANNED" if unplanned else "bytes as planned")
    if "power_w" in summary.spreads:
        notes.append(f"{summary['power_w'].mean:.0f} W a GPU")
    if summary.sm_clock_mhz is not None:
        notes.append(f"SM clocks from {summary.sm_clock_mhz:.0f} MHz")
    return notes + [f"SLOWED DOWN {entry}" for entry in summary.throttled]


def log_width() -> int:
    """Columns of what is printed into a training log."""
    return int(os.environ.get("COLUMNS") or 0) or (Console().width if sys.stdout.isatty() else PIPE_WIDTH)


def step_table(summary: StepSummary, facts: RunFacts, width: int) -> str:
    """A step, or the median of several."""

    def show(to: Console) -> None:
        cells = phase_rows(summary, facts).values()
        to.print(table(COLUMNS, cells, title=step_title(summary), numbers=NUMBERS))
        print_list(to, ["; ".join(step_notes(summary))])

    return as_text(show, width)


def run_summary(summary: StepSummary, facts: RunFacts, width: int) -> str:
    """A run's profiled steps: the table of their median, the bottleneck, and the flag that would help."""
    return step_table(summary, facts, width) + as_text(lambda to: print_list(to, found_lines(summary, facts)), width)


def found_lines(summary: StepSummary, facts: RunFacts) -> list[str]:
    """What `find` finds, as sentences, the bottleneck first."""
    first, *rest = find(summary, facts)
    return [f"Bottleneck: {first}", *(f"Also: {finding}" for finding in rest)]


def problem_line(problems: Sequence[str]) -> str:
    """One line about what ranks could not write; empty without problems."""
    if not problems:
        return ""
    more = f" (and {len(problems) - 1} other ranks)" if len(problems) > 1 else ""
    return f"megatron_muon: {problems[0]}{more}; training continues without these files"
