"""Measures collectives over groups of ranks as nccl-tests does, and which ranks and links are slow.

Every rank of the world calls everything here in the same order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.observe.nvml import NvmlDevice, difference
from megatron_muon.profile.busbw import (
    Collective,
    algorithm_bandwidth_gbps,
    all_to_allv_size_bytes,
    bus_factor,
    exchanged_bytes,
)
from megatron_muon.profile.collectives import (
    OPERATIONS,
    PLACEMENTS,
    Buffers,
    Operation,
    Placement,
    Task,
    count_wrong,
)
from megatron_muon.profile.process_groups import Groups
from megatron_muon.profile.settings import DTYPE_BYTES, PER_RANK, Sweep
from megatron_muon.profile.traffic import Traffic


@dataclass(frozen=True)
class Timing:
    """One placement of a row.

    Attributes:
        rank_us: Mean time of a call on each global rank, in microseconds; None of a rank that took no part.
        wrong: Elements that were not as computed, over all ranks.
        nvml: For each global rank, what NVML counted over the timed calls; None without it.
    """

    rank_us: tuple[float | None, ...]
    wrong: int
    nvml: tuple[dict[str, Any] | None, ...]

    @property
    def taking_part(self) -> list[float]:
        return [us for us in self.rank_us if us is not None]

    @property
    def slowest_us(self) -> float:
        return max(self.taking_part)

    @property
    def slowest_rank(self) -> int:
        return self.rank_us.index(self.slowest_us)

    @property
    def imbalance(self) -> float:
        """The slowest rank's time over the median."""
        return self.slowest_us / median(self.taking_part)


@dataclass(frozen=True)
class Row:
    """A collective of one size over all groups of a kind.

    Attributes:
        groups: Name of the groups.
        ranks: Of each group that took part.
        collective: Which one.
        label: For all_to_allv, the round and the direction.
        size_bytes: In nccl-tests' sense; of all_to_allv, the most that a rank of any group sends or receives.
        count: Elements, in nccl-tests' sense.
        dtype: A key of `settings.DTYPE_BYTES`.
        redop: Reduction.
        group_sizes_bytes: Size of each group's own.
        sent_bytes: For all_to_allv, what each rank sends to others, by group and rank.
        timings: By placement; None where there is none.
    """

    groups: str
    ranks: tuple[tuple[int, ...], ...]
    collective: Collective
    label: str
    size_bytes: int
    count: int
    dtype: str
    redop: str
    group_sizes_bytes: tuple[int, ...]
    sent_bytes: tuple[tuple[int, ...], ...]
    timings: Mapping[Placement, Timing | None]

    @property
    def world_size(self) -> int:
        return len(self.ranks[0])

    def algbw(self, placement: Placement) -> float | None:
        """Algorithm bandwidth at the slowest rank, GB/s."""
        timing = self.timings[placement]
        return None if timing is None else algorithm_bandwidth_gbps(self.size_bytes, timing.slowest_us / 1e6)

    def busbw(self, placement: Placement) -> float | None:
        """Bus bandwidth at the slowest rank, GB/s."""
        algbw = self.algbw(placement)
        return None if algbw is None else algbw * bus_factor(self.collective, self.world_size)

    def group_busbw(self, placement: Placement) -> list[float]:
        """Bus bandwidth of each group at its slowest rank, GB/s."""
        timing = self.timings[placement]
        if timing is None:
            return []
        slowest = (max(us for r in ranks if (us := timing.rank_us[r]) is not None) for ranks in self.ranks)
        factor = bus_factor(self.collective, self.world_size)
        sizes = self.group_sizes_bytes
        return [algorithm_bandwidth_gbps(size, us / 1e6) * factor for size, us in zip(sizes, slowest, strict=True)]

    @property
    def wrong(self) -> int:
        """Over both placements."""
        return sum(t.wrong for t in self.timings.values() if t is not None)


