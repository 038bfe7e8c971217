"""How much of the exchange hides behind Newton-Schulz: times every all-to-all of a step on Gloo ranks.

    python benchmarks/overlap.py [--ranks 2] [--matrices 16] [--size 768] [--rounds-mb 1024] [--steps 5] [--output DIR]

For each rank, seconds: the step, the time in which an exchange was under way, the time spent waiting for it, the
share that was hidden, and the same exchange without computation for comparison. Writes overlap.{md,json} and
overlap.png, the timeline of the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.devices import DeviceType, start_rank, synchronize
from megatron_muon.config import ExchangeDtype, MuonConfig
from megatron_muon.exchange.phases import LABELS
from megatron_muon.matrices.spec import MatrixSpec, whole
from megatron_muon.observe.timing.recording import CudaClock, HostClock, Recording, Span, hidden_share
from megatron_muon.optimizer.sharded_muon import ShardedMuon
from megatron_muon.plan.build import CostModel, OwnershipPlan, PlanOptions, ShardedMatrix, Slice, build_plan

_DTYPES: dict[DeviceType, ExchangeDtype] = {"cpu": "fp32", "cuda": "bf16"}


def make_plan(
    world_size: int, matrices: int, size: int, buffer_bytes: int, device_type: DeviceType = "cpu"
) -> OwnershipPlan:
    """Square matrices, each stored in equal parts on all ranks, so that nearly all of it moves."""
    numel = size * size
    sharded = [
        ShardedMatrix(
            MatrixSpec(f"matrix{i}", (size, size), 1, None, whole(size)),
            tuple(Slice(r, numel * r // world_size, numel * (r + 1) // world_size) for r in range(world_size)),
        )
        for i in range(matrices)
    ]
    options = PlanOptions(
        ns_dtype=_DTYPES[device_type],
        exchange_dtype=_DTYPES[device_type],
        buffer_bytes=buffer_bytes,
        max_team_size=1,
        cost=CostModel.for_device(device_type),
    )
    return build_plan(sharded, [0] * world_size, ns_steps=5, options=options)


def measure(
    rank: int, world_size: int, matrices: int, size: int, buffer_bytes: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Medians over steps of this rank, and the spans of the last step. Collective; the process group is initialized."""
    device_type: DeviceType = "cuda" if device.type == "cuda" else "cpu"
    plan = make_plan(world_size, matrices, size, buffer_bytes, device_type)
    held = {i: s for i, m in enumerate(plan.matrices) for s in m.slices if s.rank == rank}
    generator = torch.Generator().manual_seed(rank)
    values = {i: torch.randn(s.stop - s.start, generator=generator).to(device) for i, s in held.items()}
    slices = {i: torch.nn.Parameter(value) for i, value in values.items()}
    config = MuonConfig(ns_dtype=_DTYPES[device_type], exchange_dtype=_DTYPES[device_type])
    optimizer = ShardedMuon(list(slices.values()), lr=0.01, config=config)
    optimizer.bind(plan, None, slices, device)
    for p in slices.values():
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    optimizer.step()

    rows: dict[str, list[float]] = {"step": [], "in_flight": [], "waiting": [], "hidden": [], "alone": []}
    for _ in range(steps):
        dist.barrier()
        recording = Recording(CudaClock(device) if device.type == "cuda" else HostClock())
        optimizer.exchange.watch = recording.watch("dense")
        optimizer.step()
        recorded = recording.finish()
        optimizer.exchange.watch = LABELS
        dist.barrier()
        start = recorded.whole.start_ns / 1e9
        spans = {
            "in_flight": [_seconds(span) for span in recorded.flights],
            "computing": [_seconds(span) for span in recorded.busy if span.name == "newton_schulz"],
            "waiting": [_seconds(span) for span in recorded.busy if span.name == "wait"],
        }
        rows["step"].append(recorded.whole.ms / 1e3)
        rows["in_flight"].append(sum(b - a for a, b in spans["in_flight"]))
        rows["waiting"].append(sum(b - a for a, b in spans["waiting"]))
        rows["hidden"].append(hidden_share(spans["in_flight"], spans["waiting"]))
        rows["alone"].append(exchange_alone(optimizer, device))
    medians = {name: statistics.median(values) for name, values in rows.items()}
    return {
        "rank": rank,
        "rounds": len(plan.rounds),
        **medians,
        "waiting_of_alone": medians["waiting"] / medians["alone"],
        "timeline": {kind: [(1e3 * (a - start), 1e3 * (b - start)) for a, b in of] for kind, of in spans.items()},
    }


