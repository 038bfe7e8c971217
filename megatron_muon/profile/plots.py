"""Pictures of a profiled run: timeline, phases by rank, roofline of Newton-Schulz, bandwidth against peak."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megatron_muon.exchange.phases import BUSY, FLIGHTS
from megatron_muon.observe.page import plain, png
from megatron_muon.observe.timing.peaks import Ceiling, RunFacts
from megatron_muon.observe.timing.ranks import RankStep
from megatron_muon.observe.units import arithmetic, bandwidth
from megatron_muon.profile.merge import Merged

MAX_RANKS = 16
"""Rows of the timeline and bars that can still be read."""

COLORS: Mapping[str, str] = MappingProxyType(
    {
        "momentum": "tab:olive",
        "pack": "tab:cyan",
        "wait": "tab:gray",
        "unpack": "plum",
        "teams": "tab:orange",
        "newton_schulz": "tab:red",
        "second_moment": "tab:purple",
        "apply": "tab:green",
        "param_gather": "tab:brown",
        "other": "gainsboro",
        "gather": "tab:blue",
        "exchange": "mediumblue",
        "scatter": "navy",
    }
)
_LABELS = {
    "newton_schulz": "Newton-Schulz",
    "wait": "wait for exchange",
    "param_gather": "param gather",
    "second_moment": "second moment",
    "gather": "gather in flight",
    "exchange": "exchange in flight",
    "scatter": "scatter in flight",
}


def _label(name: str) -> str:
    return _LABELS.get(name, name)


def shown_ranks(records: Mapping[int, RankStep]) -> list[int]:
    """All ranks, or of many those that take longest, in order."""
    slowest = sorted(records, key=lambda rank: -records[rank].ns_ms)[:MAX_RANKS]
    return sorted(slowest)


def timeline(merged: Merged, step: int) -> bytes:
    """One step: what each rank did, and below it what of the exchange was in flight."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = shown_ranks(merged.records[step])
    spans = {rank: _spans(merged, rank, step) for rank in ranks}
    begin = min(start for of_rank in spans.values() for _, start, _ in of_rank["step"])
    figure = Figure(figsize=(12, 1.6 + 0.62 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    used: dict[str, None] = {}
    for row, rank in enumerate(ranks):
        for kind, at, height in (("step", row - 0.36, 0.46), ("busy", row - 0.36, 0.46), ("flight", row + 0.14, 0.2)):
            for name, start, duration in spans[rank][kind]:
                used.setdefault(name)
                bar = [((start - begin) / 1e3, duration / 1e3)]
                axes.broken_barh(
                    bar, (at, height), color=COLORS.get(name, "black"), alpha=0.55 if kind == "flight" else 1.0
                )
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("ms since the first rank began the step")
    axes.set_title(f"Step {step}: phases, and below them collectives in flight")
    order = [name for name in (*BUSY, "other", *FLIGHTS) if name in used]
    patches = [Patch(color=COLORS[name], alpha=0.55 if name in FLIGHTS else 1.0, label=_label(name)) for name in order]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    return png(figure)


Bars = list[tuple[str, float, float]]


def _spans(merged: Merged, rank: int, step: int) -> dict[str, Bars]:
    """Of a rank's step: (name, begin, duration) in microseconds, by row."""
    out: dict[str, Bars] = {"step": [], "busy": [], "flight": []}
    begun: dict[Any, Mapping[str, Any]] = {}
    current = None
    for event in merged.aligned(rank):
        if event.get("cat") == "step":
            current = event["args"]["record"]["step"]
        if current != step:
            continue
        if event["ph"] == "X" and event.get("cat") == "step":
            out["step"].append(("other", event["ts"], event["dur"]))
        elif event["ph"] == "X":
            out["busy"].append((str(event["name"]), event["ts"], event["dur"]))
        elif event["ph"] == "b":
            begun[event["id"]] = event
        elif event["ph"] == "e" and event["id"] in begun:
            start = begun.pop(event["id"])
            out["flight"].append((str(start["name"]), start["ts"], event["ts"] - start["ts"]))
    return out


def phases(records: Mapping[int, RankStep], step: int) -> bytes:
    """A step's time of each rank, divided into phases."""
    from matplotlib.figure import Figure

    ranks = shown_ranks(records)
    figure = Figure(figsize=(12, 1.4 + 0.4 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(ranks, 0.0)
    for name in (*BUSY, "other"):
        values = [records[r].other_ms if name == "other" else records[r].busy_ms.get(name, 0.0) for r in ranks]
        if any(values):
            axes.barh(range(len(ranks)), values, left=list(left.values()), color=COLORS[name], label=_label(name))
            left = {rank: left[rank] + value for rank, value in zip(ranks, values, strict=True)}
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(f"Step {step}: where each rank's time goes")
    figure.legend(loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    return png(figure)


def roofline(records: Sequence[RankStep], facts: RunFacts) -> bytes | None:
    """Newton-Schulz of each rank and round: FLOP/s over FLOPs per byte, below what arithmetic and memory allow."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    points = [
        (p.flops / p.traffic_bytes, 1e3 * p.flops / p.ms, r.rank)
        for r in records
        for p in r.products
        if p.ms * p.flops * p.traffic_bytes > 0
    ]
    if not points:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    flops, memory = facts.peaks.flops, facts.peaks.memory
    roof = plain(f"arithmetic: {arithmetic(flops.per_s)} ({flops.source})")
    ridge = flops.per_s / memory.per_s
    low, high = min(ridge / 8, *(x / 2 for x, *_ in points)), max(ridge * 8, *(2 * x for x, *_ in points))
    axes.plot([low, ridge], [low * memory.per_s, flops.per_s], color="tab:gray", label=_ceiling(memory, "memory"))
    axes.plot([ridge, high], [flops.per_s] * 2, color="black", label=roof)
    ranks = sorted({rank for *_, rank in points})
    shown = axes.scatter(
        [x for x, *_ in points], [y for _, y, _ in points], c=[r for *_, r in points], cmap="viridis", s=16, alpha=0.7
    )
    if len(ranks) > 1:
        bar = figure.colorbar(shown, ax=axes, label="rank")
        if len(ranks) <= MAX_RANKS:
            bar.set_ticks(ranks)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(*_decades([flops.per_s, *(y for _, y, _ in points)]))
    axes.set_xlabel("FLOPs per byte, if each product reads its operands and writes its result once")
    axes.yaxis.set_major_formatter(EngFormatter("FLOP/s"))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title("Newton-Schulz of each rank and round")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return png(figure)


def _ceiling(ceiling: Ceiling, what: str) -> str:
    return plain(f"{what}: {bandwidth(ceiling.per_s)} ({ceiling.source})")


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten around the values, so that a logarithmic axis has ticks with numbers."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.2))
    return 10.0**low, 10.0 ** max(high, low + 1)


def bandwidths(records: Sequence[RankStep], facts: RunFacts) -> bytes | None:
    """Each collective of the exchange: bandwidth over the bytes that the rank sends that sends most."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    best: dict[tuple[int, str], tuple[str, float, int]] = {}
    for record in records:
        for transfer in record.transfers:
            key = (record.step, transfer.key)
            _, ms, sent = best.get(key, ("", float("inf"), 0))
            best[key] = (transfer.name, min(ms, transfer.ms), max(sent, transfer.sent_bytes))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[tuple[float, float]]] = {
        name: [(float(sent), 1e3 * sent / ms) for of, ms, sent in best.values() if of == name and sent and ms > 0]
        for name in FLIGHTS
    }
    series["param_gather"] = [
        (float(r.param_gather_bytes), 1e3 * r.param_gather_bytes / ms)
        for r in records
        if r.param_gather_bytes and (ms := r.busy_ms.get("param_gather", 0.0)) > 0
    ]
    if not any(series.values()):
        return None
    for name, points in series.items():
        if points:
            sizes, rates = zip(*points, strict=True)
            axes.scatter(sizes, rates, s=16, alpha=0.6, color=COLORS[name], label=name.replace("_", " "))
    peaks = facts.peaks
    for ceiling, style in ((peaks.link, "-"), (peaks.measured_link, "--"), (peaks.measured_all_gather, ":")):
        if ceiling is not None:
            what = {"-": "link", "--": "all-to-all", ":": "all-gather"}[style]
            axes.axhline(ceiling.per_s, color="black", linestyle=style, label=_ceiling(ceiling, what))
    everything = [point for points in series.values() for point in points]
    axes.set_ylim(*_decades([peaks.link.per_s, *(rate for _, rate in everything)]))
    axes.set_xlim(*_decades([size for size, _ in everything]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes that the busiest rank sends to others")
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.yaxis.set_major_formatter(EngFormatter("B/s"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Bandwidth of collectives against the link's")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return png(figure)
