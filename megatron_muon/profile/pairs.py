"""Bandwidth between every two ranks, which shows a slow link or a slow host where collectives only show that one is.

Collectives end for all ranks together, so that their times tell little about who is slow.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from statistics import median

import torch
import torch.distributed as dist

from megatron_muon.profile.collectives import exchange_with
from megatron_muon.profile.links import Meter

SUSPICIOUS = 0.7
"""Share of the median below which a link or a rank is named."""


def tournament(world_size: int) -> list[list[tuple[int, int]]]:
    """Rounds in which every rank meets every other once, each at most one in a round (the circle method).

    Args:
        world_size: Number of ranks.

    Returns:
        For each round its pairs (lower, higher); with an odd number of ranks, one has none in each round.
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
    """What ranks reach with each other, both directions at once.

    Links within a host and links between hosts are compared each with their own.

    Attributes:
        size_bytes: Sent in each direction.
        gbps: Of rank i with rank j, as i timed it, as [i][j], in GB/s of 1e9 bytes each way; None on the diagonal.
        hosts: Of each rank.
    """

    size_bytes: int
    gbps: tuple[tuple[float | None, ...], ...]
    hosts: tuple[str, ...]

    def link(self, a: int, b: int) -> float:
        """What the slower end of a pair saw."""
        ends = (self.gbps[a][b], self.gbps[b][a])
        return min(end for end in ends if end is not None)

    @cached_property
    def medians(self) -> dict[bool, float]:
        """Over the pairs, by whether they are within a host; of those that there are."""
        by_kind: dict[bool, list[float]] = {}
        for a, b in combinations(range(len(self.gbps)), 2):
            by_kind.setdefault(self.hosts[a] == self.hosts[b], []).append(self.link(a, b))
        return {within: median(values) for within, values in by_kind.items()}

    def ratio(self, a: int, b: int) -> float:
        """A link over the median of its kind."""
        return self.link(a, b) / self.medians[self.hosts[a] == self.hosts[b]]

    @cached_property
    def slowest(self) -> list[tuple[int, int]]:
        """Pairs, slowest for their kind first."""
        return sorted(combinations(range(len(self.gbps)), 2), key=lambda pair: self.ratio(*pair))

    @property
    def rank_ratios(self) -> tuple[float, ...]:
        """The median of each rank's links over the medians of their kinds."""
        size = len(self.gbps)
        return tuple(median(self.ratio(a, b) for b in range(size) if b != a) for a in range(size))

    @property
    def slow_ranks(self) -> tuple[int, ...]:
        """Whose links are mostly below `SUSPICIOUS` of the median; with two ranks, none can be told."""
        if len(self.gbps) < 3:
            return ()
        return tuple(rank for rank, ratio in enumerate(self.rank_ratios) if ratio < SUSPICIOUS)

    @property
    def slow_links(self) -> tuple[tuple[int, int], ...]:
        """Pairs below `SUSPICIOUS` of the median, but for those of slow ranks."""
        slow = set(self.slow_ranks)
        return tuple(pair for pair in self.slowest if self.ratio(*pair) < SUSPICIOUS and not slow & set(pair))


def measure_pairs(meter: Meter, size_bytes: int) -> Pairs | None:
    """Measures every pair; the pairs of a round of `tournament` at the same time. Collective over the world.

    Args:
        meter: What measures.
        size_bytes: To send in each direction; at least 1.

    Returns:
        On every rank the whole; None in a world of one.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return None
    send = torch.zeros(size_bytes, dtype=torch.uint8, device=meter.device)
    receive = torch.empty_like(send)
    own: list[float | None] = [None] * world_size
    for pairs in tournament(world_size):
        peer = next((a + b - rank for a, b in pairs if rank in (a, b)), None)

        def call(peer: int | None = peer) -> None:
            if peer is not None:
                exchange_with(None, ((send, peer),), ((receive, peer),))

        for _ in range(meter.sweep.warmup):
            call()
        microseconds = meter.time_us(call, None)
        if peer is not None:
            own[peer] = size_bytes / microseconds / 1e3
    gathered: list[tuple[list[float | None], str]] = [([], "")] * world_size
    dist.all_gather_object(gathered, (own, platform.node()))
    return Pairs(size_bytes, tuple(tuple(row) for row, _ in gathered), tuple(host for _, host in gathered))
