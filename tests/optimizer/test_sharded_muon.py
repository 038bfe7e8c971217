"""ShardedMuon without Megatron: equal to the reference however matrices are cut, and a well-behaved torch optimizer.

Longer than a page or two, since all of it is about one class.
"""

from __future__ import annotations

import dataclasses
import io
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_muon.config import MuonConfig
from megatron_muon.matrices.spec import MatrixSpec, Part, whole
from megatron_muon.optimizer.sharded_muon import ShardedMuon
from megatron_muon.plan.build import OwnershipPlan, PlanOptions, ShardedMatrix, Slice, build_plan
from megatron_muon.rule.reference import ReferenceMuon
from tests.distributed import run_ranks
from tests.exchange.test_exchange import planned_collectives
from tests.plans import qkv_parts

CPU = torch.device("cpu")
EXACT = MuonConfig(ns_dtype="fp32", exchange_dtype="fp32", batched=False)

SHAPES: dict[str, tuple[int, int]] = {"a": (8, 6), "b": (5, 9), "qkv": (16, 5), "c": (1, 7)}
PARTS: dict[str, tuple[Part, ...]] = {"qkv": qkv_parts(16, 4, 2, 2)}
LOGICAL_ROWS = {"qkv": [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]}
# Parameter groups, and the learning rate and weight decay of each at each step.
GROUPS = (("a", "qkv"), ("b", "c"))
SCHEDULE = (((0.02, 0.1), (0.01, 0.0)), ((0.05, 0.2), (0.01, 0.0)), ((0.03, 0.1), (0.0, 0.5)))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start(name: str) -> Tensor:
    return normal(ord(name[0]), *SHAPES[name])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@dataclass(frozen=True)
class Case:
    """One way to spread the parameters over ranks, and the settings to train them with; with a team, if asked for."""

    world_size: int
    seed: int
    config: MuonConfig = EXACT
    rounds: int = 1
    teams: bool = False

    def plan(self) -> OwnershipPlan:
        """Each parameter cut at random positions between ranks in random order."""
        rng = random.Random(self.seed)
        matrices = []
        for name, shape in SHAPES.items():
            numel = math.prod(shape)
            ranks = rng.sample(range(self.world_size), self.world_size)
            edges = sorted([0, numel, *(rng.randint(0, numel) for _ in ranks[1:])])
            slices = tuple(Slice(r, a, b) for r, a, b in zip(ranks, edges, edges[1:]) if a < b)
            matrices.append(ShardedMatrix(MatrixSpec(name, shape, 1, None, PARTS.get(name, whole(shape[0]))), slices))
        options = PlanOptions(ns_dtype=self.config.ns_dtype)
        plan = build_plan(matrices, [0] * self.world_size, ns_steps=self.config.ns_steps, options=options)
        if self.teams:
            # The first matrix, of 8 rows, by as many ranks as there are rows, or by all.
            plan = dataclasses.replace(plan, owners=((tuple(range(min(self.world_size, 8))),), *plan.owners[1:]))
        members = tuple(range(len(matrices)))
        return dataclasses.replace(plan, rounds=tuple(members[r :: self.rounds] for r in range(self.rounds)))

    def held(self, rank: int) -> dict[str, tuple[int, int]]:
        """The flat range of each parameter that a rank stores."""
        return {m.spec.name: (s.start, s.stop) for m in self.plan().matrices for s in m.slices if s.rank == rank}

    def without_gradient(self, step: int) -> tuple[int, str]:
        """A rank, and a parameter of which its slice gets no gradient in this step."""
        return (self.seed + step) % self.world_size, "ab"[step % 2]

    def gradient(self, name: str, step: int) -> Tensor:
        """The whole gradient; zero in the slice that gets none."""
        gradient = normal(100 * step + ord(name[0]), *SHAPES[name])
        rank, missing = self.without_gradient(step)
        if name == missing and name in self.held(rank):
            begin, end = self.held(rank)[name]
            gradient.view(-1)[begin:end] = 0.0
        return gradient


