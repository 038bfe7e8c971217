"""Several ranks on one matrix get what one rank gets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_muon.config import MuonConfig
from megatron_muon.exchange import team as team_module
from megatron_muon.exchange.lockstep import Talk
from megatron_muon.exchange.team import orthogonalize_band
from megatron_muon.exchange.team_groups import make_team_groups
from megatron_muon.matrices.shares import max_shares
from megatron_muon.matrices.spec import Blocks, MatrixSpec, Part, whole
from megatron_muon.newton_schulz import CoefficientSet, coefficients, orthogonalize, scaling_for
from megatron_muon.optimizer import step as step_module
from megatron_muon.optimizer.sharded_muon import ShardedMuon
from megatron_muon.plan.build import OwnershipPlan, PlanOptions, TeamMethod, build_plan
from megatron_muon.plan.cost_model import LAUNCHES_PER_STAGE, band_stages
from megatron_muon.plan.seats import Seat, block_bounds
from megatron_muon.rule.reference_adaptive import ReferenceVariants
from megatron_muon.state_keys import MOMENTUM
from tests.distributed import run_ranks
from tests.models import normal
from tests.plans import FREE, evenly, gate_and_up, qkv_parts

SCHEDULE = coefficients("keller", 5)
STEPS_OF = {"deepseek_v4": 10, "aol": 4}


def tolerance(m: int, n: int, steps: int = 5) -> float:
    """How far sums in another order may put entries of an orthogonalized m x n matrix, whose norm is at most sqrt(m).

    A sum of n float32 products of unit vectors differs by at most about sqrt(n) eps with rounding errors that do not
    conspire. Each of the three products of a step adds that, and every later step multiplies an error by the slope at
    zero, 3.4445, at most: 3 * sqrt(n) * eps * (3.4445^steps - 1) / 2.4445. Entries of singular value s take part
    with s <= 1.2, so that the bound is one for entries too; it is far from 1, what a lost partial product costs.
    """
    growth = sum(3.4445**step for step in range(steps))
    return 3 * max(m, n) ** 0.5 * torch.finfo(torch.float32).eps * growth


def converse(talks: Sequence[Talk]) -> list[Tensor]:
    """Runs the members of one team in one process."""
    messages = [next(talk) for talk in talks]
    results: dict[int, Tensor] = {}
    while len(results) < len(talks):
        assert all(message.blocks.is_contiguous() and message.blocks.dim() == 1 for message in messages)
        sent = [torch.split(message.blocks, list(message.sent)) for message in messages]
        for i, message in enumerate(messages):
            assert list(message.received) == [sent[j][i].numel() for j in range(len(talks))]
        # Copied, as a wire does it.
        answers = [torch.cat([sent[j][i] for j in range(len(talks))]) for i in range(len(talks))]
        for i, talk in enumerate(talks):
            try:
                messages[i] = talk.send(answers[i])
            except StopIteration as end:
                results[i] = end.value
        assert not results or len(results) == len(talks), "members must speak equally often"
    return [results[i] for i in range(len(talks))]


def by_team(
    x: Tensor,
    size: int,
    *,
    groups: int = 1,
    divided: bool = False,
    dtype: torch.dtype = torch.float32,
    coefficient_set: str = "keller",
) -> Tensor:
    """Orthogonalizes with bands along the columns."""
    bounds = [x.shape[1] * i // size for i in range(size + 1)]
    bands = [x[:, a:b].clone() for a, b in itertools.pairwise(bounds)]
    schedule, scaling = coefficients(coefficient_set, STEPS_OF.get(coefficient_set, 5)), scaling_for(coefficient_set)
    results = converse(
        [
            orthogonalize_band(band, Seat(i, size, groups), schedule, divided=divided, dtype=dtype, scaling=scaling)
            for i, band in enumerate(bands)
        ]
    )
    assert {result.dtype for result in results} == {dtype}
    for band, (a, b) in zip(bands, itertools.pairwise(bounds), strict=True):
        assert torch.equal(band, x[:, a:b]), "the input is not mutated"
    return torch.cat(results, dim=1)


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize(
    ("shape", "size", "groups"),
    [
        ((7, 7), 2, 1),
        ((5, 23), 3, 1),
        ((16, 48), 4, 2),
        ((3, 40), 6, 3),
        ((12, 31), 6, 2),
        ((1, 9), 4, 1),
        ((2, 8), 8, 4),
    ],
)
def test_members_together_equal_one_rank(shape: tuple[int, int], size: int, groups: int, divided: bool) -> None:
    x = normal(f"team {shape}", shape)
    expected = orthogonalize(x, SCHEDULE, iteration="standard")
    got = by_team(x, size, groups=groups, divided=divided)
    assert (got - expected).abs().max() <= tolerance(*shape)
    assert torch.equal(got, by_team(x, size, groups=groups, divided=divided)), "the same bits in every run"


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e30])
def test_the_scale_of_the_input_does_not_matter(scale: float) -> None:
    x = normal("scales", (6, 20))
    # Members with very different entries: each scales by its own power of two before it squares.
    x[:, :5] *= 1e-12
    expected = orthogonalize(x * scale, SCHEDULE, iteration="standard")
    got = by_team(x * scale, 4)
    assert got.isfinite().all() and (got - expected).abs().max() <= tolerance(6, 20)
    if scale:
        assert got.abs().max() > 0.1


def test_members_agree_on_the_gram_matrix_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    all_reduce = team_module._all_reduce

    def recording(partial: Tensor, seat: Seat) -> Any:
        gram = yield from all_reduce(partial, seat)
        seen.append(gram.clone())
        return gram

    monkeypatch.setattr(team_module, "_all_reduce", recording)
    by_team(normal("agree", (9, 40)), 6, groups=2)
    assert len(seen) == 6 * len(SCHEDULE)
    for step in range(len(SCHEDULE)):
        for other in seen[6 * step : 6 * step + 6]:
            assert torch.equal(seen[6 * step], other)


def test_half_precision_sums_in_float32_and_rounds_once() -> None:
    """1 + 3 * 2^-9 is lost in bfloat16 if added one by one, each below half a unit in the last place."""
    blocks = torch.tensor([[1.0], [2.0**-9], [2.0**-9], [2.0**-9]], dtype=torch.bfloat16)
    assert team_module._sum(blocks).item() == 1 + 2.0**-7


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, scale: float) -> None:
    """Newton-Schulz in half precision is itself off by rounding times growth; a team is off by no more.

    Not even where the gradient is outside the range of float16.
    """
    x = normal("half", (8, 64))
    exact = orthogonalize(x.double(), SCHEDULE)
    alone = (orthogonalize(x.to(dtype), SCHEDULE, iteration="standard").double() - exact).norm()
    together = (by_team(x * scale, 4, dtype=dtype).double() - exact).norm()
    assert together <= 3 * alone


@pytest.mark.parametrize("coefficient_set", get_args(CoefficientSet))
@pytest.mark.parametrize("groups", [1, 2])
def test_every_coefficient_set(coefficient_set: str, groups: int) -> None:
    x = normal("sets", (8, 24))
    schedule = coefficients(coefficient_set, STEPS_OF.get(coefficient_set, 5))
    expected = orthogonalize(x.double(), schedule, scaling=scaling_for(coefficient_set))
    got = by_team(x, 4, groups=groups, coefficient_set=coefficient_set)
    # In float64 against float32: rounding of 2^-24 grows by the largest slope at zero of any set, 8.3 * 4.1^4.
    assert (got - expected).abs().max() <= 3 * 24**0.5 * 2.0**-24 * 8.3 * 4.1**4


def test_a_schedule_that_needs_another_scaling_is_refused_before_anything_is_said() -> None:
    with pytest.raises(ValueError, match="scale with scaling='aol'"):
        orthogonalize_band(torch.ones(2, 3), Seat(0, 2), coefficients("aol", 4), divided=False, dtype=torch.float32)


def test_blocks_of_symmetric_matrices_are_of_equal_area() -> None:
    for count in (1, 2, 3, 8, 64):
        bounds = block_bounds(100_000, count)
        areas = [(b - a) * b for a, b in itertools.pairwise(bounds)]
        assert (bounds[0], bounds[-1], len(bounds)) == (0, 100_000, count + 1)
        # Either end of a block, of at least 100_000 / 2 / count rows, is rounded by 8 rows at most.
        assert max(areas) <= (1 + 2 * 16 / (100_000 / 2 / count)) * min(areas)
        # Little more than half of the matrix.
        assert sum(areas) <= 1e10 * (0.51 + 0.5 / count**0.5)
    # Fewer rows than members: some have none.
    few = block_bounds(2, 5)
    assert (few[0], few[-1]) == (0, 2) and list(few) == sorted(few)


@pytest.mark.parametrize(
    ("total", "count", "unit"), [(2048, 16, 16), (2048, 17, 8), (1024, 8, 16), (512, 16, 4), (128, 8, 2), (100, 8, 1)]
)
def test_blocks_begin_at_multiples_of_16_rows_where_they_are_large_enough(total: int, count: int, unit: int) -> None:
    bounds = block_bounds(total, count)
    assert all(bound % unit == 0 for bound in bounds) and any(bound % (2 * unit) for bound in bounds)
    assert all(a < b for a, b in itertools.pairwise(bounds))
    areas = [(b - a) * b for a, b in itertools.pairwise(bounds)]
    assert max(areas) <= 1.4 * min(areas)
    if unit >= 4:
        # Segments of a bf16 message begin at multiples of 16 bytes.
        assert all(area * 2 % 16 == 0 for area in areas)


class _Launches(TorchDispatchMode):
    """Counts operations that are kernels on a GPU: all but views and allocations; matrix products apart."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "mm" in name:
            self.products += 1
        elif not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            self.others += 1
        return func(*args, **(kwargs or {}))


