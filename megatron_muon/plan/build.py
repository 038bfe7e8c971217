"""Makes ownership plans.

A plan is made from static metadata alone (shapes and storage ranges), without communication, so it can be built and
tested for any number of ranks in one process.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_muon.config import Balance, ExchangeDtype, FloatDtype, MuonConfig
from megatron_muon.matrices.shares import divide_part, is_single, max_shares, share_positions
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.newton_schulz.names import DTYPE_BYTES, Iteration
from megatron_muon.plan.assign import Job, Owners, assign, loads_of
from megatron_muon.plan.cost_model import CostModel, alone_flops, band_cost, share_costs
from megatron_muon.plan.ownership import Item, OwnershipPlan, Segment, ShardedMatrix, Slice, Team, TeamMethod
from megatron_muon.plan.rounds import ENOUGH_ROUNDS, ParameterLoad, make_rounds
from megatron_muon.plan.wire import ROUND_SHARE

__all__ = [
    "CostModel",
    "Item",
    "OwnershipPlan",
    "PlanOptions",
    "Segment",
    "ShardedMatrix",
    "Slice",
    "Team",
    "TeamMethod",
    "build_plan",
    "fewest_idle",
    "largest_matrix_flops",
]

_DEFAULTS = MuonConfig()
_SMALL_TEAM = 8
_LEVEL = 1.05


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan is made for, besides the matrices. Defaults are those of `MuonConfig` on an H100 cluster.

    Attributes:
        ns_dtype: Data type of the Newton-Schulz iterations.
        exchange_dtype: Data type on the wire.
        max_team_size: The most ranks that may share a part; 1 gives every part one owner.
        buffer_bytes: What bounds the exchange's buffers on a rank; see `wire.ROUND_SHARE`.
        node_of: Node of each rank of the group; None if it is not known.
        cost: Rates of the cluster.
        ns_method: Iteration of the matrices that one rank does.
        balance: Whether messages within teams count when owners are chosen.
    """

    ns_dtype: FloatDtype = _DEFAULTS.ns_dtype
    exchange_dtype: ExchangeDtype = _DEFAULTS.exchange_dtype
    max_team_size: int = _DEFAULTS.max_team_size
    buffer_bytes: int = _DEFAULTS.exchange_buffer_mb * 2**20
    node_of: tuple[int, ...] | None = None
    cost: CostModel = field(default_factory=CostModel)
    ns_method: Iteration = _DEFAULTS.ns_method
    balance: Balance = _DEFAULTS.balance

    @property
    def team_cost(self) -> CostModel:
        """What owners are chosen by."""
        return self.cost if self.balance == "time" else self.cost.with_free_messages()

    @classmethod
    def from_config(cls, muon: MuonConfig, cost: CostModel, node_of: Sequence[int] | None) -> PlanOptions:
        """The options that a run with these settings plans with."""
        return cls(
            ns_dtype=muon.ns_dtype,
            exchange_dtype=muon.exchange_dtype,
            max_team_size=muon.max_team_size,
            buffer_bytes=muon.exchange_buffer_mb * 2**20,
            node_of=tuple(node_of) if node_of is not None else None,
            cost=cost,
            ns_method=muon.ns_method,
            balance=muon.balance,
        )


