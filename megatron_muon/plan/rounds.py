"""Cuts a plan's parameters into rounds that fit a buffer and give every rank work. Numbers only, no matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# With k rounds of equal size all but one gather and one scatter are hidden: 1 - 1/k of the exchange.
ENOUGH_ROUNDS = 4


@dataclass(frozen=True)
class ParameterLoad:
    """Work and memory that a parameter needs on each rank.

    Attributes:
        name: Name of the parameter, unique; breaks ties.
        work: Rank -> cost of what it owns of the parameter.
        buffer: Rank -> bytes that the parameter takes in the rank's round buffer.
    """

    name: str
    work: Mapping[int, int]
    buffer: Mapping[int, int]


def make_rounds(loads: Sequence[ParameterLoad], wanted: int, limit_bytes: int) -> tuple[tuple[int, ...], ...]:
    """Groups parameters into about `wanted` rounds, or as many more as it takes to stay within the limit on each rank.

    Heaviest first, each to the round in which its owners have least to do. A parameter that exceeds the limit on a rank
    alone shares that rank's buffer with no other parameter.

    Args:
        loads: The parameters; the result does not depend on their order.
        wanted: Number of rounds if the limit allows it.
        limit_bytes: Size of a rank's round buffer.

    Returns:
        Indices into `loads`, ascending within a round. No round is empty.
    """
    count = max(1, min(wanted, len(loads)))
    total: dict[int, int] = defaultdict(int)
    for load in loads:
        for rank, size in load.buffer.items():
            total[rank] += size
    count = min(max(count, -(-max(total.values(), default=0) // limit_bytes)), max(len(loads), 1))
    order = sorted(range(len(loads)), key=lambda i: (-max(loads[i].work.values(), default=0), loads[i].name))
    while (rounds := _distribute(loads, order, count, limit_bytes)) is None:
        # At one round for each parameter nothing is left to refuse.
        count = min(count + max(1, count // 4), len(loads))
    return tuple(tuple(sorted(members)) for members in rounds if members)


def _distribute(
    loads: Sequence[ParameterLoad], order: Sequence[int], count: int, limit_bytes: int
) -> list[list[int]] | None:
    rounds: list[list[int]] = [[] for _ in range(count)]
    work: list[dict[int, int]] = [defaultdict(int) for _ in range(count)]
    buffer: list[dict[int, int]] = [defaultdict(int) for _ in range(count)]
    for index in order:
        load = loads[index]
        best: tuple[int, int, int] | None = None
        for i in range(count):
            if rounds[i] and any(buffer[i][rank] + size > limit_bytes for rank, size in load.buffer.items()):
                continue
            busiest = max((work[i][rank] + cost for rank, cost in load.work.items()), default=0)
            fullest = max((buffer[i][rank] + size for rank, size in load.buffer.items()), default=0)
            best = min(best or (busiest, fullest, i), (busiest, fullest, i))
        if best is None:
            return None
        i = best[2]
        rounds[i].append(index)
        for rank, cost in load.work.items():
            work[i][rank] += cost
        for rank, size in load.buffer.items():
            buffer[i][rank] += size
    return rounds
