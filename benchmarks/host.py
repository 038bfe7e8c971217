"""What the optimizer step of one rank of a large run asks of host and GPU, counted in one process without either.

    python benchmarks/host.py [--runs NAME ...] [--variant muon] [--momentum-dtype fp32] [--log] [--label after]

Plans are the real ones of `python -m megatron_muon plan`, for the first pipeline stage; `ShardedMuon` is the real one,
on tensors of the meta device, which have shapes and no elements; the process group is torch's `fake` one, and
all-to-alls are counted where the product calls torch. Of the stage's ranks, the one with most slices and matrices is
taken. For its dense and expert optimizers together, per step:

- kernels that CUDA would launch: an operation is one, a view none; a foreach operation is as many as PyTorch's
  multi-tensor kernels need, or one for each tensor if a pair differs in strides or is not dense. Newton-Schulz's own
  (within `orthogonalize`), those of teams (within their talks) and all others are counted apart;
- host milliseconds outside `orthogonalize` and teams: the least of several steps that nothing counts;
- copies between host and device, and operations that wait for the device;
- elements that copies write beside Newton-Schulz's, over elements of Muon's parameters stored and owned by the rank;
- bytes that stay from step to step beside parameters, gradients and state, and the most that a step has at once;
- collectives by kind.

Writes host.json, in which each label has its figures, and host.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_muon.config import MuonConfig
from megatron_muon.estimate.groups import PlanSettings, distinct_stages, matrix_groups, stage_plans
from megatron_muon.estimate.shapes import load_model
from megatron_muon.estimate.stages import Layout
from megatron_muon.optimizer import sharded_muon
from megatron_muon.optimizer.sharded_muon import ShardedMuon
from megatron_muon.plan.build import OwnershipPlan

RESULTS = Path(__file__).resolve().parent / "results"
META = torch.device("meta")
TIMED_STEPS = 5

RUNS: Mapping[str, tuple[str, Layout]] = {
    "Moonlight 16B dp64 ep8": ("moonlight-16b", Layout(dp=64, ep=8)),
    "Moonlight 16B dp8 ep8": ("moonlight-16b", Layout(dp=8, ep=8)),
    "Qwen3-8B dp128": ("qwen3-8b", Layout(dp=128)),
    "Llama-3-70B dp64 tp8 pp16": ("llama3-70b", Layout(dp=64, tp=8, pp=16)),
    "K2 dp64 pp16 ep16": ("kimi-k2", Layout(dp=64, pp=16, ep=16)),
}

# PyTorch's multi_tensor_apply (ATen/native/cuda/MultiTensorApply.cuh): tensors of one launch by the number of lists,
# its blocks, and elements of a block.
_TENSORS_OF_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}
_BLOCKS_OF_LAUNCH, _BLOCK_NUMEL = 320, 65536
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
_MAKES = ("profiler::", "aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::cat", "aten::stack", "aten::_foreach_copy_")


@dataclass
class Part:
    """One optimizer of the rank: its plan, and its rank among the ranks that share it."""

    kind: str
    plan: OwnershipPlan
    rank: int
    global_ranks: tuple[int, ...]


def parts_of(name: str, muon: MuonConfig, busiest_by: str = "pieces") -> list[Part]:
    """The dense and the expert plan of one rank of the run's first stage.

    Args:
        name: Of `RUNS`.
        muon: Settings.
        busiest_by: `pieces` takes the rank with most slices and items, `flops` that with most Newton-Schulz.
    """
    model_name, layout = RUNS[name]
    model, settings = load_model(model_name), PlanSettings(muon=muon)
    (layers, bucket_size), _ = next(iter(distinct_stages(model, layout, settings).items()))
    groups = matrix_groups(layers, layout, settings, bucket_size)
    handled: Counter[int] = Counter()
    everywhere: dict[int, list[Part]] = {}
    for group, plans in zip(groups, stage_plans(groups), strict=True):
        for ep_rank, plan in enumerate(plans):
            at = tuple(group.grid.places(ep_rank).tolist())
            if busiest_by == "flops":
                handled.update(dict(zip(at, plan.rank_flops, strict=True)))
            else:
                for m in plan.matrices:
                    handled.update(at[s.rank] for s in m.slices)
                handled.update(at[plan.owner(item)] for item in plan.all_items())
            for rank, stage_rank in enumerate(at):
                part = Part("experts" if group.grid.expert else "dense", plan, rank, at)
                everywhere.setdefault(stage_rank, []).append(part)
    busiest = max(handled, key=lambda rank: (handled[rank], -rank))
    return everywhere[busiest]


@dataclass
class Counts:
    """Of one step. Kernels and copied elements by where they happen: `newton_schulz`, `teams` or `beside`."""

    kernels: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    transfers_to_device: int = 0
    waits: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    wire_bytes: Counter[str] = field(default_factory=Counter)


class Counting(TorchDispatchMode):
    """Counts what CUDA would do, and the memory that is held. Entered while the optimizer is bound and steps."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.place = ["beside"]
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    @property
    def held_bytes(self) -> int:
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self.storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _WAITS:
            self.counts.waits += 1
            self._add(name, 2, 0)
            return 1.0 if name == "aten::_local_scalar_dense" else _some(args)
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        tensors = [t for value in (*args, *kwargs.values()) for t in _tensors(value)]
        for made in _tensors(out):
            self._hold(made)
        if name == "aten::_to_copy" and any(t.device != META for t in tensors):
            self.counts.transfers_to_device += 1
        if not name.startswith(_MAKES):
            kernels = launches(args) if name.startswith("aten::_foreach") else 1
            results = [*_tensors(out)] or [*_tensors(args[0])]
            self._add(name, kernels, sum(t.numel() for t in results))
            self.counts.moved[self.place[-1]] += sum(t.numel() for t in (*tensors, *results))
            self.counts.moved[f"bytes {self.place[-1]}"] += sum(t.nbytes for t in (*tensors, *results))
        return out

    def _add(self, name: str, kernels: int, written: int) -> None:
        place = self.place[-1]
        self.counts.kernels[place] += kernels
        if place == "beside":
            self.counts.operations[name.removeprefix("aten::")] += kernels
        if name in _COPIES:
            self.counts.copied[place] += written

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device == META:
            self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _some(args: Sequence[Any]) -> Any:
    """Stands for the places where a tensor is not zero: all of them."""
    return torch.empty(args[0].numel(), 1, dtype=torch.int64, device=META)


