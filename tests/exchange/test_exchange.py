"""The exchange moves exactly the right elements: every element carries a number, on real Gloo ranks."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.exchange.exchange import Exchange, SliceBatch
from megatron_muon.exchange.pipeline import pipeline, run_together
from megatron_muon.matrices.spec import Blocks, MatrixSpec, Part, whole
from megatron_muon.plan.build import OwnershipPlan, PlanOptions, ShardedMatrix, Slice, build_plan
from megatron_muon.plan.wire import Wire
from tests.distributed import RankError, run_ranks
from tests.plans import gate_and_up, qkv_parts

CPU = torch.device("cpu")
# TP ranks store different numbers also where they store copies, so that it shows whose copy was taken.
COPY_OFFSET = 100_000


def number(spec: MatrixSpec, matrix: int, tp_rank: int) -> Tensor:
    """What TP rank `tp_rank` stores of parameter `matrix`: integers that occur nowhere else, exact in float32."""
    rows, cols = spec.shape
    if spec.partition_dim == 0:
        local = torch.arange(spec.numel).view(-1, cols)[tp_rank * rows : (tp_rank + 1) * rows]
    elif spec.partition_dim == 1:
        local = torch.arange(spec.numel).view(rows, -1)[:, tp_rank * cols : (tp_rank + 1) * cols]
    else:
        local = torch.arange(spec.numel).view(rows, cols) + tp_rank * COPY_OFFSET
    return (local + 1000 * (matrix + 1)).float()


def updated(local: Tensor) -> Tensor:
    """What an owner makes of an element; a copy's offset is dropped, since all copies get the same update."""
    return (local % COPY_OFFSET) * 2 + 1


def cut(spec: MatrixSpec, tp_ranks: Sequence[int], rng: random.Random) -> ShardedMatrix:
    """Cuts each TP rank's tensor at random among the group's ranks of that TP rank; some get nothing."""
    slices = []
    for tp_rank in range(spec.tp_size):
        members = [rank for rank, t in enumerate(tp_ranks) if t == tp_rank]
        rng.shuffle(members)
        edges = sorted([0, spec.local_numel, *(rng.randint(0, spec.local_numel) for _ in members[1:])])
        slices += [Slice(r, a, b) for r, a, b in zip(members, edges, edges[1:]) if a < b]
    return ShardedMatrix(spec, tuple(sorted(slices, key=lambda s: s.rank)))


def specs(tp_size: int) -> list[MatrixSpec]:
    """Every kind of layout and part; each TP size stores at least one parameter of each."""
    return [
        MatrixSpec("column", (6, 5), tp_size, 0, whole(6)),
        MatrixSpec("row", (7, 3), tp_size, 1, whole(7)),
        MatrixSpec("replicated", (5, 7), tp_size, None, whole(5)),
        MatrixSpec("qkv", (16, 3), tp_size, 0, qkv_parts(16, 4, 2, 2)),
        MatrixSpec("fc1", (10, 2), tp_size, 0, gate_and_up(10)),
        MatrixSpec("heads", (6, 4), tp_size, 1, (Part("", ((0, 6),), Blocks(0, 2)),)),
        MatrixSpec("blockwise", (4, 4), tp_size, 0, whole(4), tp_joined=False),
        MatrixSpec("tiny", (1, 1), tp_size, None, whole(1)),
    ]


def random_plan(tp_ranks: Sequence[int], rounds: int, seed: int, busy: int | None = None) -> OwnershipPlan:
    """A plan for random cuts, with one owner for each part. A rank that is `busy` with other work owns nothing."""
    rng = random.Random(seed)
    matrices = [cut(spec, tp_ranks, rng) for spec in specs(max(tp_ranks) + 1)]
    load = [1e18 if rank == busy else 0.0 for rank in range(len(tp_ranks))]
    plan = build_plan(matrices, tp_ranks, ns_steps=5, initial_loads=load, options=PlanOptions(max_team_size=1))
    members = list(range(len(matrices)))
    rng.shuffle(members)
    return dataclasses.replace(plan, rounds=tuple(tuple(members[r::rounds]) for r in range(rounds)))