def counted(talk: Talk, stages: list[tuple[int, int]]) -> Talk:
    """The same talk; appends (products, other kernels) before each of its messages and before its end."""
    answer: Any = None
    while True:
        try:
            with _Launches() as launches:
                message = talk.send(answer)
        except StopIteration as end:
            stages.append((launches.products, launches.others))
            return end.value  # type: ignore[no-any-return]
        stages.append((launches.products, launches.others))
        answer = yield message


@pytest.mark.parametrize(("divided", "groups"), [(False, 1), (True, 1), (False, 2), (True, 2)])
def test_launches_do_not_grow_with_the_team_and_are_those_of_the_plan(divided: bool, groups: int) -> None:
    """Once tables are made: three products a step, and beside them at most the plan's small kernels a stage."""
    counts = []
    for size in (4, 8, 16):
        for _ in range(2):
            stages: list[tuple[int, int]] = []
            talks = [
                orthogonalize_band(
                    normal(f"launches {i}", (64, 16)),
                    Seat(i, size, groups),
                    SCHEDULE,
                    divided=divided,
                    dtype=torch.float32,
                )
                for i in range(size)
            ]
            converse([counted(talks[0], stages), *talks[1:]])
        assert len(stages) == band_stages(5, divided=divided, groups=groups) + 1
        assert sum(products for products, _ in stages) == 5 * 3
        # Before the first message and after it, the matrix is normalized.
        assert max(others for _, others in stages[2:]) <= LAUNCHES_PER_STAGE, stages
        counts.append(stages)
    assert counts[0] == counts[1] == counts[2]


