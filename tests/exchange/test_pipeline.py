"""Rounds run in one order, hide the exchange, and allocate nothing once they have run."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import overlap
from benchmarks.devices import peak_bytes
from megatron_muon.config import MuonConfig
from megatron_muon.exchange.pipeline import pipeline, run_together
from megatron_muon.observe.timing.recording import hidden_share
from megatron_muon.optimizer.sharded_muon import ShardedMuon
from megatron_muon.rule.muon import orthogonalized_updates
from tests.distributed import run_ranks


class Recorder:
    """Rounds that write down what is called, where there is such a round or transfer."""

    def __init__(self, num_rounds: int) -> None:
        self.num_rounds = num_rounds
        self.calls: list[str] = []

    def prepare(self, round_index: int) -> None:
        self._call("prepare", round_index, self.num_rounds)

    def start(self, transfer: int) -> None:
        self._call("start", transfer, self.num_rounds + 2)

    def finish(self, transfer: int) -> None:
        self._call("finish", transfer, self.num_rounds + 2)

    def compute(self, round_index: int) -> None:
        self._call("compute", round_index, self.num_rounds)

    def apply(self, round_index: int) -> None:
        self._call("apply", round_index, self.num_rounds)

    def _call(self, name: str, number: int, stop: int) -> None:
        if 0 <= number < stop:
            self.calls.append(f"{name} {number}")


@pytest.mark.parametrize("count", range(1, 8))
def test_order_of_rounds(count: int) -> None:
    recorder = Recorder(count)
    run_together([pipeline(recorder)])
    at = {call: position for position, call in enumerate(recorder.calls)}
    assert len(at) == len(recorder.calls) == 3 * count + 2 * (count + 2)
    for i in range(count):
        assert at[f"prepare {i}"] < at[f"start {i}"] < at[f"finish {i}"] < at[f"compute {i}"], "gathered"
        assert at[f"compute {i}"] < at[f"finish {i + 1}"] < at[f"start {i + 2}"] < at[f"apply {i}"], "scattered"
        assert at[f"start {i + 1}"] == at[f"compute {i}"] - 1, "nothing is issued between a transfer and what hides it"
    for i in range(count + 1):
        assert at[f"finish {i}"] < at[f"start {i + 1}"], "one transfer at a time: its buffers are used again"


def test_order_of_three_rounds() -> None:
    recorder = Recorder(3)
    run_together([pipeline(recorder)])
    expected = """prepare 0, start 0, finish 0, prepare 1, start 1, compute 0,
        finish 1, prepare 2, start 2, compute 1, finish 2, apply 0, start 3, compute 2,
        finish 3, apply 1, start 4, finish 4, apply 2"""
    assert recorder.calls == [call.strip() for call in expected.split(",")]


def test_pipelines_take_turns() -> None:
    """Each computes while the other's transfers are under way too; both run to their ends."""
    recorders = Recorder(2), Recorder(1)
    order: list[tuple[int, str]] = []
    for number, recorder in enumerate(recorders):
        recorder.calls = type("Calls", (list,), {"append": lambda _, call, n=number: order.append((n, call))})()
    run_together([pipeline(recorder) for recorder in recorders])
    assert [entry for entry in order if entry[1].startswith(("start", "compute"))] == [
        (0, "start 0"),
        (1, "start 0"),
        (0, "start 1"),
        (1, "start 1"),
        (0, "compute 0"),
        (0, "start 2"),
        (1, "compute 0"),
        (1, "start 2"),
        (0, "compute 1"),
        (0, "start 3"),
    ]
    assert sorted(order) == sorted((n, call) for n, count in ((0, 2), (1, 1)) for call in _calls(count))


def _calls(count: int) -> list[str]:
    recorder = Recorder(count)
    run_together([pipeline(recorder)])
    return recorder.calls


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


ROUNDS_BYTES = 100_000


def buffers(rank: int, world_size: int) -> dict[str, Any]:
    """Three steps in several rounds; what is allocated in the exchange, and where and how large its buffers are."""
    plan = overlap.make_plan(world_size, 12, 48, ROUNDS_BYTES)
    held = {i: s for i, m in enumerate(plan.matrices) for s in m.slices if s.rank == rank}
    slices = {i: torch.nn.Parameter(torch.randn(s.stop - s.start)) for i, s in held.items()}
    muon = MuonConfig(ns_dtype="fp32", exchange_dtype="fp32", exchange_buffer_mb=1)
    optimizer = ShardedMuon(list(slices.values()), lr=0.01, config=muon)
    optimizer.bind(plan, None, slices, torch.device("cpu"))
    for p in slices.values():
        p.grad = torch.randn_like(p)
    optimizer.init_state()
    exchange = optimizer.exchange
    made = []
    for index, p in slices.items():
        # Without a gradient, zeros are made once.
        p.grad = p.grad if index else None
    optimizer.step()
    for _ in range(2):
        with Allocations() as allocations:
            optimizer.step()
        made.append(allocations.numel)
    stacks = [[stack.clone() for stack in exchange.stacks(r)] for r in range(len(plan.rounds))]
    with Allocations() as allocations:
        for of_round in stacks:
            orthogonalized_updates(of_round, optimizer.muon)
    return dict(
        step_peak_bytes=peak_bytes(optimizer.step, torch.device("cpu")),
        batch_peak_bytes=max(
            peak_bytes(partial(orthogonalized_updates, s, optimizer.muon), torch.device("cpu")) for s in stacks
        ),
        rounds=len(plan.rounds),
        made=made,
        made_by_newton_schulz=allocations.numel,
        buffer_bytes=exchange.buffer_bytes,
        planned_bytes=exchange.wire.buffer_bytes(rank, 4, exchange.scratch_numel),
        scratch_bytes=4 * max(p.numel() for p in slices.values()),
    )


def test_buffers_are_kept_and_bounded() -> None:
    for result in run_ranks(buffers, 2):
        assert result["rounds"] >= 4, "the case is about several rounds"
        assert result["made"] == 2 * [result["made_by_newton_schulz"]], "a step allocates what Newton-Schulz needs"
        assert result["buffer_bytes"] == result["planned_bytes"]
        # Two rounds in transit and one collected, each a fifth; the scratch of 1 MiB / 8 is larger than a round.
        assert result["buffer_bytes"] <= 3 * ROUNDS_BYTES / 5 + 2**20 / 8
        # Besides the buffers, which stay: the largest batch, and small tensors.
        assert 0 < result["batch_peak_bytes"] <= result["step_peak_bytes"] <= result["batch_peak_bytes"] + 1024


def test_overlap_is_measured() -> None:
    """The measurement itself; how much is hidden depends on the machine and is the benchmark's."""
    for rank, result in enumerate(run_ranks(overlap.measure, 2, 8, 64, ROUNDS_BYTES, 2, torch.device("cpu"))):
        assert result["rank"] == rank and result["rounds"] >= 3
        assert 0.0 <= result["hidden"] <= 1.0
        assert result["in_flight"] > 0.0 and result["waiting"] <= result["step"]
