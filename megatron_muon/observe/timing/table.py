"""Profiled steps as text: a table a step, and the summary of a run."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_muon.exchange.phases import BUSY, FLIGHTS
from megatron_muon.observe.timing.findings import find
from megatron_muon.observe.timing.peaks import Ceiling, RunFacts
from megatron_muon.observe.timing.steps import Devices, Spread, StepSummary
from megatron_muon.observe.units import amount, arithmetic, bandwidth, work

WIDTH = 110
Row = tuple[str, Spread, str, str, str]
"""Label, milliseconds, work, rate, share of the rate that is known."""

_LABELS = {
    "newton_schulz": "Newton-Schulz",
    "second_moment": "second moment",
    "param_gather": "param gather",
    "wait": "wait for exchange",
    "gather": "gather (in flight)",
    "exchange": "exchange (in flight)",
    "scatter": "scatter (in flight)",
}


def rows(summary: StepSummary, facts: RunFacts) -> list[Row]:
    """A row for each phase that occurs, in the order of a step; collectives in flight overlap with the others."""
    spreads = {**summary.busy_ms, **{name: wire.ms for name, wire in summary.wires.items()}}
    out: list[Row] = []
    for name in ("momentum", "pack", "gather", "exchange", *BUSY[2:6], "scatter", *BUSY[6:]):
        if name in spreads:
            out.append((_LABELS.get(name, name), spreads[name], *_work(name, summary, facts)))
    out.append(("other", summary.other_ms, "", "", ""))
    return out


def _work(name: str, summary: StepSummary, facts: RunFacts) -> tuple[str, str, str]:
    peaks = facts.peaks
    if name in FLIGHTS:
        wire = summary.wires[name]
        return amount(wire.sent_bytes.largest), *_of(wire.bytes_per_s, peaks.measured_link, peaks.link)
    if name == "newton_schulz":
        rate = summary.ns_flops_per_s
        share = _share(rate, peaks.flops, "measured" in peaks.flops.source)
        return work(summary.ns_flops.largest), arithmetic(rate) if rate else "", share
    if name == "teams":
        return amount(summary.team_bytes.largest), arithmetic(summary.team_flops_per_s), ""
    if name == "param_gather" and summary.param_gather_bytes_per_s:
        return "", *_of(summary.param_gather_bytes_per_s, peaks.measured_all_gather, peaks.link)
    return "", "", ""


def _of(rate: float, measured: Ceiling | None, nominal: Ceiling) -> tuple[str, str]:
    if rate <= 0:
        return "", ""
    shares = [_share(rate, measured, True)] if measured is not None else []
    return bandwidth(rate), ", ".join([*shares, _share(rate, nominal, False)])


def _share(rate: float, ceiling: Ceiling, measured: bool) -> str:
    word = "measured" if measured else "assumed" if ceiling.source == "assumed" else "nominal"
    return f"{rate / ceiling.per_s:.0%} of {word}" if rate > 0 else ""


def step_table(summary: StepSummary, facts: RunFacts) -> str:
    """A table of one step, or of the median of several."""
    what = f"step {summary.step}" if summary.steps == 1 else f"median of {summary.steps} steps"
    title = f"Optimizer step, {what}: {summary.wall_ms.largest:.1f} ms on the slowest of {summary.ranks} ranks"
    table = Table(title=title, title_justify="left", title_style="", caption=caption(summary), caption_justify="left")
    for heading in ("phase", "ms, mean", "slowest", "rank", "/ mean", "most on a rank", "rate", "share of rate"):
        table.add_column(heading, justify="left" if heading == "phase" else "right", no_wrap=True)
    for label, spread, most, rate, share in rows(summary, facts):
        cells = (f"{spread.mean:.2f}", f"{spread.largest:.2f}", str(spread.rank), f"{spread.imbalance:.2f}")
        table.add_row(*map(Text, (label, *cells, most, rate, share)))
    return render(table)


def caption(summary: StepSummary) -> str:
    """What a step sent, hid and was planned to do, in a line."""
    parts = [f"sent {amount(summary.sent_bytes.mean)} a rank, {amount(summary.sent_bytes.largest)} at most"]
    if summary.hidden_share is not None:
        parts.append(f"{summary.hidden_share:.0%} of the exchange hidden")
    parts.append(f"plan's FLOPs {summary.ns_flops.imbalance:.2f} of their mean on rank {summary.ns_flops.rank}")
    parts.append("bytes as planned" if not summary.unplanned_bytes else f"{summary.unplanned_bytes} BYTES UNPLANNED")
    return "; ".join([*parts, *device_parts(summary.devices)])


def device_parts(devices: Devices | None) -> list[str]:
    """What NVML counted, in a few words each."""
    if devices is None:
        return []
    parts = []
    if devices.power_w is not None:
        parts.append(f"{devices.power_w.mean:.0f} W a GPU")
    if devices.sm_clock_mhz is not None:
        parts.append(f"SM clocks from {devices.sm_clock_mhz:.0f} MHz")
    for label, sent in (("NVLink", devices.nvlink_sent_bytes), ("PCIe", devices.pcie_sent_bytes)):
        if sent is not None:
            parts.append(f"{amount(sent.largest)} out through {label} at most")
    parts += [f"SLOWED DOWN {entry}" for entry in devices.throttled]
    return parts


def run_summary(summary: StepSummary, facts: RunFacts) -> str:
    """What a run's profiled steps come to: their table, the bottleneck, and the flag that would help.

    Args:
        summary: Their median.
        facts: Of the run.
    """
    first, *rest = find(summary, facts)
    found = [f"Bottleneck: {first}", *(f"Also: {finding}" for finding in rest)]
    # Not cut at hyphens, so that flags can be copied.
    lines = [textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in found]
    return step_table(summary, facts) + "\n".join(lines) + "\n"


def render(table: Table) -> str:
    """Plain text, whatever the terminal."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def warnings_of(problems: Sequence[str]) -> str:
    """One line about what the ranks could not write; empty without problems."""
    if not problems:
        return ""
    more = f" (and {len(problems) - 1} other ranks)" if len(problems) > 1 else ""
    return f"megatron_muon: {problems[0]}{more}; training goes on without these files"