class Trainer:
    """One rank's slices and their optimizer, on a device that `tests/gpu` chooses."""

    def __init__(
        self, case: Case, rank: int, weights: Mapping[str, Tensor] | None = None, device: torch.device = CPU
    ) -> None:
        self.case, self.rank, self.device = case, rank, device
        self.ranges = case.held(rank)
        self.slices = {
            name: Parameter((weights[name] if weights else start(name).flatten()[a:b]).to(device, copy=True))
            for name, (a, b) in self.ranges.items()
        }
        groups = [{"params": [self.slices[n] for n in names if n in self.slices]} for names in GROUPS]
        self.optimizer = ShardedMuon(groups, lr=9.0, config=case.config)
        plan = case.plan()
        indices = {m.spec.name: index for index, m in enumerate(plan.matrices)}
        self.optimizer.bind(plan, None, {indices[name]: p for name, p in self.slices.items()}, device)

    def step(self, step: int) -> None:
        for name, (a, b) in self.ranges.items():
            missing = self.case.without_gradient(step) == (self.rank, name)
            gradient = self.case.gradient(name, step).flatten()[a:b]
            self.slices[name].grad = None if missing else gradient.to(self.device)
        for group, (lr, weight_decay) in zip(self.optimizer.param_groups, SCHEDULE[step % 3], strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.slices.items()}

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {name: dict(self.optimizer.state[p]) for name, p in self.slices.items()}


def train(rank: int, world_size: int, cases: list[Case], device: torch.device = CPU) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        trainer = Trainer(case, rank, device=device)
        for step in range(3):
            trainer.step(step)
        stats = trainer.optimizer.exchange.stats
        results.append(
            dict(weights=trainer.weights(), states=trainer.states(), calls=stats.collectives, sent=stats.bytes_sent)
        )
    return results


def reference(case: Case) -> ReferenceMuon:
    oracle = ReferenceMuon({name: start(name) for name in SHAPES}, LOGICAL_ROWS, case.config)
    for step in range(3):
        for names, (lr, weight_decay) in zip(GROUPS, SCHEDULE[step], strict=True):
            oracle.step({name: case.gradient(name, step) for name in names}, lr=lr, weight_decay=weight_decay)
    return oracle


CONFIGS = (
    EXACT,
    dataclasses.replace(EXACT, exchange_dtype="bf16"),
    dataclasses.replace(EXACT, exchange_dtype="bf16", ns_dtype="bf16"),
    dataclasses.replace(MuonConfig.from_preset("megatron", batched=False), ns_dtype="fp32", exchange_dtype="fp32"),
)


