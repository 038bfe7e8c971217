"""The numbers of a profiled step: of one rank, over all ranks, and the median of several steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_muon.exchange.exchange import Exchange
from megatron_muon.exchange.phases import BUSY, FLIGHTS
from megatron_muon.observe.timing.recording import Recorded, hidden_share, union

# What every rank has; phases that did not occur, and what NVML does not know, are missing.
_ALWAYS = frozenset(
    {"wall_ms", "other_ms", "ns_ms", "in_flight_ms", "exposed_ms", "sent_bytes", "team_bytes", "planned_bytes"}
    | {"planned_team_bytes", "flops", "team_flops", "ns_flops", "param_gather_bytes"}
)
_DEVICE = frozenset({"power_w", "sm_clock_mhz"})


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
    """A profiled step of one rank, as it is sent to other ranks and stored in a trace.

    Attributes:
        step: Number of the update, from 1.
        rank: Global rank.
        numbers: By name. Times: `wall_ms` of the whole optimizer step, `<phase>_ms` of each phase (`phases.BUSY`) that
            occurred, `other_ms` in no phase, `ns_ms` of Newton-Schulz alone and in teams, `in_flight_ms` in which a
            collective of the exchange was under way, `exposed_ms` of it in which the rank waited. Bytes to other
            ranks: `sent_bytes` of the exchange and `team_bytes` within teams as counted, `planned_bytes` and
            `planned_team_bytes` according to the plans, `param_gather_bytes` (0 if it is not part of the step).
            Newton-Schulz according to the plans: `flops` of matrices that the rank has alone, `team_flops` of bands,
            `ns_flops` of both. From NVML, where it is known: `power_w`, `sm_clock_mhz`.
        transfers: Collectives of the exchange.
        throttled: Reasons for low clocks.
    """

    step: int
    rank: int
    numbers: Mapping[str, float]
    transfers: Sequence[Transfer]
    throttled: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any) -> RankStep:
        """The inverse of `to_json`.

        Raises:
            ValueError: If `record` is something else, or a number is negative or not finite.
        """
        try:
            transfers = tuple(Transfer(**entry) for entry in record["transfers"])
            numbers, throttled = dict(record["numbers"]), tuple(map(str, record["throttled"]))
            made = cls(int(record["step"]), int(record["rank"]), numbers, transfers, throttled)
            missing = sorted(_ALWAYS - numbers.keys())
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"got no record of a profiled step: {error}") from None
        if missing:
            raise ValueError(f"got no record of a profiled step: it has no {', '.join(missing)}")
        values = [*numbers.values(), *(value for t in transfers for value in (t.ms, t.sent_bytes))]
        if not all(isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in values):
            raise ValueError(f"step {made.step} has an invalid number; remove the file")
        return made


def planned_work(exchanges: Sequence[Exchange]) -> dict[str, float]:
    """What the plans give this rank to do in every step: the numbers of `RankStep` that come from plans."""
    work = dict.fromkeys(("planned_bytes", "planned_team_bytes", "flops", "team_flops"), 0.0)
    for exchange in exchanges:
        plan, rank = exchange.plan, exchange.rank
        for item in plan.all_items():
            if plan.owner(item) == rank:
                work["flops" if plan.team(item) is None else "team_flops"] += plan.item_flops(item)
        work["planned_bytes"] += plan.sent_numel()[rank] * exchange.dtype.itemsize
        work["planned_team_bytes"] += sum(by_rank[rank] for by_rank in plan.team_sent_bytes())
    return {**work, "ns_flops": work["flops"] + work["team_flops"]}


def counted_bytes(exchanges: Sequence[Exchange]) -> tuple[int, int]:
    """What a rank's exchanges have sent to other ranks since they were made: (of exchanges, of teams)."""
    return sum(e.stats.bytes_sent for e in exchanges), sum(e.stats.team_bytes_sent for e in exchanges)


