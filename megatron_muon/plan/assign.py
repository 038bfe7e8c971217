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
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_muon.plan.cost_model import Kind, ShareCosts

# Sharing changes the order of sums and costs messages: not for less than this part of the makespan.
_LEAST_GAIN = 0.02
_PRECISION = 0.005
_MOST_SEARCHES = 16
# Of the load that the teams of a class had before, tried in turn.
_GROWTH = (0.5, 0.6, 0.7, 0.8, 0.9, 1 - _LEAST_GAIN)
_FULL = np.iinfo(np.int64).max // 4


class Owners(NamedTuple):
    """The owners of a job, and where they are. Of kind "nodes", ranks of a node follow each other."""

    ranks: tuple[int, ...]
    kind: Kind = "across"


@dataclass(frozen=True)
class Job:
    """Something to be done by one rank or shared by several.

    Attributes:
        name: Unique; breaks ties.
        costs: For each owner, by how many there are and where; they say how many there may be.
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
        nodes: Node of each rank; all different if nothing is known.

    Returns:
        For each job, its owners; one unless sharing it shortens the whole by at least 2 %.
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
    """What each of its owners pays for a job."""
    return job.costs.of(owners.kind, len(owners.ranks))


def loads_of(jobs: Sequence[Job], owners: Sequence[Owners], initial: Sequence[int]) -> list[int]:
    """What each rank has to do: what it had already, and its part of each job it is an owner of."""
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
    """Owners of jobs in the order given, by load; None if a job fits under `limit` in no way. No limit: no sharing."""
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
    """The cheapest of the smallest teams that have room for a job: of ranks anywhere, of a node, of whole nodes."""
    costs, load = job.costs, np.sort(ranks.load)
    by_node = ranks.by_node()
    # From the size of a team to the least load that the fullest member would have before: the size-th lowest.
    levels: dict[Kind, tuple[tuple[int, ...], NDArray[np.int64], int]] = {
        "node": (costs.node, by_node.min(axis=0), 1),
        "nodes": (costs.nodes, np.sort(by_node[:, -1])[1:], costs.node_size),
        "across": (costs.across, load, 1),
    }
    found: list[tuple[int, int, Kind]] = []
    for kind, (table, level, unit) in levels.items():
        # With more members each has less to do, up to where talking costs more.
        fits = np.flatnonzero(level[: len(table)] + np.array(table[: len(level)], dtype=np.int64) <= limit)
        if len(fits):
            index = int(fits[0])
            size = (index + 2) * unit if kind == "nodes" else index + 1
            found.append((size * table[index], size, kind))
    if not found:
        return None
    _, size, kind = min(found, key=lambda entry: entry[0])
    if kind == "across":
        return Owners(ranks.pick(range(len(ranks.load)), size, job.held), kind)
    if kind == "node":
        (node,) = ranks.pick_nodes(by_node[:, size - 1], 1, job.held)
        return Owners(ranks.pick(node, size, job.held), kind)
    chosen = ranks.pick_nodes(by_node[:, -1], size // costs.node_size, job.held)
    return Owners(tuple(rank for members in sorted(chosen) for rank in members), kind)


def _classes(jobs: Sequence[Job], owners: Sequence[Owners]) -> list[list[int]]:
    """Jobs that cost the same and have as many owners, in the same kind of place."""
    classes: dict[tuple[ShareCosts, int, Kind], list[int]] = defaultdict(list)
    for index, (job, chosen) in enumerate(zip(jobs, owners, strict=True)):
        classes[job.costs, len(chosen.ranks), chosen.kind].append(index)
    return list(classes.values())


def _grow_teams(jobs: list[Job], owners: list[Owners], initial: Sequence[int], nodes: Sequence[int]) -> None:
    """Lets ranks that the limit left idle join teams, where all teams of a class then end earlier.

    The makespan stays, and so do other jobs; what falls is the load of those that did not set it.
    """
    load = loads_of(jobs, owners, initial)

    def peak(members: list[int]) -> int:
        return max(load[rank] for index in members for rank in owners[index].ranks)

    teams = [members for members in _classes(jobs, owners) if len(owners[members[0]].ranks) > 1]
    for members in sorted(teams, key=lambda members: (-peak(members), members)):
        for fraction in _GROWTH:
            ranks = _Ranks(load, nodes)
            for index in members:
                for rank in owners[index].ranks:
                    ranks.add(rank, -_cost(jobs[index], owners[index]))
            grown = _place([jobs[index] for index in members], ranks, int(fraction * peak(members)))
            if grown is not None:
                for index, team in zip(members, grown, strict=True):
                    owners[index] = team
                load = ranks.load.tolist()
                break


def _exchange_equals(jobs: list[Job], owners: list[Owners], nodes: Sequence[int]) -> None:
    """Gives jobs of equal cost to those among their owners that hold most of them. No rank's load changes."""
    for members in _classes(jobs, owners):
        slots: dict[Owners, int] = defaultdict(int)
        for index in members:
            slots[owners[index]] += 1
        if len(slots) == 1:
            continue
        at_rank: dict[int, list[Owners]] = defaultdict(list)
        at_node: dict[int, list[Owners]] = defaultdict(list)
        for slot in sorted(slots):
            for rank in slot.ranks:
                at_rank[rank].append(slot)
            for node in sorted({nodes[rank] for rank in slot.ranks}):
                at_node[node].append(slot)
        left = _match(members, slots, _wishes(jobs, members, at_rank, range(len(nodes))), owners)
        left = _match(left, slots, _wishes(jobs, left, at_node, nodes), owners)
        remaining = [slot for slot in sorted(slots) for _ in range(slots[slot])]
        for index, slot in zip(left, remaining, strict=True):
            owners[index] = slot


def _wishes(
    jobs: list[Job], members: list[int], places: Mapping[int, list[Owners]], place_of: Sequence[int]
) -> list[tuple[int, int, Owners]]:
    """(-elements held, job, slot) for every job and slot that meet at a place (a rank or a node), the most first."""
    wishes: dict[tuple[int, Owners], int] = defaultdict(int)
    for index in members:
        for rank, numel in jobs[index].held.items():
            for slot in places.get(place_of[rank], ()):
                wishes[index, slot] += numel
    return sorted((-numel, index, slot) for (index, slot), numel in wishes.items())


def _match(
    members: list[int], slots: dict[Owners, int], wishes: list[tuple[int, int, Owners]], owners: list[Owners]
) -> list[int]:
    """Fulfils wishes in order while slots are left; returns the jobs that got none."""
    open_jobs = set(members)
    for _, index, slot in wishes:
        if index in open_jobs and slots[slot]:
            open_jobs.remove(index)
            slots[slot] -= 1
            owners[index] = slot
    return [index for index in members if index in open_jobs]


def _move_to_holders(jobs: list[Job], owners: list[Owners], initial: Sequence[int]) -> None:
    """Moves jobs that one rank does to ranks that hold more of them, if those stay within the makespan."""
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