def launches(args: Sequence[Any]) -> int:
    """Kernels of a foreach operation on lists of tensors."""
    lists = [value for value in args if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)]
    first = lists[0]
    alike = all(
        len({t.dtype for t in of}) == 1
        and all(a.shape == b.shape and a.stride() == b.stride() for a, b in zip(first, of, strict=True))
        and all(t.is_contiguous() for t in of)
        for of in lists
    )
    if not alike:
        return len(first)
    count = tensors = blocks = 0
    for tensor in first:
        tensors += 1
        for _ in range(-(-tensor.numel() // _BLOCK_NUMEL)):
            blocks += 1
            if blocks == _BLOCKS_OF_LAUNCH:
                count, tensors, blocks = count + 1, 0, 0
        if tensors == _TENSORS_OF_LAUNCH[min(len(lists), 4)]:
            count, tensors, blocks = count + 1, 0, 0
    return count + (tensors > 0)


class Done:
    """A collective that is complete."""

    def wait(self) -> None:
        pass


@contextmanager
def stand_ins(counting: Counting, clock: list[float]) -> Iterator[None]:
    """Puts counters in place of torch's collectives and around Newton-Schulz and teams.

    Args:
        counting: Where to.
        clock: Its last entry grows by the seconds spent in Newton-Schulz and teams.
    """
    import megatron_muon.exchange.exchange as exchange_module
    import megatron_muon.rule.muon as muon_module

    saved = dist.all_to_all_single, dist.all_reduce, muon_module.orthogonalize, exchange_module.Exchange.run_teams

    def all_to_all(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Done:
        kind = "team all-to-all" if counting.place[-1] == "teams" else "all-to-all"
        counting.counts.collectives[kind] += 1
        counting.counts.wire_bytes[kind] += input.nbytes
        return Done()

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Done:
        counting.counts.collectives["all-reduce"] += 1
        counting.counts.wire_bytes["all-reduce"] += tensor.nbytes
        return Done()

    def within(place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            outermost = len(counting.place) == 1
            counting.place.append(place)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                counting.place.pop()
                if outermost:
                    clock[-1] += time.perf_counter() - start

        return call

    dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce  # type: ignore[assignment]
    muon_module.orthogonalize = within("newton_schulz", saved[2])
    exchange_module.Exchange.run_teams = within("teams", saved[3])  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.all_to_all_single, dist.all_reduce, muon_module.orthogonalize = saved[:3]
        exchange_module.Exchange.run_teams = saved[3]  # type: ignore[method-assign]


def bound_optimizer(part: Part, muon: MuonConfig, group: Any) -> tuple[ShardedMuon, int]:
    """The rank's optimizer on meta tensors, and the elements of its slices."""
    held = {i: s for i, m in enumerate(part.plan.matrices) for s in m.slices if s.rank == part.rank}
    slices = {i: torch.nn.Parameter(torch.empty(s.stop - s.start, device=META)) for i, s in held.items()}
    for p in slices.values():
        p.grad = torch.empty_like(p)
    optimizer = ShardedMuon([{"params": list(slices.values())}], lr=0.01, weight_decay=0.1, config=muon)
    optimizer.bind(part.plan, group, slices, META)
    return optimizer, sum(p.numel() for p in slices.values())


def owned_numel(part: Part) -> int:
    """Elements of what the rank owns."""
    items = (item for item in part.plan.all_items() if part.plan.owner(item) == part.rank)
    return sum(rows * cols for rows, cols in map(part.plan.shape, items))


class Metrics:
    """Logs as `--muon-log-interval` does, into sums that nobody reads."""

    @staticmethod
    def attach(optimizer: ShardedMuon, muon: MuonConfig) -> None:
        from megatron_muon.observe.step_metrics import MetricsRecorder

        optimizer.observer = MetricsRecorder(muon, {}, optimizer.exchange)


def measure(name: str, muon: MuonConfig, *, log: bool) -> dict[str, Any]:
    """Counts a run's step."""
    parts = parts_of(name, muon)
    (rank,) = {part.global_ranks[part.rank] for part in parts}
    world_size = max(max(part.global_ranks) for part in parts) + 1
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    sharded_muon.compare_over_ranks = lambda *args: None  # type: ignore[assignment]
    clock = [0.0]
    counting = Counting()
    try:
        with stand_ins(counting, clock):
            groups = [dist.new_group(list(part.global_ranks)) for part in parts]
            optimizers, stored = [], 0
            with counting:
                for part, group in zip(parts, groups, strict=True):
                    optimizer, numel = bound_optimizer(part, muon, group)
                    optimizers.append(optimizer)
                    stored += numel
            for optimizer in optimizers:
                optimizer.init_state()
            # Parameters, gradients and state are not the exchange's.
            kept = {
                t.untyped_storage()._cdata
                for optimizer in optimizers
                for group_ in optimizer.param_groups
                for p in group_["params"]
                for t in (p, p.grad, *optimizer.state[p].values())
            }
            for _ in range(2):
                counting.counts = Counts()
                counting.storages = {key: e for key, e in counting.storages.items() if key not in kept}
                counting.peak_bytes = 0
                for optimizer in optimizers:
                    if log:
                        Metrics.attach(optimizer, muon)
                with counting:
                    for optimizer in optimizers:
                        optimizer.step()
                if log:
                    for optimizer in optimizers:
                        optimizer.observer = sharded_muon.UNOBSERVED
            persistent = counting.held_bytes
            counts, counting.counts = counting.counts, Counts()
            beside = []
            for _ in range(TIMED_STEPS):
                clock[-1] = 0.0
                start = time.perf_counter()
                for optimizer in optimizers:
                    optimizer.step()
                beside.append(time.perf_counter() - start - clock[-1])
    finally:
        dist.destroy_process_group()
    owned = sum(map(owned_numel, parts))
    return {
        "kernels": dict(counts.kernels),
        "operations": dict(counts.operations.most_common(12)),
        "host_ms": 1e3 * min(beside),
        "host_to_device_copies": counts.transfers_to_device,
        "waits": counts.waits,
        "stored_numel": stored,
        "owned_numel": owned,
        "copied_per_element": counts.copied["beside"] / (stored + owned),
        "moved_per_element": counts.moved["beside"] / (stored + owned),
        "persistent_bytes": persistent,
        "peak_bytes": counting.peak_bytes,
        "buffer_mb": muon.exchange_buffer_mb,
        "collectives": dict(counts.collectives),
        "wire_bytes": dict(counts.wire_bytes),
        "rounds": [len(part.plan.rounds) for part in parts],
        "slices": [sum(s.rank == part.rank for m in part.plan.matrices for s in m.slices) for part in parts],
        "items": [sum(part.plan.owner(item) == part.rank for item in part.plan.all_items()) for part in parts],
    }


def markdown(results: Mapping[str, Any]) -> str:
    """All labels as tables."""
    lines = ["# The step of one rank, counted", "", *(__doc__ or "").strip().splitlines()[4:-2], ""]
    for label, entry in results.items():
        lines += [f"## {label}", "", f"{entry['settings']}; torch {entry['torch']}.", ""]
        lines += [
            "| run | rounds | slices | items | kernels beside | of teams | of Newton-Schulz | host ms | to device "
            "| waits | copied per element | persistent / flag | peak MiB | all-to-alls | of teams | all-reduces |",
            "|---|" + "---:|" * 15,
        ]
        for name, row in entry["runs"].items():
            kernels, collectives = row["kernels"], row["collectives"]
            cells = [
                name,
                " + ".join(map(str, row["rounds"])),
                " + ".join(map(str, row["slices"])),
                " + ".join(map(str, row["items"])),
                kernels.get("beside", 0),
                kernels.get("teams", 0),
                kernels.get("newton_schulz", 0),
                f"{row['host_ms']:.1f}",
                row["host_to_device_copies"],
                row["waits"],
                f"{row['copied_per_element']:.2f}",
                f"{row['persistent_bytes'] / row['buffer_mb'] / 2**20:.2f}",
                f"{row['peak_bytes'] / 2**20:.0f}",
                collectives.get("all-to-all", 0),
                collectives.get("team all-to-all", 0),
                collectives.get("all-reduce", 0),
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--variant", default="muon", choices=["muon", "normuon", "adamuon"])
    parser.add_argument("--momentum-dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--log", action="store_true", help="with the metrics of --muon-log-interval")
    parser.add_argument("--label", default="after", help="heading of these figures in host.md")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    muon = MuonConfig(variant=args.variant, momentum_dtype=args.momentum_dtype)
    path = args.output / "host.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    settings = {**asdict(muon), "log": args.log}
    changed = {key: v for key, v in settings.items() if v != {**asdict(MuonConfig()), "log": False}[key]}
    entry = {"settings": f"Moonlight's settings, {changed or 'unchanged'}", "torch": torch.__version__, "runs": {}}
    for name in args.runs:
        entry["runs"][name] = row = measure(name, muon, log=args.log)
        print(f"{name}: {json.dumps(row)}", flush=True)
    results[args.label] = entry
    args.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "host.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