def build_plan(
    matrices: Sequence[ShardedMatrix],
    tp_ranks: Sequence[int],
    *,
    ns_steps: int,
    initial_loads: Sequence[float] | None = None,
    options: PlanOptions | None = None,
) -> OwnershipPlan:
    """Chooses owners that balance Newton-Schulz FLOPs over the whole DP x TP grid, and rounds.

    Least makespan, then least bytes moved, then within a node rather than across; see `assign`. The result depends on
    the arguments only, not on the rank that calls, and not on the order of the matrices but for their indices.

    Args:
        matrices: Parameters with their slices, in the same order on every rank.
        tp_ranks: Tensor-parallel rank of each rank of the group.
        ns_steps: Newton-Schulz iterations, for the FLOP count.
        initial_loads: Work that each rank has already, in FLOPs: `loads` of another plan for the same ranks.
        options: Everything else.

    Raises:
        ValueError: If the slices do not cover the parameters, or an argument has not as many entries as ranks.
    """
    options = options or PlanOptions()
    world_size = len(tp_ranks)
    initial = [round(flops) for flops in initial_loads] if initial_loads is not None else [0] * world_size
    # Where nothing is known of nodes, each rank counts as one.
    nodes = options.node_of if options.node_of is not None else tuple(range(world_size))
    for name, values in (("initial_loads", initial), ("node_of", nodes)):
        if len(values) != world_size:
            raise ValueError(f"{name}: got {len(values)} values for {world_size} ranks")
    node_size = _node_size(nodes)
    keys = [(index, part) for index, m in enumerate(matrices) for part in range(len(m.spec.parts))]
    jobs = [_job(matrices[index], part, tp_ranks, node_size, ns_steps, options) for index, part in keys]
    owners: list[list[tuple[int, ...]]] = [[()] * len(m.spec.parts) for m in matrices]
    methods: list[list[TeamMethod]] = [[TeamMethod()] * len(m.spec.parts) for m in matrices]
    assigned = assign(jobs, initial, nodes)
    for (index, part), chosen in zip(keys, assigned, strict=True):
        method = _method(matrices[index].spec, part, chosen, node_size, ns_steps, options)
        methods[index][part] = method
        owners[index][part] = _by_share(matrices[index], part, chosen.ranks, method.groups, tp_ranks)
    one_round = OwnershipPlan(
        tp_ranks=tuple(tp_ranks),
        matrices=tuple(matrices),
        owners=tuple(map(tuple, owners)),
        rounds=(tuple(range(len(matrices))),) if matrices else (),
        methods=tuple(map(tuple, methods)),
        ns_steps=ns_steps,
        ns_dtype=options.ns_dtype,
        cost=options.cost,
        ns_method=options.ns_method,
        loads=tuple(loads_of(jobs, assigned, initial)),
    )
    return replace(one_round, rounds=_rounds(one_round, options)) if matrices else one_round


def largest_matrix_flops(specs: Iterable[MatrixSpec], *, ns_steps: int, options: PlanOptions | None = None) -> int:
    """Newton-Schulz FLOPs of the largest logical matrix of any of the parameters; 0 if there are none.

    Of two plans for the same ranks, the one that has the larger matrices is to be made first: the other levels out
    what it leaves uneven, the better the smaller its own matrices are.
    """
    options = options or PlanOptions()
    shapes = {spec.logical_shape(part)[1:] for spec in specs for part in range(len(spec.parts))}
    device_type, method = options.cost.device_type, options.ns_method
    costs = (alone_flops(1, r, c, ns_steps, options.ns_dtype, device_type, method) for r, c in shapes)
    return max(costs, default=0)


def fewest_idle[T](max_team_size: int, attempt: Callable[[int], tuple[T, float]]) -> T:
    """Two plans for the same ranks, with the limit on the first one's teams that levels their sum best.

    Teams level the first kind of matrices alone, and leave the second kind nothing uneven to fill with whole matrices.
    Where that ends worse than with smaller teams or none, these are better.

    Args:
        max_team_size: The largest limit.
        attempt: From a limit to the plans and the load of the busiest rank over the ideal. Called with other limits
            while that exceeds 1.05; the same on every rank, since it may communicate.
    """
    limits = sorted({max_team_size, min(_SMALL_TEAM, max_team_size), 1}, reverse=True)
    plans, least = attempt(limits[0])
    for limit in limits[1:]:
        if least <= _LEVEL:
            break
        others, imbalance = attempt(limit)
        if imbalance < least:
            plans, least = others, imbalance
    return plans


def _node_size(nodes: Sequence[int]) -> int:
    """Ranks of a node, or 1 if not all nodes have as many."""
    sizes = set(Counter(nodes).values())
    return sizes.pop() if len(sizes) == 1 else 1


def _job(
    matrix: ShardedMatrix, part: int, tp_ranks: Sequence[int], node_size: int, ns_steps: int, options: PlanOptions
) -> Job:
    spec, slices = matrix.spec, matrix.slices
    most = min(options.max_team_size, len(tp_ranks), max_shares(spec, part))
    costs = share_costs(
        spec.logical_shape(part), most, node_size, ns_steps, options.ns_dtype, options.team_cost, options.ns_method
    )
    if len(spec.parts) == 1:
        return Job((spec.name, part), costs, {s.rank: s.stop - s.start for s in slices})
    held: dict[int, int] = {}
    for piece in range(spec.num_pieces):
        here = [s for s in slices if spec.piece_of(tp_ranks[s.rank]) == piece]
        starts, stops = (spec.part_offsets(part, piece, np.array(ends)) for ends in _ends(here))
        numels = (stops - starts).tolist()
        held |= {s.rank: numel for s, numel in zip(here, numels, strict=True) if numel}
    return Job((spec.name, part), costs, held)


def _ends(slices: Sequence[Slice]) -> tuple[list[int], list[int]]:
    return [s.start for s in slices], [s.stop for s in slices]


