"""Rounds run in one order, hide the exchange, and allocate nothing once they have run."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import overlap
from benchmarks.step import peak_bytes
from megatron_muon.config import MuonConfig
from megatron_muon.exchange.exchange import TEAM_BUFFERS, Exchange
from megatron_muon.exchange.pipeline import run_rounds
from megatron_muon.observe.timing.overlap import hidden_share
from megatron_muon.optimizer.sharded_muon import ShardedMuon
from megatron_muon.rule.muon import orthogonalized_updates
from tests.distributed import run_ranks


class Recorder:
    """Rounds that write down what is called."""

    def __init__(self, num_rounds: int) -> None:
        self.num_rounds = num_rounds
        self.calls: list[str] = []

    def prepare(self, round_index: int) -> str:
        self.calls.append(f"gather {round_index}")
        return f"gathered {round_index}"

    def compute(self, round_index: int, gathered: str) -> str:
        assert gathered == f"gathered {round_index}"
        self.calls.append(f"scatter {round_index}")
        return f"scattered {round_index}"

    def finalize(self, round_index: int, scattered: str) -> None:
        assert scattered == f"scattered {round_index}"
        self.calls.append(f"apply {round_index}")


@pytest.mark.parametrize("count", range(8))
def test_order_of_rounds(count: int) -> None:
    recorder = Recorder(count)
    run_rounds(recorder)
    calls = recorder.calls
    assert sorted(calls) == sorted(f"{kind} {i}" for kind in ("gather", "scatter", "apply") for i in range(count))
    at = {call: position for position, call in enumerate(calls)}
    for i in range(count):
        assert at[f"gather {i}"] < at[f"scatter {i}"] < at[f"apply {i}"]
        if i + 1 < count:
            assert at[f"gather {i + 1}"] < at[f"scatter {i}"], "the next gather is under way while a round computes"
            assert at[f"scatter {i + 1}"] < at[f"apply {i}"], "a scatter is under way while the next round computes"
        if i + 3 < count:
            assert at[f"apply {i}"] < at[f"gather {i + 3}"], "three buffers in turn are enough"


def test_order_of_three_rounds() -> None:
    recorder = Recorder(3)
    run_rounds(recorder)
    expected = "gather 0, gather 1, scatter 0, gather 2, scatter 1, apply 0, scatter 2, apply 1, apply 2"
    assert recorder.calls == expected.split(", ")


def test_hidden_share() -> None:
    assert hidden_share([(0.0, 10.0)], []) == 1.0
    assert hidden_share([(0.0, 10.0)], [(8.0, 12.0)]) == pytest.approx(0.8)
    assert hidden_share([(0.0, 10.0)], [(0.0, 10.0)]) == 0.0
    # Two at a time count once, and so do waits that touch; a wait outside costs the exchange nothing.
    assert hidden_share([(5.0, 6.0), (0.0, 4.0), (2.0, 4.0)], [(3.0, 4.0), (3.5, 4.5), (9.0, 10.0)]) == pytest.approx(
        0.8
    )
    with pytest.raises(ValueError, match="no collective"):
        hidden_share([], [(0.0, 1.0)])


class Allocations(TorchDispatchMode):
    """Counts elements of tensors that are made, not of views."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.startswith(("aten::empty", "aten::new_", "aten::zeros", "aten::clone", "aten::cat")):
            self.numel += out.numel()
        return out


ROUNDS_BYTES = 30_000


def buffers(rank: int, world_size: int) -> dict[str, Any]:
    """Three steps in several rounds; what is allocated in the exchange, and where and how large its buffers are."""
    plan = overlap.make_plan(world_size, 12, 48, ROUNDS_BYTES)
    held = {i: s for i, m in enumerate(plan.matrices) for s in m.slices if s.rank == rank}
    slices = {i: torch.nn.Parameter(torch.randn(s.stop - s.start)) for i, s in held.items()}
    optimizer = ShardedMuon(list(slices.values()), lr=0.01, config=MuonConfig(ns_dtype="fp32", exchange_dtype="fp32"))
    optimizer.bind(plan, None, slices, torch.device("cpu"))
    for p in slices.values():
        p.grad = torch.randn_like(p)
    made: list[int] = []

    def counted(method: Any) -> Any:
        def call(*args: Any) -> Any:
            with Allocations() as allocations:
                result = method(*args)
            made[-1] += allocations.numel
            return result

        return call

    for name in ("start_gather", "finish_gather", "run_teams", "start_scatter", "finish_scatter"):
        setattr(optimizer.exchange, name, counted(getattr(optimizer.exchange, name)))
    pointers = []
    for _ in range(3):
        made.append(0)
        optimizer.step()
        pointers.append({name: b.data_ptr() for name, b in optimizer.exchange._scratch.buffers.items() if b.numel()})
    halves = [plan.round_buffer_numel(r)[rank] for r in range(len(plan.rounds))]
    owned = [sum(math.prod(plan.shape(item)) for item in plan.items(r, rank)) for r in range(len(plan.rounds))]
    exchange: Exchange = optimizer.exchange
    views = [[torch.randn(plan.shape(item)) for item in plan.items(r, rank)] for r in range(len(plan.rounds))]
    return dict(
        step_peak_bytes=peak_bytes(optimizer.step),
        batch_peak_bytes=max(peak_bytes(partial(orthogonalized_updates, v, optimizer.muon)) for v in views),
        rounds=len(plan.rounds),
        made=made,
        pointers=pointers,
        round_bytes=4 * max(map(sum, halves)),
        # What a round takes with a buffer for each of its four ends: gather and scatter, sent and received.
        gather_and_scatter_bytes=4 * max(2 * sum(half) for half in halves),
        collected_bytes=4 * max(owned),
        buffer_bytes=exchange.buffer_bytes,
        names=sorted(n for n in exchange._scratch.buffers if n not in TEAM_BUFFERS),
    )


def test_buffers_are_kept_and_bounded() -> None:
    for result in run_ranks(buffers, 2):
        assert result["rounds"] >= 4, "the case is about several rounds"
        first, *later = result["made"]
        assert first > 0 and later == [0, 0], "nothing is allocated after the first step"
        assert result["pointers"][0] == result["pointers"][1] == result["pointers"][2]
        assert result["names"] == ["collected", "round 0", "round 1", "round 2"]
        assert result["round_bytes"] <= ROUNDS_BYTES
        assert result["buffer_bytes"] == 3 * result["round_bytes"] + result["collected_bytes"]
        assert result["buffer_bytes"] <= 2 * result["gather_and_scatter_bytes"] + result["collected_bytes"]
        # Besides the buffers, which stay: the largest batch, and small tensors of the exchange.
        assert 0 < result["batch_peak_bytes"] <= result["step_peak_bytes"] <= result["batch_peak_bytes"] + 1024


def test_overlap_is_measured() -> None:
    """The measurement itself; how much is hidden depends on the machine and is the benchmark's."""
    for rank, result in enumerate(run_ranks(overlap.measure, 2, 8, 64, ROUNDS_BYTES, 2)):
        assert result["rank"] == rank and result["rounds"] >= 3
        assert 0.0 <= result["hidden"] <= 1.0
        assert result["in_flight"] > 0.0 and result["waiting"] <= result["step"]