def test_a_lost_partial_product_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal("lost", (12, 48))
    expected = orthogonalize(x, SCHEDULE, iteration="standard")
    everything = team_module._sum
    monkeypatch.setattr(team_module, "_sum", lambda blocks: everything(blocks[:-1]))
    assert (by_team(x, 4) - expected).abs().max() > 100 * tolerance(12, 48)


# On ranks.

FP32 = MuonConfig(exchange_dtype="fp32", ns_dtype="fp32", batched=False)
STEPS, LR, DECAY = 3, 0.02, 0.1


def specs(tp: int) -> list[MatrixSpec]:
    """Every layout: split along either dimension, replicated, fused, in blocks; of odd sizes where that can be."""
    joined = [
        MatrixSpec("rows", (9, 21), tp, 0 if tp > 1 else None, whole(9)),
        MatrixSpec("columns", (11, 13), tp, 1 if tp > 1 else None, whole(11)),
        MatrixSpec("wide columns", (5, 17), tp, 1 if tp > 1 else None, whole(5)),
        MatrixSpec("copies", (23, 7), tp, None, whole(23)),
        MatrixSpec("qkv", (24, 10), tp, 0 if tp > 1 else None, qkv_parts(24, 6, 3, 3)),
        MatrixSpec("fc1", (14, 9), tp, 0 if tp > 1 else None, gate_and_up(14)),
        MatrixSpec("heads", (12, 10), tp, 0 if tp > 1 else None, (Part("", ((0, 12),), Blocks(0, 3)),)),
        MatrixSpec("column blocks", (6, 12), tp, 0 if tp > 1 else None, (Part("", ((0, 6),), Blocks(1, 4)),)),
    ]
    pieces = [
        MatrixSpec("pieces", (8, 6), tp, 1 if tp > 1 else None, whole(8), tp_joined=False),
    ]
    return [*joined, *pieces]