def _seconds(span: Span) -> tuple[float, float]:
    return span.start_ns / 1e9, span.stop_ns / 1e9


def exchange_alone(optimizer: ShardedMuon, device: torch.device) -> float:
    """Seconds for the same exchange, one collective after the other, with nothing computed."""
    exchange = optimizer.exchange
    dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    for transfer in range(exchange.wire.num_transfers):
        exchange.start(transfer)
        exchange.finish(transfer)
    synchronize(device)
    return time.perf_counter() - start


def _main(
    rank: int, world_size: int, store: str, args: tuple[int, int, int, int], device_type: DeviceType = "cpu"
) -> None:
    device = start_rank(device_type, rank, world_size, store)
    results: list[Any] = [None] * world_size
    dist.all_gather_object(results, measure(rank, world_size, *args, device))
    if rank == 0:
        Path(store + ".json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def run(
    ranks: int, matrices: int, size: int, buffer_mb: int, steps: int, device_type: DeviceType = "cpu"
) -> dict[str, Any]:
    """The report of processes of its own."""
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        settings = (matrices, size, buffer_mb * 2**20, steps)
        multiprocessing.spawn(_main, (ranks, store, settings, device_type), nprocs=ranks)
        rows = json.loads(Path(store + ".json").read_text())
    return {"torch": torch.__version__, "matrices": matrices, "size": size, "steps": steps, "ranks": rows}


def markdown(report: dict[str, Any]) -> str:
    """One line per rank."""
    columns = ("rank", "step", "in_flight", "waiting", "hidden", "alone", "waiting_of_alone")
    lines = [
        "# Overlap",
        "",
        f"{report['matrices']} matrices of {report['size']} x {report['size']} over {len(report['ranks'])} ranks, "
        f"one thread each, {report['ranks'][0]['rounds']} rounds; medians over {report['steps']} steps, in seconds; "
        f"hidden and waiting_of_alone are shares. torch {report['torch']}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---:|" * len(columns),
    ]
    for row in report["ranks"]:
        lines.append("| " + " | ".join(str(round(row[c], 4)) for c in columns) + " |")
    return "\n".join([*lines, "", "![timeline of a step](overlap.png)"]) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """The last step of each rank: what was on the wire, what was computed, and when the rank waited."""
    from matplotlib.figure import Figure

    colors = {"in_flight": "tab:blue", "computing": "tab:red", "waiting": "tab:gray"}
    labels = {"in_flight": "exchange under way", "computing": "Newton-Schulz", "waiting": "waiting"}
    figure = Figure(figsize=(9, 1 + 1.1 * len(report["ranks"])), layout="constrained")
    axes = figure.subplots()
    for row in report["ranks"]:
        for line, (kind, color) in enumerate(colors.items()):
            spans = [(a, b - a) for a, b in row["timeline"][kind]]
            at = 4 * row["rank"] + 2 - line
            axes.broken_barh(spans, (at, 0.8), color=color, alpha=0.6, label=labels[kind] if row["rank"] == 0 else None)
    axes.set_yticks(
        [4 * row["rank"] + 1.4 for row in report["ranks"]], [f"rank {row['rank']}" for row in report["ranks"]]
    )
    axes.set_xlabel("ms since the step began")
    axes.set_title(f"One step in {report['ranks'][0]['rounds']} rounds")
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--matrices", type=int, default=16)
    parser.add_argument("--size", type=int, default=768, help="rows and columns of each matrix")
    parser.add_argument("--rounds-mb", type=int, default=1024, help="size of a round's buffer")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    report = run(args.ranks, args.matrices, args.size, args.rounds_mb, args.steps)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "overlap.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output / "overlap.md").write_text(markdown(report))
    draw(report, args.output / "overlap.png")
    print(markdown(report))


if __name__ == "__main__":
    main()
