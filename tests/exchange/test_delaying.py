"""Rounds, teams, variants and QK-Clip on a process group on which collectives complete at their `wait`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon.exchange.exchange import Exchange
from megatron_muon.exchange.pipeline import pipeline, run_together
from tests.distributed import run_ranks
from tests.exchange import test_team as teams
from tests.exchange.delaying import delayed_collectives, same_order
from tests.exchange.test_exchange import CPU, Checked, exchange_cases, planned_collectives, random_plan
from tests.megatron import test_attention_clip as clipping
from tests.optimizer import test_exactness as exactness

ROUNDS = [((0, 1, 0, 1), 3, 9, 3, torch.bfloat16), ((0, 0, 0, 0), 4, 12, None, torch.float32)]


def gathered(issued: Any) -> bool:
    """Whether all ranks issued in one order. Collective over the world."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, issued)
    return len(issued) > 0 and same_order(everyone)


def without_megatron(rank: int, world_size: int) -> dict[str, Any]:
    """Rounds with every element checked, teams, and variants without teams."""
    tp, options, forced = teams.GRIDS["tp2 dp2, teams of two nodes, in rounds"][1:]
    with delayed_collectives() as delays:
        rounds = exchange_cases(rank, world_size, ROUNDS)
        return dict(
            rounds=rounds,
            teams=teams.train(rank, world_size, tp, teams.FP32, options, forced, False),
            variants=[
                teams.train(
                    rank,
                    world_size,
                    2,
                    dataclasses.replace(teams.FP32, variant=variant),
                    dict(max_team_size=1),
                    None,
                    False,
                )
                for variant in ("normuon", "adamuon")
            ],
            in_order=gathered(delays.issued),
            # A team's stage in which a rank receives nothing need not be waited for.
            unfinished=sum(bool(sum(work.receive_splits)) for work in delays.unfinished),
        )


def test_rounds_teams_and_variants() -> None:
    for result in run_ranks(without_megatron, 4):
        for (tp_ranks, count, seed, busy, _), got in zip(ROUNDS, result["rounds"], strict=True):
            assert got["collectives"] == 2 * planned_collectives(random_plan(tp_ranks, count, seed, busy)) > 4
        assert any(result["teams"]["teams"]) and result["teams"]["worst"] <= teams.UPDATE_TOLERANCE
        assert all(variant["worst"] == variant["momentum"] == 0.0 for variant in result["variants"])
        assert result["in_order"] and result["unfinished"] == 0


def whole_optimizer(rank: int, world_size: int) -> tuple[dict[str, Any], bool]:
    """Dense and expert matrices and AdamW, all settings of variants at once, over four ranks."""
    model, layout = exactness.LAYOUTS["ep2 edp2"]
    muon = dataclasses.replace(exactness.EXACT, **exactness.VARIANTS["bf16 momentum"], exchange_buffer_mb=1)
    with delayed_collectives() as delays:
        result = exactness.check_layout(rank, world_size, model, layout, muon, False)
        return result, gathered(delays.issued)


def test_the_chain_of_dense_and_expert_matrices_and_adamw() -> None:
    for result, in_order in run_ranks(whole_optimizer, 4):
        assert result["worst"]["muon"] == result["worst"]["momentum"] == 0.0 and in_order
        # Both kinds exchange: the groups of the stage, and of each half of the experts.
        assert sorted(len(exchange["group"]) for exchange in result["exchanges"]) == [2, 4]


def clipped(rank: int, world_size: int) -> Any:
    model, layout = clipping.RUNS["dense, tp2 dp2"]
    with delayed_collectives():
        return clipping.session(rank, world_size, model, layout)


def test_qk_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = run_ranks(clipped, 4)
    monkeypatch.setattr(clipping, "outcomes_of", lambda name: outcomes)
    clipping.test_a_step_with_clipping_is_one_without_and_then_clipping("dense, tp2 dp2")


# Each mistake is seen.


def skipped_wait(exchange: Exchange, rank: int) -> None:
    class Forgetful(dict[int, Any]):
        def pop(self, key: int, default: Any = None) -> Any:
            return None if key == 2 else super().pop(key, default)

    exchange._in_flight = Forgetful()
    run_together([pipeline(Checked(exchange))])


def one_round_early(exchange: Exchange, rank: int) -> None:
    """Packs for the next transfer before it waits for the one that is under way from the same buffer."""
    rounds = Checked(exchange)

    def hasty() -> Iterator[None]:
        rounds.prepare(0)
        rounds.start(0)
        for i in range(rounds.num_rounds + 1):
            rounds.prepare(i + 1)
            rounds.finish(i)
            rounds.apply(i - 2)
            rounds.start(i + 1)
            rounds.compute(i)
            yield

    run_together([hasty()])


def other_order(exchange: Exchange, rank: int) -> None:
    if rank == 1:
        first, second = exchange._transfers[:2]
        exchange._transfers[:2] = [second, first]
    run_together([pipeline(Checked(exchange))])


MISTAKES = {
    skipped_wait: "AssertionError",
    one_round_early: "the send buffer was written to before the wait",
    other_order: "the ranks issue their collectives in different orders",
}


def mistaken(rank: int, world_size: int) -> dict[str, str]:
    out = {}
    for mistake in MISTAKES:
        exchange = Exchange(random_plan((0, 1), 4, 13), None, torch.float32, CPU)
        with delayed_collectives(timeout_s=5.0):
            try:
                mistake(exchange, rank)
            except AssertionError as error:
                out[mistake.__name__] = f"AssertionError: {error}"
            except dist.DistStoreError as error:
                out[mistake.__name__] = f"{error}"
            dist.barrier()
    return out


def test_mistakes_are_seen() -> None:
    results = run_ranks(mistaken, 2)
    for mistake, message in MISTAKES.items():
        assert any(message in result.get(mistake.__name__, "") for result in results), (mistake, results)


def groups_in_other_orders(rank: int, world_size: int) -> tuple[bool, bool]:
    """Two pipelines on two groups, begun in one order on all ranks, or in another one on rank 1."""
    seen = []
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    ranks = [dist.new_group([0, 1, 2]), groups[0]]
    for turned in (False, True):
        with delayed_collectives() as delays:
            if rank < 2:
                plans = random_plan((0, 1, 0), 2, 3), random_plan((0, 1), 2, 13)
                exchanges = [Exchange(p, g, torch.float32, CPU) for p, g in zip(plans, ranks, strict=True)]
            else:
                exchanges = [Exchange(random_plan((0, 1, 0), 2, 3), ranks[0], torch.float32, CPU)]
            pipelines = [pipeline(Checked(exchange)) for exchange in exchanges]
            run_together(pipelines[::-1] if turned and rank == 1 else pipelines)
        seen.append(gathered(delays.issued))
    return seen[0], seen[1]


def test_an_order_that_differs_between_groups_is_seen() -> None:
    assert run_ranks(groups_in_other_orders, 3) == [(True, False)] * 3