def owner_of(plan: OwnershipPlan, matrix: int, part: int) -> int:
    (owner,) = plan.owners[matrix][part]
    return owner


def expected_part(plan: OwnershipPlan, matrix: int, part: int) -> Tensor:
    """What the owner of a part has to collect: the part's rows of every TP piece, or of its own copy."""
    spec = plan.matrices[matrix].spec
    rows = [row for start, stop in spec.parts[part].rows for row in range(start, stop)]
    copy = plan.tp_ranks[owner_of(plan, matrix, part)]
    pieces = range(spec.tp_size) if spec.partition_dim is not None else [copy]
    return torch.cat([number(spec, matrix, piece)[rows] for piece in pieces], dim=spec.partition_dim or 0)


def held(plan: OwnershipPlan, rank: int, members: Sequence[int]) -> dict[int, tuple[int, int]]:
    """The flat ranges that a rank stores of some parameters."""
    found = {}
    for matrix in members:
        for s in plan.matrices[matrix].slices:
            if s.rank == rank:
                found[matrix] = (s.start, s.stop)
    return found


def slices_of(plan: OwnershipPlan, rank: int, members: Sequence[int]) -> dict[int, Tensor]:
    tp_rank = plan.tp_ranks[rank]
    return {
        matrix: number(plan.matrices[matrix].spec, matrix, tp_rank).flatten()[start:stop].clone()
        for matrix, (start, stop) in held(plan, rank, members).items()
    }


