"""What one rank did in one profiled step, as numbers that can be sent to other ranks and stored in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_muon.exchange.exchange import Exchange
from megatron_muon.observe.nvml import DeviceState
from megatron_muon.observe.timing.overlap import hidden_share, union
from megatron_muon.observe.timing.recording import Recorded, Span


@dataclass(frozen=True)
class Duty:
    """What the plan of one optimizer gives this rank to do in every step.

    Attributes:
        kind: `dense` or `experts`.
        group: Global rank of the first rank of the exchange's group, which names the group.
        sent_bytes: Bytes to owners and back, to other ranks.
        team_bytes: Bytes to other members of teams.
        flops: Newton-Schulz of matrices that this rank has alone.
        team_flops: Newton-Schulz of bands.
    """

    kind: str
    group: int
    sent_bytes: int
    team_bytes: int
    flops: int
    team_flops: int

    @classmethod
    def of(cls, kind: str, group: int, exchange: Exchange) -> Duty:
        """This rank's part of an exchange's plan."""
        plan, rank = exchange.plan, exchange.rank
        flops = {False: 0, True: 0}
        for round_index in range(len(plan.rounds)):
            for item in plan.items(round_index, owner=rank):
                flops[plan.team(item) is not None] += plan.item_flops(item)
        near, far = plan.team_sent_bytes()
        sent = plan.sent_numel()[rank] * exchange.dtype.itemsize
        return cls(kind, group, sent, near[rank] + far[rank], flops[False], flops[True])


@dataclass(frozen=True)
class Transfer:
    """One collective of the exchange on this rank.

    Attributes:
        key: Name that is the same on all ranks that take part in it, and on no others.
        name: One of `phases.FLIGHTS`.
        sent_bytes: Bytes to other ranks.
        ms: Time from its issue to its end on this rank, which includes waiting for ranks that issue it later.
    """

    key: str
    name: str
    sent_bytes: int
    ms: float


@dataclass(frozen=True)
class RankStep:
    """A profiled step of one rank.

    Attributes:
        step: Number of the update, from 1.
        rank: Global rank.
        wall_ms: Time of the whole optimizer step.
        busy_ms: Time by phase (`phases.BUSY`); phases that did not occur are missing.
        transfers: Collectives of the exchange.
        in_flight_ms: Time in which a collective of the exchange was under way.
        exposed_ms: Part of `in_flight_ms` in which the rank waited.
        sent_bytes: Bytes to other ranks, as the exchange counted them.
        team_bytes: Bytes to other members of teams, as the exchange counted them.
        planned_bytes: `sent_bytes` according to the plans.
        planned_team_bytes: `team_bytes` according to the plans.
        flops: Newton-Schulz of matrices that this rank has alone, according to the plans.
        team_flops: Newton-Schulz of bands, according to the plans.
        param_gather_bytes: Bytes sent in the parameter gather; 0 if it is not part of the step.
        device: State of the GPU; None without a driver.
    """

    step: int
    rank: int
    wall_ms: float
    busy_ms: Mapping[str, float]
    transfers: Sequence[Transfer]
    in_flight_ms: float
    exposed_ms: float
    sent_bytes: int
    team_bytes: int
    planned_bytes: int
    planned_team_bytes: int
    flops: int
    team_flops: int
    param_gather_bytes: int = 0
    device: DeviceState | None = None

    @property
    def other_ms(self) -> float:
        """Time in no phase: AdamW's part of the step, casts, and launching operations."""
        return max(self.wall_ms - sum(self.busy_ms.values()), 0.0)

    @property
    def ns_ms(self) -> float:
        """Newton-Schulz, alone and in teams."""
        return self.busy_ms.get("newton_schulz", 0.0) + self.busy_ms.get("teams", 0.0)

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RankStep:
        """The inverse of `to_json`.

        Raises:
            ValueError: If `record` is something else.
        """
        try:
            return cls(
                **{
                    **record,
                    "step": int(record["step"]),
                    "rank": int(record["rank"]),
                    "busy_ms": {str(name): float(ms) for name, ms in record["busy_ms"].items()},
                    "transfers": tuple(Transfer(**entry) for entry in record["transfers"]),
                    "device": _device(record.get("device")),
                }
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"got no record of a profiled step: {error}") from None


def _device(content: Mapping[str, Any] | None) -> DeviceState | None:
    return None if content is None else DeviceState(**{**content, "throttled": tuple(content["throttled"])})


def counted_bytes(exchanges: Sequence[Exchange]) -> tuple[int, int]:
    """What a rank's exchanges have sent to other ranks since they were made: (of exchanges, of teams)."""
    return sum(e.stats.bytes_sent for e in exchanges), sum(e.stats.team_bytes_sent for e in exchanges)


def rank_step(
    recorded: Recorded,
    duties: Sequence[Duty],
    *,
    step: int,
    rank: int,
    counted: tuple[int, int],
    param_gather_bytes: int = 0,
    device: DeviceState | None = None,
) -> RankStep:
    """Turns what was recorded into numbers.

    Args:
        recorded: Recording of the step.
        duties: Duties of this rank's optimizers.
        step: Number of the update.
        rank: Global rank.
        counted: Bytes sent in the step: (of exchanges, of teams).
        param_gather_bytes: See `RankStep`.
        device: State of the GPU.
    """
    groups = {duty.kind: duty for duty in duties}
    busy_ms: dict[str, float] = {}
    for span in recorded.busy:
        busy_ms[span.name] = busy_ms.get(span.name, 0.0) + span.ms
    waits = [span for span in recorded.busy if span.name == "wait"]
    flights = _seconds(recorded.flights)
    in_flight_ms = 1e3 * sum(stop - start for start, stop in union(flights))
    hidden = hidden_share(flights, _seconds(waits)) if in_flight_ms > 0 else 1.0
    return RankStep(
        step=step,
        rank=rank,
        wall_ms=recorded.whole.ms,
        busy_ms=busy_ms,
        transfers=tuple(
            Transfer(f"{f.kind} {groups[f.kind].group} {f.name} {f.round_index}", f.name, f.sent_bytes, f.ms)
            for f in recorded.flights
        ),
        in_flight_ms=in_flight_ms,
        exposed_ms=in_flight_ms * (1.0 - hidden),
        sent_bytes=counted[0],
        team_bytes=counted[1],
        planned_bytes=sum(duty.sent_bytes for duty in duties),
        planned_team_bytes=sum(duty.team_bytes for duty in duties),
        flops=sum(duty.flops for duty in duties),
        team_flops=sum(duty.team_flops for duty in duties),
        param_gather_bytes=param_gather_bytes,
        device=device,
    )


def _seconds(spans: Sequence[Span]) -> list[tuple[float, float]]:
    return [(span.start_ns / 1e9, span.stop_ns / 1e9) for span in spans]
