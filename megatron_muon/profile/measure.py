"""Times collectives over groups of ranks. Every rank of the world calls everything here in the same order.

Bandwidths are those of nccl-tests (doc/PERFORMANCE.md there): algbw is size over time; busbw is algbw times 2(n-1)/n
for all_reduce and (n-1)/n for the others, so that it can be compared with the nominal rate of a link. Whether a library
computes its collectives correctly is for nccl-tests; here they are only timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_muon.profile.process_groups import Groups
from megatron_muon.profile.settings import ELEMENT_BYTES, Collective, LinkSettings
from megatron_muon.profile.traffic import Traffic, busiest_bytes

# torch renamed these two in 2.14, and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Timing:
    """A collective of one size over all groups of a kind.

    Attributes:
        groups: Name of the groups.
        ranks: Global ranks of each group that took part.
        what: Name of the collective; for an exchange, the round and the direction.
        sizes_bytes: Size of each group's collective, as nccl-tests counts it; of an exchange, the most that a rank of
            the group sends or receives.
        rank_us: For each global rank, mean time of a call in microseconds; None if the rank took no part.
    """

    groups: str
    ranks: tuple[tuple[int, ...], ...]
    what: str
    sizes_bytes: tuple[int, ...]
    rank_us: tuple[float | None, ...]

    @property
    def slowest_us(self) -> float:
        """Time of the slowest rank."""
        return max(us for us in self.rank_us if us is not None)

    @property
    def algbw(self) -> float:
        """Size over time at the slowest rank, in GB/s (1e9 bytes)."""
        return max(self.sizes_bytes) / self.slowest_us / 1e3

    @property
    def group_busbw(self) -> tuple[float, ...]:
        """Bus bandwidth of each group at its slowest rank, in GB/s."""
        out = []
        for ranks, size in zip(self.ranks, self.sizes_bytes, strict=True):
            slowest = max(us for rank in ranks if (us := self.rank_us[rank]) is not None)
            factor = (2 if self.what == "all_reduce" else 1) * (len(ranks) - 1) / len(ranks)
            out.append(size * factor / slowest / 1e3)
        return tuple(out)


@dataclass(frozen=True)
class Meter:
    """Measures on this rank. Each call is collective over the world.

    Attributes:
        settings: Sizes and repetitions.
        device: Device of the buffers.
    """

    settings: LinkSettings
    device: torch.device

    def sweep(self, groups: Groups, collective: Collective) -> Iterator[Timing]:
        """Measures a collective at each size of the settings."""
        size = groups.world_size
        for count in self.settings.counts(collective, size):
            whole = count * (1 if collective == "all_reduce" else size)
            call = self._call(collective, count, size, groups.group)
            sizes = (whole * ELEMENT_BYTES,) * len(groups.ranks)
            yield Timing(groups.name, groups.ranks, collective, sizes, self._gather(self.time_us(call, groups.group)))

    def exchange(self, groups: Groups, traffic: Sequence[Traffic], most: int) -> Iterator[Timing]:
        """Measures the transfers that move most.

        Groups of other pipeline stages may have fewer transfers; their ranks only wait in the others.

        Args:
            groups: The groups of the exchange.
            traffic: The exchange of each group.
            most: Largest number of transfers to measure.
        """
        own = next((t for t in traffic if dist.get_rank() in t.ranks), None)
        moved: dict[int, int] = {}
        for t in traffic:
            for index, matrix in enumerate(t.transfers):
                moved[index] = max(moved.get(index, 0), sum(map(sum, matrix)))
        for index in sorted(sorted(moved, key=lambda index: (-moved[index], index))[:most]):
            there = [t for t in traffic if index < len(t.transfers)]
            us = None
            if own in there and own is not None:
                us = self.time_us(self._replay(own, index, groups.group), groups.group)
            yield Timing(
                groups.name,
                tuple(t.ranks for t in there),
                f"{'expert' if there[0].expert else 'dense'} transfer {index}",
                tuple(busiest_bytes(t.transfers[index]) for t in there),
                self._gather(us),
            )

    def _replay(self, own: Traffic, index: int, group: dist.ProcessGroup | None) -> Callable[[], object]:
        matrix, place = own.transfers[index], own.ranks.index(dist.get_rank())
        sent, received = list(matrix[place]), [row[place] for row in matrix]
        send, receive = self._bytes(sum(sent)), self._bytes(sum(received))
        return lambda: dist.all_to_all_single(receive, send, received, sent, group=group)

    def _call(
        self, collective: Collective, count: int, size: int, group: dist.ProcessGroup | None
    ) -> Callable[[], object]:
        whole = torch.zeros(count * size, device=self.device)
        part, other = whole[:count].clone(), torch.zeros_like(whole)
        calls: dict[Collective, Callable[[], object]] = {
            "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
            "all_gather": lambda: _all_gather(whole, part, group=group),
            "reduce_scatter": lambda: _reduce_scatter(part, whole, group=group),
            "all_reduce": lambda: dist.all_reduce(part, group=group),
        }
        return calls[collective]

    def _bytes(self, numel: int) -> torch.Tensor:
        return torch.zeros(numel, dtype=torch.uint8, device=self.device)

    def _gather(self, us: float | None) -> tuple[float | None, ...]:
        gathered: list[float | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, us)
        return tuple(gathered)

    def time_us(self, call: Callable[[], object], group: dist.ProcessGroup | None) -> float:
        """Mean time of a call on this rank after the warm-up, in microseconds; the group's ranks start together."""
        for _ in range(self.settings.warmup):
            call()
        self._synchronize()
        dist.barrier(group)
        self._synchronize()
        start = time.perf_counter_ns()
        for _ in range(self.settings.iterations):
            call()
        self._synchronize()
        return (time.perf_counter_ns() - start) / self.settings.iterations / 1e3

    def launch_us(self, launches: int = 1000) -> float:
        """Time that a small kernel adds to this rank's stream, in microseconds."""
        small = torch.zeros(16, device=self.device)
        small.add_(1.0)
        self._synchronize()
        start = time.perf_counter_ns()
        for _ in range(launches):
            small.add_(1.0)
        self._synchronize()
        return (time.perf_counter_ns() - start) / launches / 1e3

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
