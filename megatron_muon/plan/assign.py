"""Assigns jobs to ranks: least makespan first, then least bytes moved, then locality. Numbers only, no matrices.

Longest processing time first, to the least loaded rank. Where that leaves ranks idle, jobs are shared: a limit on the
load is searched for by bisection, and a job that fits on no rank under the limit is shared by the fewest ranks that
have room for it. Jobs that cost the same are then exchanged among their owners, and jobs moved within the limit, so
that they lie where their data is. The result depends on the jobs' names and numbers only, not on their order.

n jobs on R ranks take O(n log(n R)) for a limit, O(R log R) for each job that is shared under it, and a sort of what
the ranks hold.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_muon.plan.cost_model import ShareCosts, TeamPlacement

# Sharing changes the order of sums and costs messages: not for less than this part of the makespan.
_LEAST_GAIN = 0.02
_PRECISION = 0.005
_MOST_SEARCHES = 16
# Of the load that the teams of a class had before, tried in turn.
_GROWTH = (0.5, 0.6, 0.7, 0.8, 0.9, 1 - _LEAST_GAIN)
_FULL = np.iinfo(np.int64).max // 4


class Owners(NamedTuple):
    """The owners of a job, and where they are. With placement "nodes" the ranks of each node follow each other."""

    ranks: tuple[int, ...]
    placement: TeamPlacement = "across"


@dataclass(frozen=True)
class Job:
    """Work for one rank, or for several that share it.

    Attributes:
        name: Name of the job, unique; breaks ties.
        costs: Cost for each owner, by the number of owners and their placement; the largest number is the limit.
        held: Rank -> elements of the job that it stores.
    """

    name: tuple[str, int]
    costs: ShareCosts
    held: Mapping[int, int] = field(hash=False)

    @property
    def alone(self) -> int:
        return self.costs.across[0]


def assign(jobs: Sequence[Job], initial: Sequence[int], nodes: Sequence[int]) -> list[Owners]:
    """Chooses the owners of every job.

    Args:
        jobs: In any order.
        initial: Load that each rank has already, in the unit of the costs.
        nodes: Node of each rank; all different if the nodes are not known.

    Returns:
        The owners of each job: one, unless sharing shortens the makespan by at least 2 %.
    """
    order = sorted(range(len(jobs)), key=lambda i: (-jobs[i].alone, jobs[i].name))
    ranked = [jobs[i] for i in order]
    owners = _place(ranked, _Ranks(initial, nodes), limit=None)
    assert owners is not None
    shared = _shared(ranked, initial, nodes, max(loads_of(ranked, owners, initial), default=0))
    if shared is not None:
        owners = shared
        _grow_teams(ranked, owners, initial, nodes)
    _exchange_equals(ranked, owners, nodes)
    _move_to_holders(ranked, owners, initial)
    chosen = dict(zip(order, owners, strict=True))
    return [chosen[index] for index in range(len(jobs))]


def _cost(job: Job, owners: Owners) -> int:
    """The cost of a job for each of its owners."""
    return job.costs.of(owners.placement, len(owners.ranks))


def loads_of(jobs: Sequence[Job], owners: Sequence[Owners], initial: Sequence[int]) -> list[int]:
    """The load of each rank: what it had already, and its part of each job that it owns."""
    load = list(initial)
    for job, chosen in zip(jobs, owners, strict=True):
        cost = _cost(job, chosen)
        for rank in chosen.ranks:
            load[rank] += cost
    return load


def _shared(jobs: list[Job], initial: Sequence[int], nodes: Sequence[int], alone: int) -> list[Owners] | None:
    """The owners under the lowest limit found, or None if sharing does not shorten the makespan `alone` enough."""
    ideal = (sum(job.alone for job in jobs) + sum(initial)) // max(len(initial), 1)
    low, high = max([ideal, *initial]), alone
    best = None
    if all(len(job.costs.across) == 1 for job in jobs) or len(initial) == 1:
        return None
    for _ in range(_MOST_SEARCHES):
        if high - low <= _PRECISION * high:
            break
        limit = (low + high) // 2
        owners = _place(jobs, _Ranks(initial, nodes), limit)
        if owners is None:
            low = limit
        else:
            best = owners
            high = max(loads_of(jobs, owners, initial))
    return best if best is not None and high <= (1 - _LEAST_GAIN) * alone else None


class _Ranks:
    """Loads of the ranks, with the least loaded ones at hand: overall, and within each node."""

    def __init__(self, initial: Sequence[int], nodes: Sequence[int]) -> None:
        self.load: NDArray[np.int64] = np.array(initial, dtype=np.int64)
        self.heap = [(load, rank) for rank, load in enumerate(initial)]
        heapq.heapify(self.heap)
        members: dict[int, list[int]] = defaultdict(list)
        for rank, node in enumerate(nodes):
            members[node].append(rank)
        self.members = list(members.values())
        self.node_index = {rank: index for index, ranks in enumerate(self.members) for rank in ranks}
        width = max(map(len, self.members), default=0)
        # Loads of each node in ascending order; nodes that have fewer ranks are filled up.
        self.sorted_by_node: NDArray[np.int64] = np.full((len(self.members), width), _FULL, dtype=np.int64)
        self.stale = set(range(len(self.members)))

    def least_loaded(self) -> int:
        while self.heap[0][0] != self.load[self.heap[0][1]]:
            heapq.heappop(self.heap)
        return self.heap[0][1]

    def add(self, rank: int, cost: int) -> None:
        self.load[rank] += cost
        heapq.heappush(self.heap, (int(self.load[rank]), rank))
        self.stale.add(self.node_index[rank])

    def by_node(self) -> NDArray[np.int64]:
        for index in self.stale:
            ranks = self.members[index]
            self.sorted_by_node[index, : len(ranks)] = np.sort(self.load[ranks])
        self.stale.clear()
        return self.sorted_by_node

    def pick(self, ranks: Sequence[int], count: int, held: Mapping[int, int]) -> tuple[int, ...]:
        """The `count` least loaded of `ranks`; of equally loaded ones those that hold most, then the lowest."""
        return tuple(sorted(sorted(ranks, key=lambda r: (self.load[r], -held.get(r, 0), r))[:count]))

    def pick_nodes(self, level: NDArray[np.int64], count: int, held: Mapping[int, int]) -> list[list[int]]:
        """Members of the `count` nodes of least `level`; of equal ones those that hold most, then the lowest."""
        reach = np.partition(level, count - 1)[count - 1]
        by_node: dict[int, int] = defaultdict(int)
        for rank, numel in held.items():
            by_node[self.node_index[rank]] += numel
        order = sorted(
            np.flatnonzero(level <= reach).tolist(),
            key=lambda i: (level[i], -by_node.get(i, 0), self.members[i][0]),
        )
        return [self.members[i] for i in order[:count]]


def _place(jobs: list[Job], ranks: _Ranks, limit: int | None) -> list[Owners] | None:
    """Owners of jobs, chosen in the given order by load; None if a job does not fit. Without a limit none is shared."""
    out = []
    for job in jobs:
        rank = ranks.least_loaded()
        if limit is None or ranks.load[rank] + job.alone <= limit:
            level = ranks.load[rank]
            equals = [r for r in job.held if ranks.load[r] == level]
            if equals:
                rank = min(equals, key=lambda r: (-job.held[r], r))
            ranks.add(rank, job.alone)
            out.append(Owners((rank,)))
            continue
        team = _team(job, ranks, limit)
        if team is None:
            return None
        cost = _cost(job, team)
        for rank in team.ranks:
            ranks.add(rank, cost)
        out.append(team)
    return out


def _team(job: Job, ranks: _Ranks, limit: int) -> Owners | None:
    """The cheapest team for a job under the limit, of the smallest ones of each placement; None if none fits."""
    costs, by_node = job.costs, ranks.by_node()
    sizes = {
        "node": _smallest_size(costs.node, by_node.min(axis=0), limit),
        "nodes": _smallest_size(costs.nodes, np.sort(by_node[:, -1])[1:], limit, first=2, unit=costs.node_size),
        "across": _smallest_size(costs.across, np.sort(ranks.load), limit),
    }
    placements: tuple[TeamPlacement, ...] = ("node", "nodes", "across")
    # All members together; of equal costs the first placement, in which ranks are nearest to each other.
    totals = {p: size * costs.of(p, size) for p in placements if (size := sizes[p]) is not None}
    if not totals:
        return None
    placement = min(totals, key=lambda p: totals[p])
    size = sizes[placement] or 0
    if placement == "across":
        members = ranks.pick(range(len(ranks.load)), size, job.held)
    elif placement == "node":
        (node,) = ranks.pick_nodes(by_node[:, size - 1], 1, job.held)
        members = ranks.pick(node, size, job.held)
    else:
        chosen = ranks.pick_nodes(by_node[:, -1], size // costs.node_size, job.held)
        members = tuple(rank for node in sorted(chosen) for rank in node)
    return Owners(members, placement)


def _smallest_size(
    costs: tuple[int, ...], level: NDArray[np.int64], limit: int, *, first: int = 1, unit: int = 1
) -> int | None:
    """The smallest team in which also the fullest member stays under the limit.

    Args:
        costs: Cost for each member, for teams of first, first + 1, ... times `unit` members.
        level: Least load that the fullest member of such teams has before.
        limit: The most load that a rank may have.
        first: Units of the smallest team.
        unit: Members that a team grows by.
    """
    count = min(len(costs), len(level))
    fits = np.flatnonzero(level[:count] + np.array(costs[:count], dtype=np.int64) <= limit)
    return (int(fits[0]) + first) * unit if len(fits) else None


def _classes(jobs: Sequence[Job], owners: Sequence[Owners]) -> list[list[int]]:
    """Indices of jobs that are interchangeable: of equal cost, with equally many owners in the same placement."""
    classes: dict[tuple[ShareCosts, int, TeamPlacement], list[int]] = defaultdict(list)
    for index, (job, chosen) in enumerate(zip(jobs, owners, strict=True)):
        classes[job.costs, len(chosen.ranks), chosen.placement].append(index)
    return list(classes.values())


def _grow_teams(jobs: list[Job], owners: list[Owners], initial: Sequence[int], nodes: Sequence[int]) -> None:
    """Makes teams larger where idle ranks let all teams of a class finish earlier.

    `_place` stops at the smallest team that fits under the limit, which may leave ranks without work. Each class of
    equal jobs, those of the busiest ranks first, is placed again under a lower limit: a fraction of its own peak. The
    makespan does not grow, and the owners of other jobs stay.
    """
    load = loads_of(jobs, owners, initial)

    def peak(members: list[int]) -> int:
        return max(load[rank] for index in members for rank in owners[index].ranks)

    teams = [members for members in _classes(jobs, owners) if len(owners[members[0]].ranks) > 1]
    for members in sorted(teams, key=lambda members: (-peak(members), members)):
        without = list(load)
        for index in members:
            for rank in owners[index].ranks:
                without[rank] -= _cost(jobs[index], owners[index])
        for fraction in _GROWTH:
            ranks = _Ranks(without, nodes)
            grown = _place([jobs[index] for index in members], ranks, int(fraction * peak(members)))
            if grown is not None:
                for index, team in zip(members, grown, strict=True):
                    owners[index] = team
                load = ranks.load.tolist()
                break


def _exchange_equals(jobs: list[Job], owners: list[Owners], nodes: Sequence[int]) -> None:
    """Permutes the owners of interchangeable jobs, so that jobs lie where their data is. No rank's load changes.

    First a job goes to owners that store some of it themselves, then to owners in a node where some of it is stored,
    and the rest to the owners that are left.
    """
    for members in _classes(jobs, owners):
        free = Counter(owners[index] for index in members)
        if len(free) == 1:
            continue
        for place_of in (range(len(nodes)), nodes):
            members = _give_to_holders(jobs, members, free, place_of, owners)
        for index, chosen in zip(members, sorted(free.elements()), strict=True):
            owners[index] = chosen


def _give_to_holders(
    jobs: list[Job], members: list[int], free: Counter[Owners], place_of: Sequence[int], owners: list[Owners]
) -> list[int]:
    """Gives jobs to owners in places where their data is, largest amounts first.

    Args:
        jobs: All jobs.
        members: Indices of the jobs that may be given.
        free: How many of these each owner (or team) can still take; reduced.
        place_of: Place of each rank: the rank itself, or its node.
        owners: Owners of all jobs; written.

    Returns:
        The members that are still without owners.
    """
    at: dict[int, list[Owners]] = defaultdict(list)
    for candidate in sorted(free):
        for place in {place_of[rank] for rank in candidate.ranks}:
            at[place].append(candidate)
    near: dict[tuple[int, Owners], int] = defaultdict(int)
    for index in members:
        for rank, numel in jobs[index].held.items():
            for candidate in at.get(place_of[rank], ()):
                near[index, candidate] += numel
    waiting = set(members)
    for _, index, candidate in sorted((-numel, *pair) for pair, numel in near.items()):
        if index in waiting and free[candidate]:
            waiting.remove(index)
            free[candidate] -= 1
            owners[index] = candidate
    return [index for index in members if index in waiting]


def _move_to_holders(jobs: list[Job], owners: list[Owners], initial: Sequence[int]) -> None:
    """Moves jobs with one owner to ranks that hold more of them, where the makespan allows it."""
    load = loads_of(jobs, owners, initial)
    limit = max(load, default=0)
    for index, job in enumerate(jobs):
        if len(owners[index].ranks) > 1:
            continue
        owner = owners[index].ranks[0]
        for rank, numel in sorted(job.held.items(), key=lambda entry: (-entry[1], entry[0])):
            if numel <= job.held.get(owner, 0):
                break
            if load[rank] + job.alone <= limit:
                load[owner] -= job.alone
                load[rank] += job.alone
                owners[index] = Owners((rank,))
                break