@dataclass
class Meter:
    """Measures on this rank. Collective over the world in each call.

    Attributes:
        sweep: How often, and which sizes.
        device: Of the buffers.
        nvml: This rank's GPU, if NVML has it.
        operations: What is measured; a seam for tests.
    """

    sweep: Sweep
    device: torch.device
    nvml: NvmlDevice | None = None
    operations: Mapping[Collective, Operation] = field(default_factory=lambda: OPERATIONS)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.sweep.dtype)
        return dtype

    def sweep_rows(self, groups: Groups, collective: Collective) -> Iterator[Row]:
        """A row for each size."""
        element_bytes = self.sweep.element_bytes
        rank = dist.get_rank()
        for count in self.sweep.counts(collective, groups.world_size):
            parts = groups.world_size if collective in PER_RANK else 1
            own = groups.ranks[groups.own(rank)]
            task = Task(collective, own.index(rank), len(own), count, self._dtype, self.device, groups.group)
            size_bytes = count * parts * element_bytes
            yield Row(
                groups=groups.name,
                ranks=groups.ranks,
                collective=collective,
                label="",
                size_bytes=size_bytes,
                count=count,
                dtype=self.sweep.dtype,
                redop=self.operations[collective].redop,
                group_sizes_bytes=(size_bytes,) * len(groups.ranks),
                sent_bytes=(),
                timings=self._timings(task),
            )

    def exchange_rows(self, groups: Groups, traffic: Sequence[Traffic], largest: int) -> Iterator[Row]:
        """A row for each all-to-all of the rounds that move most.

        Groups with more rounds than others, in other pipeline stages, are measured alone in those.

        Args:
            groups: The exchange's groups.
            traffic: Of each of them.
            largest: How many rounds.
        """
        rank = dist.get_rank()
        own = next((t for t in traffic if rank in t.ranks), None)
        rounds = _largest_rounds(traffic, largest)
        for index in rounds:
            for direction in ("gather", "scatter"):
                there = [t for t in traffic if index < len(t.rounds)]
                matrices = [getattr(t.rounds[index], direction) for t in there]
                task = None
                if own is not None and own in there:
                    matrix = getattr(own.rounds[index], direction)
                    place = own.ranks.index(rank)
                    most = max(map(sum, matrix), default=0)
                    task = Task(
                        "all_to_allv", place, len(own.ranks), most, own.torch_dtype, self.device, groups.group, matrix
                    )
                sizes = [all_to_allv_size_bytes(m, t.element_bytes) for m, t in zip(matrices, there, strict=True)]
                yield Row(
                    groups=groups.name,
                    ranks=tuple(t.ranks for t in there),
                    collective="all_to_allv",
                    label=f"{'expert' if there[0].expert else 'dense'} round {index} {direction}",
                    size_bytes=max(sizes),
                    count=max(sizes) // there[0].element_bytes,
                    dtype=_name(there[0].torch_dtype),
                    redop=self.operations["all_to_allv"].redop,
                    group_sizes_bytes=tuple(sizes),
                    sent_bytes=tuple(exchanged_bytes(m, t.element_bytes) for m, t in zip(matrices, there, strict=True)),
                    timings=self._timings(task),
                )

    def _timings(self, task: Task | None) -> dict[Placement, Timing | None]:
        """Measures this rank's task; None: the rank only waits for the others."""
        out: dict[Placement, Timing | None] = {}
        for placement in PLACEMENTS:
            own: tuple[float, int, dict[str, Any] | None] | None = None
            if task is not None:
                operation = self.operations[task.collective]
                buffers = operation.buffers(task, placement)
                own = None if buffers is None else self._measure(task, operation, buffers, placement)
            gathered: list[tuple[float, int, dict[str, Any] | None] | None] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, own)
            results = [entry for entry in gathered if entry is not None]
            out[placement] = (
                Timing(
                    tuple(None if entry is None else entry[0] for entry in gathered),
                    sum(wrong for _, wrong, _ in results),
                    tuple(None if entry is None else entry[2] for entry in gathered),
                )
                if results
                else None
            )
        return out

    def _measure(
        self, task: Task, operation: Operation, buffers: Buffers, placement: Placement
    ) -> tuple[float, int, dict[str, Any] | None]:
        for _ in range(self.sweep.warmup):
            operation.run(task, buffers)
        before = self.nvml.sample() if self.nvml else None
        microseconds = self.time_us(partial(operation.run, task, buffers), task.group)
        counted = difference(before, self.nvml.sample()).to_json() if self.nvml and before else None
        # Repeated in place, sums have grown: the result that is checked starts from fresh values.
        fresh = operation.buffers(task, placement)
        assert fresh is not None
        operation.run(task, fresh)
        self._synchronize()
        return microseconds, count_wrong(fresh.receive, operation.expected(task)), counted

    def time_us(self, call: Callable[[], object], group: dist.ProcessGroup | None) -> float:
        """Mean time of a call on this rank, in microseconds, all ranks of the group starting together."""
        dist.barrier(group)
        self._synchronize()
        start = time.perf_counter_ns()
        for _ in range(self.sweep.iterations):
            call()
        self._synchronize()
        return (time.perf_counter_ns() - start) / self.sweep.iterations / 1e3

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _name(dtype: torch.dtype) -> str:
    return next(name for name in DTYPE_BYTES if getattr(torch, name) == dtype)


def _largest_rounds(traffic: Sequence[Traffic], largest: int) -> list[int]:
    """Indices of the rounds that move most, in order."""
    moved: dict[int, int] = {}
    for t in traffic:
        for index, r in enumerate(t.rounds):
            total = sum(map(sum, r.gather)) + sum(map(sum, r.scatter))
            moved[index] = max(moved.get(index, 0), total)
    return sorted(sorted(moved, key=lambda index: (-moved[index], index))[:largest])


def average_busbw(rows: Sequence[Row]) -> float:
    """nccl-tests' last line: the mean bus bandwidth of all sizes and placements, GB/s."""
    values = [b for row in rows for p in PLACEMENTS if (b := row.busbw(p)) is not None]
    return math.fsum(values) / len(values) if values else 0.0
