"""Plays the issue order of a step on a GPU's queues, and says which share of each collective nothing hides.

    python benchmarks/queue_model.py [--runs NAME ...] [--output DIR]

The order is recorded from the real `ShardedMuon` as `benchmarks/host.py` runs it: dense and expert optimizers in turns,
with the phases' memory traffic. Times are those that plans are made with (`plan.machines`): Newton-Schulz by its
operations, other kernels by the bytes that they read and write at the H100's memory bandwidth, an all-to-all by the
rank that sends or receives most, within its node and to other nodes. All ranks are taken to be as far as this one.

A GPU is fed in two ways: `CUDA_DEVICE_MAX_CONNECTIONS=1`, one hardware queue, in which whatever is issued starts
no earlier than what was issued before it; and 8, where only streams order. For comparison the same work is played in
the order of the version before: a gather and a scatter for each round, those of the next rounds issued back to back
after Newton-Schulz.

This is a model. No GPU was there to compare it with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.host import RESULTS, RUNS, Counting, Part, bound_optimizer, parts_of, stand_ins
from megatron_muon.config import MuonConfig
from megatron_muon.exchange.exchange import Exchange
from megatron_muon.exchange.pipeline import run_together
from megatron_muon.optimizer import sharded_muon
from megatron_muon.plan.cost_model import CostModel
from megatron_muon.plan.machines import GPU_MODELS, GPUS_PER_NODE
from megatron_muon.plan.wire import Wire

MEMORY_BYTES_PER_S = GPU_MODELS[0].memory_bytes_per_s


@dataclass(frozen=True)
class Event:
    """Something that the host issues.

    Attributes:
        what: `compute` runs on the compute stream; `start` a collective on its communicator's, behind all computation
            issued before; `wait` makes the compute stream wait for the collective called `name`.
        name: Of the phase or collective.
        stream: Communicator of a `start`.
        seconds: How long it takes.
    """

    what: Literal["compute", "start", "wait"]
    name: str
    stream: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Played:
    """What a model says of a step. `exposed`: collective -> seconds in which computation waited for it alone."""

    seconds: float
    exposed: Mapping[str, float]


def play(events: Sequence[Event], *, connections: int) -> Played:
    """Plays events in their order.

    Args:
        events: As the host issues them.
        connections: Hardware queues; 1 makes each event start no earlier than the one before.
    """
    compute_free = issued = 0.0
    streams: dict[str, float] = {}
    ends: dict[str, float] = {}
    exposed: dict[str, float] = {}
    for event in events:
        if event.what == "compute":
            start = max(compute_free, issued if connections == 1 else 0.0)
            compute_free = start + event.seconds
        elif event.what == "start":
            # The collective waits for the kernels that fill its send buffer.
            start = max(compute_free, streams.get(event.stream, 0.0), issued if connections == 1 else 0.0)
            streams[event.stream] = ends[event.name] = start + event.seconds
            exposed.setdefault(event.name, 0.0)
        else:
            start = max(compute_free, ends.get(event.name, 0.0))
            if event.name in ends:
                exposed[event.name] += start - compute_free
            compute_free = start
        issued = max(issued, start)
    return Played(max(compute_free, *streams.values()) if streams else compute_free, exposed)


def transfer_seconds(wire: Wire, global_ranks: Sequence[int], itemsize: int, cost: CostModel) -> list[list[float]]:
    """For each transfer, the seconds of its gather, of its scatter, and of both in one all-to-all."""
    nodes = [rank // GPUS_PER_NODE for rank in global_ranks]
    out = []
    for transfer in range(wire.num_transfers):
        lanes = []
        for scatter in (False, True):
            moved = [[0.0] * len(nodes) for _ in range(4)]
            for owner, segment in wire.lane(transfer, scatter=scatter):
                source, target = (owner, segment.rank) if scatter else (segment.rank, owner)
                if source != target:
                    far = 2 * (nodes[source] != nodes[target])
                    moved[far][source] += segment.numel * itemsize
                    moved[far + 1][target] += segment.numel * itemsize
            lanes.append(moved)
        both = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(*lanes, strict=True)]
        out.append([_seconds(moved, cost) for moved in (*lanes, both)])
    return out


def _seconds(moved: Sequence[Sequence[float]], cost: CostModel) -> float:
    near, far = max(map(max, moved[:2])), max(map(max, moved[2:]))
    if not near and not far:
        return 0.0
    return max(near / cost.node_bytes_per_s, far / cost.bytes_per_s) + cost.latency_s


@dataclass
class EventWatch:
    """A `phases.Watch` that writes down what is issued.

    Attributes:
        kind: Of the optimizer.
        part: Its plan.
        exchange: Its exchange.
        counting: Knows the bytes that kernels have moved.
        cost: Rates.
        events: Where to; all optimizers of the rank write to one list.
        seconds: Of each transfer, see `transfer_seconds`.
    """

    kind: str
    part: Part
    exchange: Exchange
    counting: Counting
    cost: CostModel
    events: list[Event]
    seconds: list[list[float]]
    _counted: set[tuple[str, int | None]] = field(default_factory=set)

    @contextmanager
    def phase(self, name: str, round_index: int | None = None) -> Iterator[None]:
        plan, rank = self.part.plan, self.part.rank
        before = self.counting.counts.moved["bytes beside"]
        teams_before = self.counting.counts.collectives["team all-to-all"]
        yield
        label = f"{self.kind} {name} {round_index}"
        moved = self.counting.counts.moved["bytes beside"] - before
        seconds = moved / MEMORY_BYTES_PER_S
        if name == "wait":
            self.events.append(Event("wait", f"{self.kind} {round_index}"))
            return
        # A phase may come in pieces; the first one has all of a round's products.
        counted = (name, round_index) in self._counted
        self._counted.add((name, round_index))
        items = plan.items(round_index, rank) if round_index is not None and not counted else []
        if name == "newton_schulz":
            flops = sum(plan.item_flops(item) for item in items if plan.team(item) is None)
            seconds += flops / self.cost.flops_per_s
        if name == "teams":
            flops = sum(plan.item_flops(item) for item in items if plan.team(item) is not None)
            stages = self.counting.counts.collectives["team all-to-all"] - teams_before
            near, far = plan.team_sent_bytes([r // GPUS_PER_NODE for r in self.part.global_ranks])
            total = sum(plan.team_stages(r) for r in range(len(plan.rounds)))
            message = max(near) / self.cost.node_bytes_per_s + max(far) / self.cost.bytes_per_s
            for stage in range(stages):
                called = f"{label} stage {stage}"
                self.events.append(Event("compute", label, seconds=flops / self.cost.flops_per_s / stages))
                # As the product issues them: on which communicator is up to `team_stream`.
                stage_seconds = message / total + self.cost.latency_s
                self.events.append(Event("start", called, team_stream(self.exchange, self.kind), stage_seconds))
                self.events.append(Event("wait", called))
            return
        if seconds:
            self.events.append(Event("compute", label, seconds=seconds))

    def collective(self, name: str, round_index: int, sent_bytes: int, issue: Any) -> Any:
        seconds = self.seconds[round_index][2]
        self.events.append(Event("start", f"{self.kind} {round_index}", self.kind, seconds))
        return issue()


def team_stream(exchange: Exchange, kind: str) -> str:
    """Teams that have a communicator of their own do not wait for transfers."""
    return f"{kind} teams" if getattr(exchange, "team_group", None) is not None else kind


def order_before(parts: Sequence[tuple[Part, EventWatch, list[Event]]]) -> list[Event]:
    """The same work as the version before issued it: two all-to-alls a round, one optimizer after the other."""
    out: list[Event] = []
    for part, watch, events in parts:
        rounds = range(len(part.plan.rounds))

        def phases(names: Sequence[str], index: int, own: Sequence[Event] = events) -> list[Event]:
            return [e for e in own if e.name.split()[1] in names and e.name.split()[2] == str(index)]

        def gather(index: int, kind: str = part.kind, seconds: Any = watch.seconds) -> Event:
            return Event("start", f"{kind} gather {index}", kind, seconds[index][0])

        def scatter(index: int, kind: str = part.kind, seconds: Any = watch.seconds) -> Event:
            return Event("start", f"{kind} scatter {index}", kind, seconds[index + 2][1])

        for i in range(len(rounds) + 1):
            for index in [0, 1] if i == 0 else [i + 1]:
                if index in rounds:
                    out += [*phases(["momentum"], index), gather(index)]
            if i in rounds:
                out += [Event("wait", f"{part.kind} gather {i}"), *phases(["teams", "newton_schulz"], i), scatter(i)]
            if i - 1 in rounds:
                out += [Event("wait", f"{part.kind} scatter {i - 1}"), *phases(["unpack", "apply"], i - 1)]
    return out


def record(name: str, muon: MuonConfig) -> tuple[list[Event], list[Event], float]:
    """(events of a step, events in the order of before, seconds of Newton-Schulz and of teams' products)."""
    parts = parts_of(name, muon, busiest_by="flops")
    (rank,) = {part.global_ranks[part.rank] for part in parts}
    world_size = max(max(part.global_ranks) for part in parts) + 1
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    sharded_muon.compare_over_ranks = lambda *args: None  # type: ignore[assignment]
    counting, cost = Counting(), CostModel.for_device("cuda")
    events: list[Event] = []
    watches = []
    try:
        with stand_ins(counting, [0.0]):
            optimizers = []
            for part in parts:
                optimizer, _ = bound_optimizer(part, muon, dist.new_group(list(part.global_ranks)))
                exchange = optimizer.exchange
                seconds = transfer_seconds(exchange.wire, part.global_ranks, exchange.dtype.itemsize, cost)
                watch = EventWatch(part.kind, part, exchange, counting, cost, events, seconds)
                exchange.watch = watch  # type: ignore[assignment]
                optimizers.append(optimizer)
                watches.append(watch)
            with counting:
                for optimizer in optimizers:
                    optimizer.begin()
                with torch.no_grad():
                    run_together([optimizer.running for optimizer in optimizers])
    finally:
        dist.destroy_process_group()
    own = [[event for event in events if event.name.startswith(part.kind)] for part in parts]
    flops = sum(part.plan.rank_flops[part.rank] for part in parts)
    return events, order_before(list(zip(parts, watches, own, strict=True))), flops / cost.flops_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for name in args.runs:
        events, before, newton_schulz = record(name, MuonConfig())
        for order, played in (("before", before), ("fused", events)):
            collectives = {e.name: e.seconds for e in played if e.what == "start"}
            transfers = {called: s for called, s in collectives.items() if s and "stage" not in called}
            for connections in (1, 8):
                result = play(played, connections=connections)
                row = {
                    "run": name,
                    "order": order,
                    "connections": connections,
                    "step_ms": 1e3 * result.seconds,
                    "newton_schulz_ms": 1e3 * newton_schulz,
                    "exchange_ms": 1e3 * sum(s for called, s in collectives.items() if "stage" not in called),
                    "exposed_ms": 1e3 * sum(s for called, s in result.exposed.items() if "stage" not in called),
                    "exposed_team_ms": 1e3 * sum(s for called, s in result.exposed.items() if "stage" in called),
                    "exposed_shares": {called: result.exposed[called] / s for called, s in transfers.items()},
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "queue_model.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.output / "queue_model.md").write_text(markdown(rows))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table, and the exposed share of each collective below it."""
    lines = ["# The step on a GPU's queues, by a model", "", *(__doc__ or "").strip().splitlines()[4:], ""]
    lines += [
        "| run | order | connections | step ms | Newton-Schulz ms | exchange ms | exposed ms | of Newton-Schulz "
        "| teams' exposed ms |",
        "|---|---|" + "---:|" * 7,
    ]
    for row in rows:
        cells = [row["run"], row["order"], row["connections"], f"{row['step_ms']:.2f}"]
        cells += [f"{row[key]:.2f}" for key in ("newton_schulz_ms", "exchange_ms", "exposed_ms")]
        cells += [f"{row['exposed_ms'] / row['newton_schulz_ms']:.0%}", f"{row['exposed_team_ms']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Exposed share of each collective:", ""]
    for row in rows:
        shares = ", ".join(f"{called} {share:.0%}" for called, share in row["exposed_shares"].items())
        lines.append(f"- {row['run']}, {row['order']}, {row['connections']}: {shares}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