def rank_step(
    recorded: Recorded,
    known: Mapping[str, float],
    groups: Mapping[str, int],
    *,
    step: int,
    rank: int,
    throttled: tuple[str, ...] = (),
) -> RankStep:
    """Turns what was recorded into numbers.

    Args:
        recorded: Recording of the step.
        known: The numbers of `RankStep` that are not times.
        groups: `dense` or `experts` -> global rank of the first rank of the exchange's group, which names the group.
        step: Number of the update.
        rank: Global rank.
        throttled: Reasons for low clocks.
    """
    times: dict[str, float] = {}
    for span in recorded.busy:
        times[f"{span.name}_ms"] = times.get(f"{span.name}_ms", 0.0) + span.ms
    flights = [(span.start_ns / 1e9, span.stop_ns / 1e9) for span in recorded.flights]
    waits = [(span.start_ns / 1e9, span.stop_ns / 1e9) for span in recorded.busy if span.name == "wait"]
    in_flight_ms = 1e3 * sum(stop - start for start, stop in union(flights))
    exposed = 1.0 - hidden_share(flights, waits) if in_flight_ms > 0 else 0.0
    numbers = {
        "wall_ms": recorded.whole.ms,
        **times,
        "other_ms": max(recorded.whole.ms - sum(times.values()), 0.0),
        "ns_ms": times.get("newton_schulz_ms", 0.0) + times.get("teams_ms", 0.0),
        "in_flight_ms": in_flight_ms,
        "exposed_ms": in_flight_ms * exposed,
        **known,
    }
    transfers = tuple(
        Transfer(f"{f.kind} {groups[f.kind]} {f.name} {f.round_index}", f.name, f.sent_bytes, f.ms)
        for f in recorded.flights
    )
    return RankStep(step, rank, numbers, transfers, throttled)


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
class StepSummary:
    """A step over all ranks, or the median of several; `summary[name]` is one of `spreads`.

    Attributes:
        step: Number of the update, from 1; of several updates, the last one.
        steps: Number of updates.
        ranks: Number of ranks.
        spreads: Over the ranks: each of `RankStep.numbers` that any rank has, and for collectives `<flight>_ms`, the
            time under way, and `<flight>_bytes`, sent to other ranks.
        rates: A rank's FLOPs per second in `newton_schulz` and, messages included, in `teams`; bytes per second of the
            `param_gather`, and of collectives by name: bytes of the rank that sends most, over the shortest time under
            way among the ranks, since the rank that issues a collective last waits for nobody else. If all ranks send
            the same, that is nccl-tests' bus bandwidth. 0 where nothing was sent or computed.
        message_bytes: Bytes of one collective of a name, on the rank that sends most.
        hidden_share: Share of the exchange's time in which ranks do not wait; None if nothing is exchanged.
        unplanned_bytes: Absolute difference to the plans' bytes, summed over the ranks; anything but 0 is a bug.
        sm_clock_mhz: Lowest clock of the multiprocessors of any rank; None where NVML does not know it.
        throttled: `rank N: reasons` for each rank that NVML reports as slowed down.
    """

    step: int
    steps: int
    ranks: int
    spreads: Mapping[str, Spread]
    rates: Mapping[str, float]
    message_bytes: Mapping[str, float]
    hidden_share: float | None
    unplanned_bytes: float = 0
    sm_clock_mhz: float | None = None
    throttled: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Spread:
        return self.spreads[name]

    def share(self, phases: Sequence[str]) -> float:
        """Mean time in phases over the mean step; `other` is a phase here."""
        total = sum(self[f"{name}_ms"].mean for name in phases if f"{name}_ms" in self.spreads)
        return total / self["wall_ms"].mean if self["wall_ms"].mean > 0 else 0.0


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
    spreads = {}
    for name in dict.fromkeys(name for record in records for name in record.numbers):
        # A phase that did not occur took no time; a device that NVML does not know counts nothing.
        known = [r for r in records if name in r.numbers or name not in _DEVICE]
        spreads[name] = Spread.over({r.rank: r.numbers.get(name, 0.0) for r in known})
    rates = {
        name: _rate_over(records, name, work)
        for name, work in (("newton_schulz", "flops"), ("teams", "team_flops"), ("param_gather", "param_gather_bytes"))
    }
    messages: dict[str, float] = {}
    for name in FLIGHTS:
        own = {r.rank: [t for t in r.transfers if t.name == name] for r in records}
        if any(own.values()):
            spreads[f"{name}_ms"] = Spread.over({rank: sum(t.ms for t in found) for rank, found in own.items()})
            sent = Spread.over({rank: float(sum(t.sent_bytes for t in found)) for rank, found in own.items()})
            spreads[f"{name}_bytes"] = sent
            rates[name], collectives = _collectives(list(own.values()))
            messages[name] = sent.largest / max(collectives, 1)
    in_flight, exposed = (sum(r.numbers[name] for r in records) for name in ("in_flight_ms", "exposed_ms"))
    pairs = (("sent_bytes", "planned_bytes"), ("team_bytes", "planned_team_bytes"))
    return StepSummary(
        step=steps.pop(),
        steps=1,
        ranks=len(records),
        spreads=spreads,
        rates=rates,
        message_bytes=messages,
        hidden_share=1.0 - exposed / in_flight if in_flight > 0 else None,
        unplanned_bytes=sum(abs(r.numbers[sent] - r.numbers[planned]) for r in records for sent, planned in pairs),
        sm_clock_mhz=min((r.numbers["sm_clock_mhz"] for r in records if "sm_clock_mhz" in r.numbers), default=None),
        throttled=tuple(f"rank {r.rank}: {', '.join(r.throttled)}" for r in records if r.throttled),
    )


