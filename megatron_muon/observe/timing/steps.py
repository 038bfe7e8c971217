"""A profiled step over all ranks, and the median of several."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from megatron_muon.exchange.phases import BUSY, FLIGHTS
from megatron_muon.observe.nvml import DeviceState
from megatron_muon.observe.timing.ranks import RankStep


@dataclass(frozen=True)
class Spread:
    """A quantity over the ranks.

    Attributes:
        mean: Mean over all ranks.
        largest: Largest value.
        rank: Rank with the largest value.
    """

    mean: float
    largest: float
    rank: int

    @classmethod
    def over(cls, by_rank: Mapping[int, float]) -> Spread:
        """Of rank -> value, of at least one rank; the first of several largest."""
        rank = min(by_rank, key=lambda rank: (-by_rank[rank], rank))
        return cls(sum(by_rank.values()) / len(by_rank), by_rank[rank], rank)

    @property
    def imbalance(self) -> float:
        """The largest over the mean; 1 if all are zero."""
        return self.largest / self.mean if self.mean > 0 else 1.0


@dataclass(frozen=True)
class Wire:
    """The collectives of one name in a step, such as all gathers.

    Attributes:
        ms: Time under way, from issue to end.
        sent_bytes: Bytes to other ranks.
        collectives: Number of those that move anything, on the rank that takes part in most.
        bytes_per_s: Bytes of the rank that sends most, over the shortest time under way among the ranks: the rank that
            issues a collective last waits for nobody else. 0 if nothing was sent. If all ranks send the same, this is
            nccl-tests' bus bandwidth.
    """

    ms: Spread
    sent_bytes: Spread
    collectives: int
    bytes_per_s: float

    @property
    def message_bytes(self) -> float:
        """Bytes of one collective, on the rank that sends most."""
        return self.sent_bytes.largest / max(self.collectives, 1)


@dataclass(frozen=True)
class Devices:
    """State of the ranks' GPUs during a step; a value is None where no device has it.

    Attributes:
        power_w: Mean power.
        sm_clock_mhz: Lowest clock of the multiprocessors of any rank.
        throttled: `rank N: reasons` for each rank that NVML reports as slowed down.
    """

    power_w: Spread | None
    sm_clock_mhz: float | None
    throttled: tuple[str, ...]


@dataclass(frozen=True)
class StepSummary:
    """A step, or the median of several.

    Attributes:
        step: Number of the update, from 1; of several updates, the last one.
        steps: Number of updates.
        ranks: Number of ranks.
        wall_ms: Time of the whole optimizer step.
        busy_ms: Time by phase; phases that occur on no rank are missing.
        other_ms: Time in no phase.
        wires: Collectives of the exchange, by name.
        hidden_share: Share of the exchange's time in which ranks do not wait; None if nothing is exchanged.
        ns_ms: Newton-Schulz, alone and in teams.
        ns_flops: FLOPs of Newton-Schulz, according to the plans.
        ns_flops_per_s: Rate of a rank while it works on matrices that it has alone; 0 if there are none.
        team_flops_per_s: Rate of a rank while it works on bands, messages included; 0 if there are none.
        sent_bytes: Bytes of the exchange, as counted.
        team_bytes: Bytes within teams, as counted.
        unplanned_bytes: Absolute difference to the plans' bytes, summed over the ranks; anything but 0 is a bug.
        param_gather_bytes_per_s: Bytes of the parameter gather over its time; 0 if it is not part of the step.
        devices: State of the GPUs; None without a driver.
    """

    step: int
    steps: int
    ranks: int
    wall_ms: Spread
    busy_ms: Mapping[str, Spread]
    other_ms: Spread
    wires: Mapping[str, Wire]
    hidden_share: float | None
    ns_ms: Spread
    ns_flops: Spread
    ns_flops_per_s: float
    team_flops_per_s: float
    sent_bytes: Spread
    team_bytes: Spread
    unplanned_bytes: int
    param_gather_bytes_per_s: float
    devices: Devices | None = None

    def share(self, *names: str) -> float:
        """Mean time in phases over the mean step; `other` is a phase here."""
        spreads = {**self.busy_ms, "other": self.other_ms}
        total = sum(spreads[name].mean for name in names if name in spreads)
        return total / self.wall_ms.mean if self.wall_ms.mean > 0 else 0.0


def summarize_step(records: Sequence[RankStep]) -> StepSummary:
    """Puts the ranks' numbers of one step together.

    Args:
        records: One for each rank, at least one, all of the same step.

    Raises:
        ValueError: If there is no record, or they belong to several steps.
    """
    steps = {record.step for record in records}
    if len(steps) != 1:
        raise ValueError(f"summarize_step: got steps {sorted(steps)}, expected records of one step")

    def over(values: Sequence[float]) -> Spread:
        return Spread.over({record.rank: value for record, value in zip(records, values, strict=True)})

    busy = [name for name in BUSY if any(name in record.busy_ms for record in records)]
    in_flight = sum(record.in_flight_ms for record in records)
    exposed = sum(record.exposed_ms for record in records)
    return StepSummary(
        step=steps.pop(),
        steps=1,
        ranks=len(records),
        wall_ms=over([r.wall_ms for r in records]),
        busy_ms={name: over([r.busy_ms.get(name, 0.0) for r in records]) for name in busy},
        other_ms=over([r.other_ms for r in records]),
        wires={name: wire for name in FLIGHTS if (wire := _wire(records, name)) is not None},
        hidden_share=1.0 - exposed / in_flight if in_flight > 0 else None,
        ns_ms=over([r.ns_ms for r in records]),
        ns_flops=over([float(r.flops + r.team_flops) for r in records]),
        ns_flops_per_s=_rate(
            sum(r.flops for r in records), sum(r.busy_ms.get("newton_schulz", 0.0) for r in records if r.flops)
        ),
        team_flops_per_s=_rate(
            sum(r.team_flops for r in records), sum(r.busy_ms.get("teams", 0.0) for r in records if r.team_flops)
        ),
        sent_bytes=over([float(r.sent_bytes) for r in records]),
        team_bytes=over([float(r.team_bytes) for r in records]),
        unplanned_bytes=sum(
            abs(r.sent_bytes - r.planned_bytes) + abs(r.team_bytes - r.planned_team_bytes) for r in records
        ),
        param_gather_bytes_per_s=_rate(
            sum(r.param_gather_bytes for r in records),
            sum(r.busy_ms.get("param_gather", 0.0) for r in records if r.param_gather_bytes),
        ),
        devices=_devices({r.rank: r.device for r in records if r.device is not None}),
    )


def _devices(by_rank: Mapping[int, DeviceState]) -> Devices | None:
    if not by_rank:
        return None
    powers = {rank: device.mean_power_w for rank, device in by_rank.items() if device.mean_power_w is not None}
    clocks = [float(device.sm_clock_mhz) for device in by_rank.values() if device.sm_clock_mhz is not None]
    return Devices(
        power_w=Spread.over(powers) if powers else None,
        sm_clock_mhz=min(clocks, default=None),
        throttled=tuple(f"rank {rank}: {', '.join(d.throttled)}" for rank, d in by_rank.items() if d.throttled),
    )


def _rate(amount: float, ms: float) -> float:
    return 1e3 * amount / ms if ms > 0 else 0.0


def _wire(records: Sequence[RankStep], name: str) -> Wire | None:
    """The collectives of this name; None if there is none."""
    by_key: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for record in records:
        for transfer in record.transfers:
            if transfer.name == name:
                by_key[transfer.key].append((transfer.ms, transfer.sent_bytes))
    if not by_key:
        return None
    # A collective that moves nothing, such as one of a group that owns what it stores, tells nothing of links.
    moved = {key: (min(ms for ms, _ in t), max(sent for _, sent in t)) for key, t in by_key.items()}
    moving = [entry for entry in moved.values() if entry[1] > 0]

    def over(pick: str) -> Spread:
        return Spread.over(
            {r.rank: float(sum(getattr(t, pick) for t in r.transfers if t.name == name)) for r in records}
        )

    return Wire(
        ms=over("ms"),
        sent_bytes=over("sent_bytes"),
        collectives=max(sum(t.name == name and moved[t.key][1] > 0 for t in r.transfers) for r in records),
        bytes_per_s=_rate(sum(sent for _, sent in moving), sum(ms for ms, _ in moving)),
    )


def median_step(summaries: Sequence[StepSummary]) -> StepSummary:
    """The median of every number; of `step` the largest, and of ranks the one that was largest most often.

    The run's first step, in which buffers are made and kernels chosen, is left out if there are others.

    Args:
        summaries: At least one.
    """
    used = [summary for summary in summaries if summary.step > 1] or list(summaries)
    merged: StepSummary = _median(used)
    return StepSummary(
        **{
            **{f.name: getattr(merged, f.name) for f in fields(merged)},
            "step": max(summary.step for summary in used),
            "steps": len(used),
            "unplanned_bytes": max(summary.unplanned_bytes for summary in used),
        }
    )


def _median(values: Sequence[Any]) -> Any:
    first = next((value for value in values if value is not None), None)
    if first is None:
        return None
    present = [value for value in values if value is not None]
    if is_dataclass(first):
        kind: Any = type(first)
        return kind(**{f.name: _median([getattr(value, f.name) for value in present]) for f in fields(first)})
    if isinstance(first, Mapping):
        # A phase of few steps, such as the metrics of those that are logged, is not part of the median step.
        seen = Counter(name for value in present for name in value)
        common = [name for name, steps in seen.items() if 2 * steps > len(present)]
        return {name: _median([value[name] for value in present if name in value]) for name in common}
    if isinstance(first, tuple):
        return tuple(dict.fromkeys(entry for value in present for entry in value))
    return statistics.mode(present) if isinstance(first, int) else statistics.median(present)


def scalars(summary: StepSummary) -> dict[str, float]:
    """The numbers of a step for TensorBoard: name -> value."""
    out = {"step_ms_max": summary.wall_ms.largest, "other_ms_max": summary.other_ms.largest}
    for name, spread in summary.busy_ms.items():
        out[f"{name}_ms_max"] = spread.largest
        out[f"{name}_ms_mean"] = spread.mean
    for name, wire in summary.wires.items():
        out[f"{name}_ms_mean"] = wire.ms.mean
        out[f"{name}_gb_per_s"] = wire.bytes_per_s / 1e9
    if summary.hidden_share is not None:
        out["exchange_hidden_share"] = summary.hidden_share
    out["ns_ms_imbalance"] = summary.ns_ms.imbalance
    out["ns_flops_imbalance"] = summary.ns_flops.imbalance
    out["ns_tflop_per_s"] = summary.ns_flops_per_s / 1e12
    out["sent_bytes_max"] = summary.sent_bytes.largest
    out["team_bytes_max"] = summary.team_bytes.largest
    if summary.param_gather_bytes_per_s:
        out["param_gather_gb_per_s"] = summary.param_gather_bytes_per_s / 1e9
    if summary.devices is not None:
        out["throttled_ranks"] = len(summary.devices.throttled)
        if summary.devices.power_w is not None:
            out["power_w_mean"] = summary.devices.power_w.mean
        if summary.devices.sm_clock_mhz is not None:
            out["sm_clock_mhz_min"] = summary.devices.sm_clock_mhz
    return out
