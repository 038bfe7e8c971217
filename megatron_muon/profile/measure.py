"""Times all-to-alls over groups of ranks. Every rank of the world calls everything here in the same order.

Bandwidths are those of nccl-tests (doc/PERFORMANCE.md there): algbw is size over time; busbw is algbw times (n-1)/n, so
that it can be compared with the nominal rate of a link. Whether a library computes its collectives correctly, and what
its other collectives reach, is for nccl-tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_muon.profile.process_groups import Groups
from megatron_muon.profile.settings import ELEMENT_BYTES, LinkSettings
from megatron_muon.profile.traffic import Traffic, busiest_bytes

SWEEP = "all_to_all"
"""What `Meter.sweep` measures, as tables name it."""


@dataclass(frozen=True)
class Timing:
    """An all-to-all of one size over all groups of a kind.

    Attributes:
        groups: Name of the groups.
        ranks: Global ranks of each group that took part.
        what: `SWEEP`, or the transfer of a plan.
        sizes_bytes: Size of each group's all-to-all, as nccl-tests counts it; with uneven splits, the most that a rank
            of the group sends or receives.
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
            out.append(size * (len(ranks) - 1) / len(ranks) / slowest / 1e3)
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

    def sweep(self, groups: Groups) -> Iterator[Timing]:
        """Measures an all-to-all with equal splits at each size of the settings."""
        for count in self.settings.counts(groups.world_size):
            send = torch.zeros(count * groups.world_size, device=self.device)
            sizes = (send.numel() * ELEMENT_BYTES,) * len(groups.ranks)
            us = self._all_to_all_us(send, torch.empty_like(send), None, None, groups.group)
            yield Timing(groups.name, groups.ranks, SWEEP, sizes, self._gather(us))

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
                matrix, place = own.transfers[index], own.ranks.index(dist.get_rank())
                sent, received = list(matrix[place]), [row[place] for row in matrix]
                send, receive = (
                    torch.zeros(sum(splits), dtype=torch.uint8, device=self.device) for splits in (sent, received)
                )
                us = self._all_to_all_us(send, receive, sent, received, groups.group)
            yield Timing(
                groups.name,
                tuple(t.ranks for t in there),
                f"{'expert' if there[0].expert else 'dense'} transfer {index}",
                tuple(busiest_bytes(t.transfers[index]) for t in there),
                self._gather(us),
            )

    def _all_to_all_us(
        self,
        send: torch.Tensor,
        receive: torch.Tensor,
        sent: list[int] | None,
        received: list[int] | None,
        group: dist.ProcessGroup,
    ) -> float:
        return self.time_us(lambda: dist.all_to_all_single(receive, send, received, sent, group=group), group)

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
        return self._mean_us(call, self.settings.iterations)

    def launch_us(self) -> float:
        """Time that a small kernel adds to this rank's stream, in microseconds."""
        small = torch.zeros(16, device=self.device)
        small.add_(1.0)
        return self._mean_us(lambda: small.add_(1.0), 1000)

    def _mean_us(self, call: Callable[[], object], iterations: int) -> float:
        self._synchronize()
        start = time.perf_counter_ns()
        for _ in range(iterations):
            call()
        self._synchronize()
        return (time.perf_counter_ns() - start) / iterations / 1e3

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