def _rate_over(records: Sequence[RankStep], phase: str, work: str) -> float:
    """The rate of the ranks that have work, while they are in the phase."""
    numbers = [record.numbers for record in records if record.numbers[work]]
    return _rate(sum(n[work] for n in numbers), sum(n.get(f"{phase}_ms", 0.0) for n in numbers))


def _rate(amount: float, ms: float) -> float:
    return 1e3 * amount / ms if ms > 0 else 0.0


def _collectives(by_rank: Sequence[Sequence[Transfer]]) -> tuple[float, int]:
    """(rate, number of collectives that move anything, on the rank that takes part in most); see `StepSummary`."""
    shortest: dict[str, float] = {}
    most: dict[str, int] = {}
    for transfer in (t for found in by_rank for t in found):
        shortest[transfer.key] = min(transfer.ms, shortest.get(transfer.key, math.inf))
        most[transfer.key] = max(transfer.sent_bytes, most.get(transfer.key, 0))
    # A collective that moves nothing, such as one of a group that owns what it stores, tells nothing of links.
    moving = [key for key, sent in most.items() if sent > 0]
    count = max(sum(most[t.key] > 0 for t in found) for found in by_rank)
    return _rate(sum(most[key] for key in moving), sum(shortest[key] for key in moving)), count


def median_step(summaries: Sequence[StepSummary]) -> StepSummary:
    """The median of every number; of `step` the largest, and of ranks the one that was largest most often.

    The run's first step, in which buffers are made and kernels chosen, is left out if there are others. So is a phase
    of few steps, such as the metrics of those that are logged.

    Args:
        summaries: At least one.
    """
    used = [summary for summary in summaries if summary.step > 1] or list(summaries)
    hidden = [summary.hidden_share for summary in used if summary.hidden_share is not None]
    clocks = [summary.sm_clock_mhz for summary in used if summary.sm_clock_mhz is not None]
    return StepSummary(
        step=max(summary.step for summary in used),
        steps=len(used),
        ranks=used[0].ranks,
        spreads={
            name: Spread(
                statistics.median(spread.mean for spread in found),
                statistics.median(spread.largest for spread in found),
                statistics.mode(spread.rank for spread in found),
            )
            for name, found in _of_most([summary.spreads for summary in used])
        },
        rates={name: statistics.median(found) for name, found in _of_most([summary.rates for summary in used])},
        message_bytes={
            name: statistics.median(found) for name, found in _of_most([summary.message_bytes for summary in used])
        },
        hidden_share=statistics.median(hidden) if hidden else None,
        unplanned_bytes=max(summary.unplanned_bytes for summary in used),
        sm_clock_mhz=statistics.median(clocks) if clocks else None,
        throttled=tuple(dict.fromkeys(entry for summary in used for entry in summary.throttled)),
    )


def _of_most[T](steps: Sequence[Mapping[str, T]]) -> Iterator[tuple[str, list[T]]]:
    """The names that more than half of the steps have, with their values."""
    for name in dict.fromkeys(name for step in steps for name in step):
        found = [step[name] for step in steps if name in step]
        if 2 * len(found) > len(steps):
            yield name, found


def scalars(summary: StepSummary) -> dict[str, float]:
    """The numbers of a step for TensorBoard: name -> value."""
    out = {"step_ms_max": summary["wall_ms"].largest, "ns_tflop_per_s": summary.rates["newton_schulz"] / 1e12}
    for name in (*BUSY, "other", *FLIGHTS):
        if f"{name}_ms" in summary.spreads:
            out[f"{name}_ms_mean"] = summary[f"{name}_ms"].mean
            if name not in FLIGHTS:
                out[f"{name}_ms_max"] = summary[f"{name}_ms"].largest
    for name in (*FLIGHTS, "param_gather"):
        if summary.rates.get(name):
            out[f"{name}_gb_per_s"] = summary.rates[name] / 1e9
    for name in ("ns_ms", "ns_flops"):
        out[f"{name}_imbalance"] = summary[name].imbalance
    for name in ("sent_bytes", "team_bytes"):
        out[f"{name}_max"] = summary[name].largest
    if summary.hidden_share is not None:
        out["exchange_hidden_share"] = summary.hidden_share
    if "power_w" in summary.spreads:
        out["power_w_mean"] = summary["power_w"].mean
    if summary.sm_clock_mhz is not None:
        out["sm_clock_mhz_min"] = summary.sm_clock_mhz
    if summary.sm_clock_mhz is not None or "power_w" in summary.spreads:
        out["throttled_ranks"] = len(summary.throttled)
    return out