def whole_shape(spec: MatrixSpec) -> tuple[int, int]:
    rows, cols = spec.shape
    if spec.partition_dim is None:
        return rows, cols
    return (rows * spec.tp_size, cols) if spec.partition_dim == 0 else (rows, cols * spec.tp_size)


def local_piece(spec: MatrixSpec, value: Tensor, tp_rank: int) -> Tensor:
    """What a TP rank stores of a whole parameter, whose pieces are simply one after the other."""
    return value if spec.partition_dim is None else value.chunk(spec.tp_size, dim=spec.partition_dim)[tp_rank]


def logical_matrices(spec: MatrixSpec) -> list[tuple[list[int], list[int]]]:
    """(rows, columns) of each logical matrix in the whole parameter, written down for these specs."""
    rows, cols = whole_shape(spec)
    local_rows, local_cols = spec.shape
    everything = list(range(cols))
    if spec.name == "pieces" and spec.partition_dim == 1:
        return [(list(range(rows)), list(range(p * local_cols, (p + 1) * local_cols))) for p in range(spec.tp_size)]
    if spec.name == "heads":
        return [(list(range(r, r + 3)), everything) for r in range(0, rows, 3)]
    if spec.name == "column blocks":
        return [(list(range(rows)), list(range(c, c + 4))) for c in range(0, cols, 4)]
    if spec.name == "qkv":
        kinds: dict[str, list[int]] = {"q": [], "k": [], "v": []}
        for row in range(rows):
            kinds["qqqqqqkkkvvv"[row % 12]].append(row)
        return [(kind, everything) for kind in kinds.values()]
    if spec.name == "fc1":
        gate = [row for row in range(rows) if row % local_rows < local_rows // 2]
        return [(gate, everything), ([row for row in range(rows) if row not in gate], everything)]
    return [(list(range(rows)), everything)]


def make_plan(tp: int, dp: int, config: MuonConfig, **options: Any) -> OwnershipPlan:
    """Rank dp_rank * tp + tp_rank; storage is cut where a contiguous buffer would be, in the middle of rows."""
    matrices, tp_ranks = evenly(specs(tp), tp, dp)
    settings = PlanOptions(ns_dtype="fp32", exchange_dtype="fp32", cost=FREE)
    return build_plan(matrices, tp_ranks, ns_steps=config.ns_steps, options=replace(settings, **options))


def force_teams(plan: OwnershipPlan, size: int, groups: int) -> OwnershipPlan:
    """Every part is shared by `size` ranks, or as many as it divides into, others for each part."""
    owners, methods = [], []
    for index, m in enumerate(plan.matrices):
        parts = range(len(m.spec.parts))
        counts = [min(size, max_shares(m.spec, part)) for part in parts]
        owners.append(
            tuple(
                tuple((index + part + i) % plan.world_size for i in range(count))
                for part, count in zip(parts, counts, strict=True)
            )
        )
        methods.append(tuple(TeamMethod(index % 2 == 0, groups if n == size else 1) for n in counts))
    return replace(plan, owners=tuple(owners), methods=tuple(methods))


def gradient(name: str, step: int, shape: tuple[int, int]) -> Tensor:
    return normal(f"{name} {step}", shape)


def reference(plan: OwnershipPlan, config: MuonConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and momenta after `STEPS` steps on whole matrices."""
    shapes = {m.spec.name: whole_shape(m.spec) for m in plan.matrices}
    weights = {name: normal(name, shape) for name, shape in shapes.items()}
    momenta = {name: torch.zeros(shape) for name, shape in shapes.items()}
    oracle = ReferenceVariants({}, {}, config)
    for step in range(STEPS):
        for m in plan.matrices:
            name = m.spec.name
            oracle.momenta = momenta
            direction = oracle.direction(name, gradient(name, step, shapes[name]))
            update = torch.empty_like(direction)
            for number, (rows, cols) in enumerate(logical_matrices(m.spec)):
                block = torch.tensor(rows)[:, None], torch.tensor(cols)[None, :]
                update[block] = oracle.orthogonalized("", direction[block].contiguous())
                if config.variant != "muon":
                    update[block] = oracle.divided(update[block], (name, number))
            weights[name].mul_(1.0 - LR * DECAY).sub_(update * LR)
    return weights, momenta


def train(
    rank: int,
    world_size: int,
    tp: int,
    config: MuonConfig,
    options: dict[str, Any],
    forced: tuple[int, int] | None,
    lose: bool,
) -> dict[str, Any]:
    """Trains this rank's slices; returns the largest error of an update's entry, relative to lr, and counters."""
    if lose:
        everything = team_module._sum
        team_module._sum = lambda blocks: everything(blocks[:-1])  # type: ignore[assignment]
    plan = make_plan(tp, world_size // tp, config, **options)
    if forced is not None:
        plan = force_teams(plan, *forced)
    held = {i: s for i, m in enumerate(plan.matrices) for s in m.slices if s.rank == rank}

    def slice_of(index: int, value: Tensor) -> Tensor:
        s = held[index]
        return local_piece(plan.matrices[index].spec, value, rank % tp).reshape(-1)[s.start : s.stop].clone()

    names = [m.spec.name for m in plan.matrices]
    slices = {i: torch.nn.Parameter(slice_of(i, normal(names[i], whole_shape(plan.matrices[i].spec)))) for i in held}
    spare = [] if slices else [torch.nn.Parameter(torch.empty(0))]
    optimizer = ShardedMuon([*slices.values(), *spare], lr=LR, weight_decay=DECAY, config=config)
    optimizer.param_groups[0]["params"] = list(slices.values())
    optimizer.bind(plan, None, slices, torch.device("cpu"))
    received = [0]
    start_stage = optimizer.exchange._start_stage

    def watched(round_index: int, receive: Tensor, *others: Any) -> Any:
        received.append(receive.nbytes)
        return start_stage(round_index, receive, *others)

    optimizer.exchange._start_stage = watched  # type: ignore[method-assign]
    for step in range(STEPS):
        for i, p in slices.items():
            p.grad = slice_of(i, gradient(names[i], step, whole_shape(plan.matrices[i].spec)))
        optimizer.step()
    weights, momenta = reference(plan, config)
    worst, momentum = 0.0, 0.0
    for i, p in slices.items():
        difference = (p.detach() - slice_of(i, weights[names[i]])).abs().max().nan_to_num(nan=math.inf)
        worst = max(worst, (difference / LR).item())
        state = optimizer.state[p][MOMENTUM]
        momentum = max(momentum, (state - slice_of(i, momenta[names[i]])).abs().max().item())
    stats = optimizer.exchange.stats
    return dict(
        worst=worst,
        momentum=momentum,
        teams=[plan.team(item) is not None for item in plan.all_items()],
        shared=sum(len(ranks) > 1 for parts in plan.owners for ranks in parts),
        team_buffer=(max(received), optimizer.exchange.wire.team_buffer_bytes(rank, lines=config.variant == "normuon")),
        team_bytes=(stats.team_bytes_sent, STEPS * sum(sent[rank] for sent in plan.team_sent_bytes())),
        sent=(stats.bytes_sent, STEPS * 4 * plan.sent_numel()[rank]),
        collectives=(stats.collectives, STEPS * optimizer.exchange.wire.num_collectives),
        team_collectives=(stats.team_collectives, STEPS * sum(map(plan.team_stages, range(len(plan.rounds))))),
    )


# Updates are scaled by 0.2 sqrt(long side), and three steps add up.
UPDATE_TOLERANCE = STEPS * 0.2 * 46**0.5 * tolerance(23, 46)

# Ranks, TP ranks, options, (team size, groups) that every part is given.
GRIDS: dict[str, tuple[int, int, dict[str, Any], tuple[int, int] | None]] = {
    "dp4, teams of two": (4, 1, {}, (2, 1)),
    "tp2 dp2, teams of three": (4, 2, {}, (3, 1)),
    "tp2 dp2, teams of two nodes, in rounds": (4, 2, dict(buffer_bytes=3000), (4, 2)),
    "more ranks than matrices, planned": (12, 1, {}, None),
}


@pytest.mark.parametrize("name", GRIDS)
def test_training_with_teams_equals_the_reference(name: str) -> None:
    world_size, tp, options, forced = GRIDS[name]
    for rank, result in enumerate(run_ranks(train, world_size, tp, FP32, options, forced, False)):
        assert any(result["teams"]), "the case is about teams"
        assert result["worst"] <= UPDATE_TOLERANCE, (rank, result)
        assert result["momentum"] == 0.0
        for counter in ("team_buffer", "team_bytes", "sent", "collectives", "team_collectives"):
            counted, planned = result[counter]
            assert counted == planned, (counter, rank, result)


def test_training_without_teams_is_bitwise_the_reference() -> None:
    for result in run_ranks(train, 4, 2, FP32, dict(max_team_size=1), None, False):
        assert not any(result["teams"]) and result["shared"] == 0
        assert result["worst"] == 0.0 and result["momentum"] == 0.0
        assert result["team_collectives"] == (0, 0)


@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
def test_variants_without_teams_are_bitwise_the_reference(variant: Any) -> None:
    for result in run_ranks(train, 4, 2, replace(FP32, variant=variant), dict(max_team_size=1), None, False):
        assert result["worst"] == 0.0 and result["momentum"] == 0.0


@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
def test_variants_with_teams_equal_the_reference(variant: Any) -> None:
    """Dividing by roots of mean squares enlarges what teams' other order of sums changes, in small elements most."""
    world_size, tp, options, forced = GRIDS["tp2 dp2, teams of two nodes, in rounds"]
    for rank, result in enumerate(
        run_ranks(train, world_size, tp, replace(FP32, variant=variant), options, forced, False)
    ):
        assert any(result["teams"]) and result["momentum"] == 0.0
        assert result["worst"] <= 10 * UPDATE_TOLERANCE, (rank, result)


def test_training_shows_a_lost_partial_product() -> None:
    results = run_ranks(train, 4, 2, FP32, {}, (2, 1), True)
    assert max(result["worst"] for result in results) > 10 * UPDATE_TOLERANCE


def test_the_number_of_steps_must_be_the_plans() -> None:
    plan = make_plan(1, 1, FP32)
    optimizer = ShardedMuon([torch.nn.Parameter(torch.zeros(3))], lr=LR, config=replace(FP32, ns_steps=6))
    with pytest.raises(ValueError, match="made for 5 ns_steps, expected 6"):
        optimizer.bind(plan, None, {}, torch.device("cpu"))


def test_the_dtype_of_a_plan_with_teams_must_be_the_settings() -> None:
    """Else the buffers of teams would have another size than their messages."""
    optimizer = ShardedMuon([torch.nn.Parameter(torch.zeros(3))], lr=LR, config=replace(FP32, ns_dtype="bf16"))
    with pytest.raises(ValueError, match="bind: the plan was made for ns_dtype fp32, expected bf16"):
        optimizer.bind(half_in_teams(), None, {}, torch.device("cpu"))


def test_dist_is_not_needed_by_a_team() -> None:
    assert not dist.is_initialized()


def half_in_teams() -> OwnershipPlan:
    """Four ranks; every second parameter is shared by teams of two, the others have one owner."""
    plan = make_plan(1, 4, FP32, max_team_size=1)
    forced = force_teams(plan, 2, 1)
    return replace(
        plan,
        owners=tuple(forced.owners[i] if i % 2 else owners for i, owners in enumerate(plan.owners)),
        methods=tuple(forced.methods[i] if i % 2 else methods for i, methods in enumerate(plan.methods)),
    )


def issue_order(rank: int, world_size: int) -> dict[str, Any]:
    """What a rank issues in one step: all-to-alls by their group, and stacks that it orthogonalizes alone."""
    plan = half_in_teams()
    without, team_group = make_team_groups(
        [(make_plan(1, 4, FP32, max_team_size=1), dist.group.WORLD), (plan, dist.group.WORLD)]  # type: ignore[list-item]
    )
    assert without is None and team_group is not None
    held = {i: s for i, m in enumerate(plan.matrices) for s in m.slices if s.rank == rank}
    slices = {i: torch.nn.Parameter(torch.ones(s.stop - s.start)) for i, s in held.items()}
    for p in slices.values():
        p.grad = torch.randn_like(p)
    optimizer = ShardedMuon(list(slices.values()), lr=LR, config=FP32)
    optimizer.bind(plan, None, slices, torch.device("cpu"), team_group=team_group)
    issued: list[str] = []
    all_to_all, update = dist.all_to_all_single, step_module.orthogonalized_update

    def recorded(*args: Any, group: Any = None, **kwargs: Any) -> Any:
        issued.append("team" if group is team_group else "transfer")
        return all_to_all(*args, group=group, **kwargs)

    def counted_update(*args: Any) -> None:
        issued.append("stack")
        update(*args)

    dist.all_to_all_single, step_module.orthogonalized_update = recorded, counted_update  # type: ignore[assignment]
    optimizer.step()
    stacks = [len(stacks) for stacks in optimizer._bound().stacks]
    return dict(
        issued=issued,
        stacks=stacks,
        moves=optimizer.exchange.wire.moves,
        group=(team_group.group_desc, dist.get_process_group_ranks(team_group)),
    )


def test_stages_of_teams_have_a_communicator_of_their_own_and_stacks_run_between_them() -> None:
    plan = half_in_teams()
    results = run_ranks(issue_order, 4)
    assert any(sum(result["stacks"]) > 1 for result in results), "some rank has stacks to spread"
    for result in results:
        expected: list[str] = []
        for transfer, moves in enumerate(result["moves"]):
            expected += ["transfer"] * moves
            computed = transfer - 1
            if 0 <= computed < len(plan.rounds):
                stages, stacks = plan.team_stages(computed), result["stacks"][computed]
                if not stages:
                    expected += ["stack"] * stacks
                for stage in range(stages):
                    share = stacks * (stage + 1) // stages - stacks * stage // stages
                    expected += ["team", *["stack"] * share]
        assert result["issued"] == expected
        assert result["group"] == ("MUON_TEAMS", [0, 1, 2, 3])
