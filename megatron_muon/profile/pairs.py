"""Bandwidth between every two ranks, which shows where a slow link or host is.

A collective ends on all its ranks together, so that its times only show that something is slow, not which rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from statistics import median

import torch
import torch.distributed as dist

from megatron_muon.profile.measure import Meter

SUSPICIOUS = 0.7
"""Share of the median below which a link or a rank is named."""


def tournament(world_size: int) -> list[list[tuple[int, int]]]:
    """Rounds in which every rank meets every other once, each at most one in a round (the circle method).

    Args:
        world_size: Number of ranks.

    Returns:
        The pairs (lower, higher) of each round; with an odd number of ranks, one rank pauses in each round.
    """
    ranks: list[int | None] = list(range(world_size))
    if world_size % 2:
        ranks.append(None)
    half = len(ranks) // 2
    rounds = []
    for _ in range(len(ranks) - 1):
        pairs = zip(ranks[:half], reversed(ranks[half:]))
        rounds.append(sorted((min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None))
        ranks = [ranks[0], ranks[-1], *ranks[1:-1]]
    return rounds


@dataclass(frozen=True)
class Pairs:
    """What every two ranks reach, both directions at once.

    Links within a host are compared with each other, and so are links between hosts.

    Attributes:
        size_bytes: Bytes sent in each direction.
        gbps: For ranks i and j, what i measured, as [i][j], in GB/s of 1e9 bytes each way; None on the diagonal.
        hosts: Host of each rank.
    """

    size_bytes: int
    gbps: tuple[tuple[float | None, ...], ...]
    hosts: tuple[str, ...]

    def link(self, a: int, b: int) -> float:
        """What the slower end of a pair measured."""
        return min(end for end in (self.gbps[a][b], self.gbps[b][a]) if end is not None)

    @cached_property
    def medians(self) -> dict[bool, float]:
        """The median of the links within a host (True) and between hosts (False), where there are any."""
        by_place: dict[bool, list[float]] = {}
        for a, b in combinations(range(len(self.gbps)), 2):
            by_place.setdefault(self.hosts[a] == self.hosts[b], []).append(self.link(a, b))
        return {within: median(values) for within, values in by_place.items()}

    def ratio(self, a: int, b: int) -> float:
        """A link over the median of those in the same place."""
        return self.link(a, b) / self.medians[self.hosts[a] == self.hosts[b]]

    @cached_property
    def slowest(self) -> list[tuple[int, int]]:
        """All pairs, in the order of `ratio`."""
        return sorted(combinations(range(len(self.gbps)), 2), key=lambda pair: self.ratio(*pair))

    @property
    def rank_ratios(self) -> tuple[float, ...]:
        """The median of `ratio` over each rank's links."""
        size = len(self.gbps)
        return tuple(median(self.ratio(a, b) for b in range(size) if b != a) for a in range(size))

    @property
    def slow_ranks(self) -> tuple[int, ...]:
        """The ranks with most links below `SUSPICIOUS`; with two ranks alone, neither is named."""
        if len(self.gbps) < 3:
            return ()
        return tuple(rank for rank, ratio in enumerate(self.rank_ratios) if ratio < SUSPICIOUS)

    @property
    def slow_links(self) -> tuple[tuple[int, int], ...]:
        """The pairs below `SUSPICIOUS`, without those of slow ranks."""
        slow = set(self.slow_ranks)
        return tuple(pair for pair in self.slowest if self.ratio(*pair) < SUSPICIOUS and not slow & set(pair))


def measure_pairs(meter: Meter, size_bytes: int, hosts: tuple[str, ...]) -> Pairs | None:
    """Measures every pair; the pairs of a round of `tournament` at the same time. Collective over the world.

    Args:
        meter: What measures.
        size_bytes: Bytes to send in each direction; at least 1.
        hosts: Host of each rank.

    Returns:
        The same on every rank; None in a world of one rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return None
    send = torch.zeros(size_bytes, dtype=torch.uint8, device=meter.device)
    receive = torch.empty_like(send)
    own: list[float | None] = [None] * world_size
    for pairs in tournament(world_size):
        peer = next((a + b - rank for a, b in pairs if rank in (a, b)), None)

        def swap(peer: int | None = peer) -> None:
            if peer is not None:
                both = [dist.P2POp(dist.isend, send, peer), dist.P2POp(dist.irecv, receive, peer)]
                for work in dist.batch_isend_irecv(both):
                    work.wait()

        microseconds = meter.time_us(swap, None)
        if peer is not None:
            own[peer] = size_bytes / microseconds / 1e3
    gathered: list[list[float | None]] = [[]] * world_size
    dist.all_gather_object(gathered, own)
    return Pairs(size_bytes, tuple(map(tuple, gathered)), hosts)