class Checked:
    """The rounds of a step that checks every value on its way. Whatever may be reused is filled with NaN."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.plan = exchange.plan
        self.owned: list[tuple[int, int]] = []
        self.elements = 0
        self.start, self.finish = exchange.start, exchange.finish

    @property
    def num_rounds(self) -> int:
        return self.exchange.num_rounds

    def run(self) -> None:
        run_together([pipeline(self)])

    def wire(self, x: Tensor) -> Tensor:
        return x.to(self.exchange.dtype).float()

    def pack(self, batch: SliceBatch) -> None:
        for index, flat in slices_of(self.plan, self.exchange.rank, list(batch.flats)).items():
            batch.flats[index].copy_(flat)
        batch.pack.run()
        for flat in batch.flats.values():
            flat.fill_(torch.nan)

    def unpack(self, batch: SliceBatch) -> None:
        for flat in batch.flats.values():
            flat.fill_(torch.nan)
        batch.unpack.run()
        for index, flat in slices_of(self.plan, self.exchange.rank, list(batch.flats)).items():
            assert torch.equal(batch.flats[index], self.wire(updated(flat)))
            self.elements += flat.numel()

    def prepare(self, round_index: int) -> None:
        for batch in self.exchange.travelling(round_index):
            self.pack(batch)

    def compute(self, round_index: int) -> None:
        if round_index == self.num_rounds:
            return
        for batch in self.exchange.resident(round_index):
            self.pack(batch)
        parts = self.exchange.parts(round_index)
        expected = {
            (m, p)
            for m in self.plan.rounds[round_index]
            for p in range(len(self.plan.matrices[m].spec.parts))
            if owner_of(self.plan, m, p) == self.exchange.rank
        }
        assert {(item.matrix, item.part) for item in parts} == expected
        self.owned += expected
        for item, collected in parts.items():
            assert collected.dtype == self.exchange.dtype
            assert torch.equal(collected.float(), self.wire(expected_part(self.plan, item.matrix, item.part)))
        # Stacks are views of the parts: together they are all of them, each logical matrix once.
        before = {item: part.to(torch.float32, copy=True) for item, part in parts.items()}
        for stack in self.exchange.stacks(round_index):
            stack.copy_(updated(stack.float()))
        assert all(torch.equal(part.float(), self.wire(updated(before[i]))) for i, part in parts.items())
        for item, collected in parts.items():
            collected.copy_(updated(expected_part(self.plan, item.matrix, item.part)))
        for batch in self.exchange.resident(round_index):
            self.unpack(batch)

    def apply(self, round_index: int) -> None:
        for batch in self.exchange.travelling(round_index):
            self.unpack(batch)


def planned_collectives(plan: OwnershipPlan) -> int:
    """Transfers of one step that move an element between ranks, found element by element."""
    moving = set()
    for k, members in enumerate(plan.rounds):
        for m in members:
            for s in plan.matrices[m].slices:
                for p, part in enumerate(plan.matrices[m].spec.parts):
                    cols, owner = plan.matrices[m].spec.shape[1], owner_of(plan, m, p)
                    rows = {flat // cols for flat in range(s.start, s.stop)}
                    if owner == s.rank or not any(a <= row < b for row in rows for a, b in part.rows):
                        continue
                    is_copy = plan.matrices[m].spec.replicated and plan.tp_ranks[s.rank] != plan.tp_ranks[owner]
                    moving |= {k + 2} if is_copy else {k, k + 2}
    return len(moving)


def planned_numel(plan: OwnershipPlan) -> list[int]:
    """Elements that each rank sends to others in a step, counted one by one."""
    sent = [0] * plan.world_size
    for m, matrix in enumerate(plan.matrices):
        for s in matrix.slices:
            for flat in range(s.start, s.stop):
                row = flat // matrix.spec.shape[1]
                for p, part in enumerate(matrix.spec.parts):
                    owner = owner_of(plan, m, p)
                    if owner == s.rank or not any(start <= row < stop for start, stop in part.rows):
                        continue
                    sent[owner] += 1
                    is_copy = matrix.spec.partition_dim is None and plan.tp_ranks[s.rank] != plan.tp_ranks[owner]
                    sent[s.rank] += not is_copy
    return sent


SCRATCH_NUMEL = 20


def plan_buffer_bytes(plan: OwnershipPlan, rank: int, dtype: torch.dtype) -> int:
    return Wire(plan).buffer_bytes(rank, dtype.itemsize, SCRATCH_NUMEL)


Case = tuple[tuple[int, ...], int, int, int | None, torch.dtype]


def exchange_cases(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for tp_ranks, rounds, seed, busy, dtype in cases:
        plan = random_plan(tp_ranks, rounds, seed, busy)
        exchange = Exchange(plan, None, dtype, CPU, scratch_numel=SCRATCH_NUMEL)
        checked = Checked(exchange)
        for _ in range(2):
            checked.run()
        stored = sum(b - a for a, b in held(plan, rank, range(len(plan.matrices))).values())
        assert checked.elements == 2 * stored
        results.append(
            dict(
                rank=rank,
                owned=checked.owned,
                bytes_sent=exchange.stats.bytes_sent,
                collectives=exchange.stats.collectives,
                planned=plan.sent_numel()[rank],
                buffer_bytes=exchange.buffer_bytes,
            )
        )
    return results


FP32, BF16 = torch.float32, torch.bfloat16
CASES: dict[int, list[Case]] = {
    2: [((0, 0), 1, 1, None, FP32), ((0, 1), 1, 2, None, FP32), ((0, 1), 3, 3, None, BF16), ((0, 0), 2, 4, 0, BF16)],
    3: [((0, 0, 0), 1, 5, None, FP32), ((0, 1, 2), 2, 6, 2, FP32), ((0, 0, 0), 4, 7, 1, BF16)],
    4: [
        ((0, 1, 0, 1), 1, 8, None, FP32),
        ((0, 1, 0, 1), 3, 9, 3, BF16),
        ((1, 1, 0, 0), 8, 10, 0, FP32),
        ((0, 1, 2, 3), 2, 11, None, FP32),
        ((0, 0, 0, 0), 1, 12, None, FP32),
    ],
}


@pytest.mark.parametrize("world_size", CASES)
def test_gather_and_scatter_move_every_element(world_size: int) -> None:
    by_rank = run_ranks(exchange_cases, world_size, CASES[world_size])
    for index, (tp_ranks, rounds, seed, busy, dtype) in enumerate(CASES[world_size]):
        results = [ranks[index] for ranks in by_rank]
        plan = random_plan(tp_ranks, rounds, seed, busy)
        parts = [(m, p) for m, matrix in enumerate(plan.matrices) for p in range(len(matrix.spec.parts))]
        # Two steps; each part has one owner in each.
        assert Counter(part for r in results for part in r["owned"]) == Counter(parts * 2)
        assert [bool(r["owned"]) for r in results].count(False) == (busy is not None)
        assert [r["planned"] for r in results] == planned_numel(plan)
        for result in results:
            assert result["bytes_sent"] == 2 * result["planned"] * dtype.itemsize
            assert result["collectives"] == 2 * planned_collectives(plan)
            assert result["buffer_bytes"] == plan_buffer_bytes(plan, result["rank"], dtype)


def test_cases_hold_what_they_are_for() -> None:
    """Cuts in the middle of rows, ranks that store nothing of a parameter, and several owners."""
    plans = [random_plan(*case[:4]) for cases in CASES.values() for case in cases]
    assert all(
        any(s.start % m.spec.shape[1] for m in plan.matrices for s in m.slices)
        for plan in plans
        if len(set(plan.tp_ranks)) < plan.world_size
    )
    assert any(len({s.rank for s in m.slices}) < plan.world_size for plan in plans for m in plan.matrices)
    assert all(len({o for owners in plan.owners for (o,) in owners}) > 1 for plan in plans if plan.world_size > 2)


def one_tiny_matrix(rank: int, world_size: int) -> dict[str, Any]:
    """Rank 2 stores all there is and owns it; the others have nothing to send."""
    plan = build_plan(
        [ShardedMatrix(MatrixSpec("w", (1, 2), 1, None, whole(1)), (Slice(2, 0, 2),))], [0] * 4, ns_steps=5
    )
    checked = Checked(Exchange(plan, None, torch.float32, CPU))
    checked.run()
    stats = checked.exchange.stats
    return dict(owned=checked.owned, elements=checked.elements, sent=stats.bytes_sent, collectives=stats.collectives)


def test_ranks_with_nothing_take_part() -> None:
    # Nothing moves, so that nothing is issued.
    nothing = dict(owned=[], elements=0, sent=0, collectives=0)
    assert run_ranks(one_tiny_matrix, 4) == [nothing, nothing, dict(nothing, owned=[(0, 0)], elements=2), nothing]


def in_a_subgroup(rank: int, world_size: int) -> tuple[int, int] | None:
    group = dist.new_group([0, 2])
    if rank == 1:
        return None
    assert isinstance(group, dist.ProcessGroup)
    checked = Checked(Exchange(random_plan((0, 1), 2, 13), group, torch.float32, CPU))
    checked.run()
    return checked.exchange.rank, dist.get_rank(group)


def test_ranks_are_those_of_the_group() -> None:
    assert run_ranks(in_a_subgroup, 3) == [(0, 0), None, (1, 1)]


def wrong_group(rank: int, world_size: int) -> None:
    Exchange(random_plan((0, 0, 0), 1, 1), None, torch.float32, CPU)


def test_group_of_another_size() -> None:
    with pytest.raises(RankError) as error:
        run_ranks(wrong_group, 2)
    expected = ("RuntimeError", "the group has 2 ranks, but the plan was made for 3")
    assert {rank: e[:2] for rank, e in error.value.errors.items()} == {0: expected, 1: expected}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rank_without_torch_distributed(dtype: torch.dtype) -> None:
    assert not dist.is_initialized()
    checked = Checked(Exchange(random_plan((0,), 2, 14), None, dtype, CPU))
    checked.run()
    assert checked.elements == sum(spec.local_numel for spec in specs(1))
    assert (checked.exchange.stats.collectives, checked.exchange.stats.bytes_sent) == (0, 0)


def test_one_rank_cannot_follow_a_plan_for_two() -> None:
    with pytest.raises(RuntimeError, match="the group has 1 ranks, but the plan was made for 2"):
        Exchange(random_plan((0, 1), 1, 1), None, torch.float32, CPU)