def _method(
    spec: MatrixSpec, part: int, owners: Owners, node_size: int, ns_steps: int, options: PlanOptions
) -> TeamMethod:
    size = len(owners.ranks)
    if size == 1 or not is_single(spec, part):
        return TeamMethod()
    groups = size // node_size if owners.placement == "nodes" else 1
    short, long = sorted(spec.joined_shape(part))
    itemsize = DTYPE_BYTES[options.ns_dtype]
    _, divided = band_cost(short, long, size, owners.placement, groups, ns_steps, itemsize, options.team_cost)
    return TeamMethod(divided, groups)


def _by_share(
    matrix: ShardedMatrix, part: int, ranks: tuple[int, ...], groups: int, tp_ranks: Sequence[int]
) -> tuple[int, ...]:
    """The owners in the order of shares, so that each gets a share that it stores much of.

    The ranks of a group stay together: first groups are matched with as many consecutive shares, then their ranks.
    """
    if len(ranks) == 1:
        return ranks
    spec, size = matrix.spec, len(ranks) // groups
    held: dict[tuple[int, int], int] = {}
    for piece in range(spec.num_pieces):
        here = [s for s in matrix.slices if s.rank in ranks and spec.piece_of(tp_ranks[s.rank]) == piece]
        starts, stops = (np.array(ends, dtype=np.int64) for ends in _ends(here))
        for index, share in enumerate(divide_part(spec, part, len(ranks))):
            before = (share_positions(spec, part, share, piece, flat) for flat in (stops, starts))
            numels = np.subtract(*before).tolist()
            held |= {(index, s.rank): numel for s, numel in zip(here, numels, strict=True) if numel}
    group_of = {rank: index // size for index, rank in enumerate(ranks)}
    by_group: dict[tuple[int, int], int] = defaultdict(int)
    for (index, rank), numel in held.items():
        by_group[index // size, group_of[rank]] += numel
    out: list[int] = []
    for block, group in enumerate(_matched(range(groups), range(groups), by_group)):
        members = range(block * size, (block + 1) * size)
        out += _matched(members, sorted(ranks[group * size : (group + 1) * size]), held)
    return tuple(out)


def _matched(places: Sequence[int], candidates: Sequence[int], held: Mapping[tuple[int, int], int]) -> list[int]:
    """For each place a candidate, such that pairs that hold much meet; as many places as candidates."""
    pairs = sorted((-numel, place, who) for (place, who), numel in held.items() if place in places)
    chosen: dict[int, int] = {}
    left = set(candidates)
    for _, place, who in pairs:
        if place not in chosen and who in left:
            chosen[place] = who
            left.remove(who)
    rest = iter(sorted(left))
    return [chosen[place] if place in chosen else next(rest) for place in places]


def _rounds(plan: OwnershipPlan, options: PlanOptions) -> tuple[tuple[int, ...], ...]:
    itemsize = DTYPE_BYTES[options.exchange_dtype]
    work: list[dict[int, int]] = [defaultdict(int) for _ in plan.matrices]
    buffer: list[dict[int, int]] = [defaultdict(int) for _ in plan.matrices]
    # A scatter is at least as large as a gather: it fills every slice, also those of copies that are not gathered.
    # One rank alone only collects.
    for matrix, sizes in zip(plan.matrices, buffer, strict=True):
        for s in matrix.slices if plan.world_size > 1 else ():
            sizes[s.rank] += (s.stop - s.start) * itemsize
    for item in plan.all_items():
        owner, spec = plan.owner(item), plan.spec(item)
        work[item.matrix][owner] += plan.item_flops(item)
        copies = spec.tp_size if spec.replicated else 1
        buffer[item.matrix][owner] += math.prod(plan.shape(item)) * copies * itemsize
    loads = [ParameterLoad(m.spec.name, work[i], buffer[i]) for i, m in enumerate(plan.matrices)]
    busy = {rank for per_rank in work for rank in per_rank}
    owned = sum(map(len, work))
    total_bytes = sum(sum(sizes.values()) for sizes in buffer)
    # Rounds hide the exchange only if a rank has work in each, and pay only if sending takes longer than starting.
    per_message = 4 * options.cost.latency_s * options.cost.bytes_per_s * plan.world_size
    worthwhile = int(total_bytes // per_message) if per_message > 0 else ENOUGH_ROUNDS
    wanted = min(ENOUGH_ROUNDS, owned // len(busy), worthwhile) if plan.world_size > 1 else 1
    return make_rounds(loads, wanted, options.buffer_bytes // ROUND_SHARE)