def run_on(world_size: int, cases: list[Case]) -> list[list[dict[str, Any]]]:
    """The results of each rank. One rank does without torch.distributed."""
    return run_ranks(train, world_size, cases) if world_size > 1 else [train(0, 1, cases)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_reference_bitwise(world_size: int) -> None:
    """Weights and momenta, with settings that change between steps, in several rounds, and with missing gradients."""
    cases = [Case(world_size, 10 * i + r, config, r) for i, config in enumerate(CONFIGS) for r in (1, 3)]
    by_rank = run_on(world_size, cases)
    for index, case in enumerate(cases):
        oracle = reference(case)
        for rank in range(world_size):
            result = by_rank[rank][index]
            ranges = case.held(rank)
            assert result["weights"].keys() == result["states"].keys() == ranges.keys()
            for name, (a, b) in ranges.items():
                assert same_bits(result["weights"][name], oracle.parameters[name].flatten()[a:b])
                # The only state, and it takes no more than the slice's size in fp32.
                assert result["states"][name].keys() == {"momentum_buffer"}
                assert same_bits(result["states"][name]["momentum_buffer"], oracle.momenta[name].flatten()[a:b])
            assert result["calls"] == 3 * planned_collectives(case.plan())
            itemsize = 4 if case.config.exchange_dtype == "fp32" else 2
            assert result["sent"] == 3 * itemsize * case.plan().sent_numel()[rank]


def test_batched_equals_reference() -> None:
    """Newton-Schulz on stacks rounds differently, by up to 1e-5 of an update (see test_muon).

    Three updates of 0.2 * sqrt(16) * lr <= 0.04 then differ by 1e-6, in weights of up to 3.
    """
    case = Case(2, 1, dataclasses.replace(EXACT, batched=True))
    oracle = reference(case)
    for rank, (result,) in enumerate(run_ranks(train, 2, [case])):
        for name, (a, b) in case.held(rank).items():
            assert (result["weights"][name] - oracle.parameters[name].flatten()[a:b]).abs().max() <= 1e-6


def resume(rank: int, world_size: int, case: Case) -> dict[str, bool]:
    """Saves after two steps, loads into a new optimizer, and goes on with both."""
    trainer = Trainer(case, rank)
    for step in range(2):
        trainer.step(step)
    file = io.BytesIO()
    torch.save(trainer.optimizer.state_dict(), file)
    file.seek(0)
    weights = trainer.weights()
    resumed, fresh = Trainer(case, rank, weights), Trainer(case, rank, weights)
    resumed.optimizer.load_state_dict(torch.load(file))
    groups = [[(g["lr"], g["weight_decay"]) for g in t.optimizer.param_groups] for t in (trainer, resumed)]
    for each in (trainer, resumed, fresh):
        each.step(2)
        each.step(3)
    return dict(
        groups=groups[0] == groups[1] == list(SCHEDULE[1]),
        weights=all(same_bits(w, resumed.weights()[name]) for name, w in trainer.weights().items()),
        momenta=all(
            same_bits(state["momentum_buffer"], resumed.states()[name]["momentum_buffer"])
            for name, state in trainer.states().items()
        ),
        differs_without=any(not same_bits(w, fresh.weights()[name]) for name, w in trainer.weights().items()),
    )


def test_resumes_from_a_state_dict_bitwise() -> None:
    case = Case(2, 5, dataclasses.replace(EXACT, exchange_dtype="bf16"))
    assert all(case.held(rank) for rank in range(2))
    all_true = dict(groups=True, weights=True, momenta=True, differs_without=True)
    assert run_ranks(resume, 2, case) == [all_true, all_true]
    assert resume(0, 1, Case(1, 5)) == all_true


def test_state_dict_is_the_momentum_and_nothing_else() -> None:
    trainer = Trainer(Case(1, 2), 0)
    assert trainer.optimizer.state_dict()["state"] == {}
    trainer.optimizer.init_state()
    state = trainer.optimizer.state_dict()["state"]
    assert [entry.keys() for entry in state.values()] == [{"momentum_buffer"}] * len(SHAPES)
    assert all(same_bits(e["momentum_buffer"], torch.zeros(e["momentum_buffer"].shape)) for e in state.values())
    trainer.step(0)
    before = trainer.states()
    # Once made, buffers are left alone.
    trainer.optimizer.init_state()
    assert all(trainer.states()[name]["momentum_buffer"] is s["momentum_buffer"] for name, s in before.items())


# One matrix on one rank, for what has nothing to do with ranks.


def one_matrix(rank: int = 0, world_size: int = 1, name: str = "w") -> OwnershipPlan:
    """A (4, 3) matrix of which every rank stores an equal share."""
    share = 12 // world_size
    slices = tuple(Slice(r, r * share, (r + 1) * share) for r in range(world_size))
    return build_plan(
        [ShardedMatrix(MatrixSpec(name, (4, 3), 1, None, whole(4)), slices)], [0] * world_size, ns_steps=5
    )


def bound(p: Parameter, **settings: Any) -> ShardedMuon:
    optimizer = ShardedMuon([p], config=EXACT, **settings)
    optimizer.bind(one_matrix(), None, {0: p}, CPU)
    return optimizer


def test_nothing_works_before_bind() -> None:
    p = Parameter(torch.ones(12))
    optimizer = ShardedMuon([p], lr=0.1)
    for use in (optimizer.step, lambda: optimizer.exchange):
        with pytest.raises(RuntimeError, match=r"ShardedMuon\.bind was not called"):
            use()
    assert torch.equal(p, torch.ones(12)) and not optimizer.state[p]


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, math.nan, -math.inf])
def test_negative_lr_or_weight_decay(name: str, value: float) -> None:
    p = Parameter(torch.ones(12))
    expected = re.escape(f"ShardedMuon: {name}: got {value}, expected a number that is not negative")
    settings: dict[str, Any] = {"lr": 0.1, name: value}
    with pytest.raises(ValueError, match=expected):
        ShardedMuon([p], **settings)
    with pytest.raises(ValueError, match=expected):
        ShardedMuon([{"params": [p], name: value}], lr=0.1)
    settings[name] = 0.0
    ShardedMuon([p], **settings)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_parameter_that_is_not_real(dtype: torch.dtype) -> None:
    p = Parameter(torch.zeros(3, 4, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"got a parameter of {dtype} and shape \(3, 4\).*leave it to AdamW"):
        ShardedMuon([Parameter(torch.zeros(2)), p], lr=0.1)


def test_lr_and_weight_decay_are_read_at_each_step() -> None:
    p = Parameter(torch.ones(12))
    optimizer = bound(p, lr=0.5, weight_decay=0.5)
    (group,) = optimizer.param_groups
    # Without a gradient the update is zero, and only the decay is left.
    for lr, weight_decay, expected in ((0.5, 0.5, 0.75), (0.0, 0.5, 0.75), (0.5, 0.0, 0.75), (1.0, 0.5, 0.375)):
        group["lr"], group["weight_decay"] = lr, weight_decay
        optimizer.step()
        assert torch.equal(p, torch.full((12,), expected))


def test_gradient_is_not_changed() -> None:
    p = Parameter(torch.ones(12))
    p.grad = normal(1, 12)
    bound(p, lr=0.1).step()
    assert torch.equal(p.grad, normal(1, 12))


def test_closure() -> None:
    """It runs once, before the update and with gradients enabled, and its loss is returned."""
    p = Parameter(normal(0, 12))
    optimizer = bound(p, lr=0.1)
    seen = []

    def closure() -> Tensor:
        seen.append(p.detach().clone())
        optimizer.zero_grad()
        loss = p.square().sum()
        torch.autograd.backward(loss)
        return loss

    loss = optimizer.step(closure)
    assert len(seen) == 1 and torch.equal(seen[0], normal(0, 12))
    assert loss.item() == pytest.approx(normal(0, 12).square().sum().item())
    twin = Parameter(normal(0, 12))
    twin.grad = 2 * normal(0, 12)
    other = bound(twin, lr=0.1)
    assert other.step() is None
    assert torch.equal(p, twin) and not torch.equal(p, seen[0])


def test_momentum_of_bf16_slices_is_fp32() -> None:
    p = Parameter(normal(0, 12).bfloat16())
    optimizer = bound(p, lr=0.1)
    p.grad = normal(1, 12).bfloat16()
    optimizer.step()
    assert p.dtype == torch.bfloat16
    assert same_bits(optimizer.state[p]["momentum_buffer"], normal(1, 12).bfloat16().float())


def test_momentum_of_bf16_slices_is_loaded_in_fp32() -> None:
    p = Parameter(normal(0, 12).bfloat16())
    optimizer, other = bound(p, lr=0.1), bound(p, lr=0.1)
    optimizer.init_state()
    optimizer.state[p]["momentum_buffer"].copy_(normal(1, 12))
    other.load_state_dict(optimizer.state_dict())
    assert same_bits(other.state[p]["momentum_buffer"], normal(1, 12))


# Ranks that disagree.


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "no error"


def bind_other_plan(rank: int, world_size: int) -> tuple[str, str, str]:
    p = Parameter(torch.zeros(4))
    plan = one_matrix(rank, world_size, "v" if rank == 1 else "w")
    optimizer = ShardedMuon([p], lr=0.1)
    message = message_of(partial(optimizer.bind, plan, None, {0: p}, CPU))
    # A failed bind leaves it unbound.
    return message, message_of(optimizer.step), plan.fingerprint


def test_ranks_with_different_plans() -> None:
    """Every rank raises, and the message tells which rank has which plan."""
    results = run_ranks(bind_other_plan, 3, timeout_s=60.0)
    prints = [fingerprint[:12] for _, _, fingerprint in results]
    assert prints[0] == prints[2] != prints[1]
    listed = ", ".join(f"rank {rank}: {fingerprint}" for rank, fingerprint in enumerate(prints))
    for message, step, _ in results:
        assert message.startswith(f"the ranks of a group made different ownership plans ({listed}). They must build")
        assert "bind was not called" in step


MISFITS: dict[str, tuple[str, Callable[[Parameter], tuple[list[Parameter], dict[int, Tensor]]]]] = {
    "too small": (
        "w: stores 3 elements, but the plan says 4",
        lambda p: ([q := Parameter(torch.zeros(3))], {0: q}),
    ),
    "missing": ("w: stores None elements, but the plan says 4", lambda p: ([p], {})),
    "unknown": (
        "parameter 7: stores 2 elements, but the plan says None",
        lambda p: ([p, q := Parameter(torch.zeros(2))], {0: p, 7: q}),
    ),
    "not in a group": (
        "1 parameters are in the groups, but 1 slices are in the plan",
        lambda p: ([p], {0: Parameter(torch.zeros(4))}),
    ),
    "not in the plan": (
        "2 parameters are in the groups, but 1 slices are in the plan",
        lambda p: ([p, Parameter(torch.zeros(4))], {0: p}),
    ),
}


def bind_misfits(rank: int, world_size: int, names: list[str]) -> list[str]:
    """Rank 1's slices do not fit; those of the others do."""
    messages = []
    for name in names:
        p = Parameter(torch.zeros(4))
        params, slices = MISFITS[name][1](p) if rank == 1 else ([p], {0: p})
        optimizer = ShardedMuon(params, lr=0.1)
        plan = one_matrix(rank, world_size)
        messages.append(message_of(partial(optimizer.bind, plan, None, slices, CPU)))
    return messages


def test_slices_that_do_not_fit_fail_on_every_rank() -> None:
    for messages in run_ranks(bind_misfits, 3, list(MISFITS), timeout_s=60.0):
        assert messages == [f"Distributed Muon cannot start: rank 1: {text}" for text, _ in MISFITS.values()]


def stores_nothing(rank: int, world_size: int) -> tuple[int, list[float]]:
    """Rank 0 stores the whole matrix, the other one is left without parameters."""
    plan = build_plan(
        [ShardedMatrix(MatrixSpec("w", (4, 3), 1, None, whole(4)), (Slice(0, 0, 12),))], [0, 0], ns_steps=5
    )
    params = [Parameter(normal(0, 12))] if rank == 0 else []
    optimizer = ShardedMuon([{"params": params}], lr=0.1, config=EXACT)
    optimizer.bind(plan, None, dict(enumerate(params)), CPU)
    for p in params:
        p.grad = normal(1, 12)
    optimizer.step()
    return optimizer.exchange.stats.collectives, [x for p in params for x in p.tolist()]


def test_rank_without_parameters_takes_part() -> None:
    oracle = ReferenceMuon({"w": normal(0, 12).view(4, 3)}, {}, EXACT)
    oracle.step({"w": normal(1, 12).view(4, 3)}, lr=0.1, weight_decay=0.0)
    # Rank 0 stores and owns all, so that nothing is issued.
    assert run_ranks(stores_nothing, 2) == [(0, oracle.parameters["w"].flatten().tolist()), (0, [])]


def bind_absent_backend(rank: int, world_size: int) -> str:
    """What a host without CUDA says to another package's kernels."""
    config = MuonConfig(ns_backend="emerging", max_team_size=1)
    p = Parameter(torch.zeros(6))
    optimizer = ShardedMuon([p], lr=0.1, config=config)
    return message_of(partial(optimizer.bind, one_matrix(rank, world_size), None, {0: p}, CPU))


def test_a_back_end_that_this_host_cannot_run_is_refused_on_every_rank() -> None:
    for message in run_ranks(bind_absent_backend, 2):
        assert message.startswith(
            "Distributed Muon cannot start: rank 0: Newton-Schulz back end 'emerging': got device"
        )
        assert "rank 1" in message and "take the back end 'torch'" in message
