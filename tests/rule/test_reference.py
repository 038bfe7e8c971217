"""ReferenceMuon, the oracle of the other tests, against torch.optim.Muon and against singular value decompositions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_muon.config import MuonConfig
from megatron_muon.rule.reference import ReferenceMuon

FP32 = MuonConfig(ns_dtype="fp32", exchange_dtype="fp32")
SHAPES = [(24, 40), (40, 24), (16, 16), (5, 64)]
STEPS, LR, WEIGHT_DECAY = 6, 0.02, 0.1


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decayed(steps: int, lr: float = LR, weight_decay: float = WEIGHT_DECAY) -> float:
    return float((1.0 - lr * weight_decay) ** steps)


def movement_against_torch(config: MuonConfig, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Runs both optimizers; returns where torch's ends, where ours ends, and where decay alone would have ended."""
    start = normal(0, *shape)
    parameter = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Muon(
        [parameter],
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    ours = ReferenceMuon({"w": start.clone()}, {}, config)
    for step in range(1, STEPS + 1):
        gradient = normal(step, *shape)
        parameter.grad = gradient.clone()
        theirs.step()  # type: ignore[no-untyped-call]
        ours.step({"w": gradient}, lr=LR, weight_decay=WEIGHT_DECAY)
    return parameter.detach(), ours.parameters["w"], start * decayed(STEPS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("momentum, nesterov", [(0.95, True), (0.9, False), (0.0, True)])
def test_equals_torch_without_its_cast_to_bf16(
    shape: tuple[int, int], momentum: float, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch holds (1 - momentum) times our momentum, a factor that Newton-Schulz removes.

    It always iterates in bf16; without that cast its own code runs in fp32. Both then round by 2^-24 in numbers of
    the weights' size (up to 4) at each step: 6 * 4 * 6e-8 = 1.4e-6, for weights that move by 0.02 a step.
    """
    config = dataclasses.replace(FP32, momentum=momentum, nesterov=nesterov)
    with monkeypatch.context() as patch:
        # A copy, as the cast makes one: torch goes on in place.
        patch.setattr(torch.Tensor, "bfloat16", Tensor.clone)
        theirs, ours, start = movement_against_torch(config, shape)
    assert (theirs - ours).abs().max() <= 1.5e-6
    assert (ours - start).square().mean().sqrt() > 0.2 * LR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_in_bf16(shape: tuple[int, int]) -> None:
    """As torch runs it. A step of Newton-Schulz adds terms of 10 times its result, hence rounds by 10 * 2^-9 = 2 %.

    Five independent ones, at a slope of about one, give 2 % * sqrt(5) = 4.5 % for each of the two, and 6.3 % between
    them (measured: 2 to 5 %). The errors of the six updates are independent, while the updates share a direction: in
    the movement between 6.3 % and 6.3 % / sqrt(6) = 2.6 % are left (measured: 1.4 to 1.9 %). One Newton-Schulz step
    less makes 20 %, no Nesterov 20 %, other coefficients 8 %, momentum 0.9 makes 6 %.
    """
    theirs, ours, start = movement_against_torch(dataclasses.replace(FP32, ns_dtype="bf16"), shape)
    assert (theirs - ours).norm() <= 0.04 * (ours - start).norm()


def svd_update(direction: Tensor, response: Callable[[Tensor], Tensor]) -> Tensor:
    """0.2 * sqrt(max(rows, cols)) * U p(S) V^T in float64, S the singular values over their root sum of squares."""
    u, s, vh = torch.linalg.svd(direction.double(), full_matrices=False)
    update: Tensor = 0.2 * max(direction.shape) ** 0.5 * (u * response(s / s.norm())) @ vh
    return update


def keller(sigma: Tensor) -> Tensor:
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return sigma


def expected_weights(
    start: Tensor, gradients: list[Tensor], config: MuonConfig, response: Callable[[Tensor], Tensor]
) -> Tensor:
    """Moonlight's update in float64, with a decomposition in place of the iterations."""
    w, m = start.double(), torch.zeros_like(start, dtype=torch.float64)
    for g in gradients:
        m = config.momentum * m + g.double()
        direction = g.double() + config.momentum * m if config.nesterov else m
        w = w - LR * (svd_update(direction, response) + WEIGHT_DECAY * w)
    return w


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    "coefficients, steps, response", [("keller", 5, keller), ("polar_express", 12, torch.ones_like)]
)
def test_equals_singular_value_decomposition(
    shape: tuple[int, int], nesterov: bool, coefficients: str, steps: int, response: Callable[[Tensor], Tensor]
) -> None:
    """Keller's five steps are U p(S) V^T with the composed quintic p; steps that converge give U V^T.

    Rounding as against torch, and the iterations' own: 1e-5 of an update (see test_muon) of at most
    0.2 * sqrt(64) * LR = 0.03 is little beside it.
    """
    config = dataclasses.replace(FP32, nesterov=nesterov, coefficients=coefficients, ns_steps=steps)
    start, gradients = normal(0, *shape), [normal(step, *shape) for step in range(1, STEPS + 1)]
    ours = ReferenceMuon({"w": start.clone()}, {}, config)
    for gradient in gradients:
        ours.step({"w": gradient}, lr=LR, weight_decay=WEIGHT_DECAY)
    expected = expected_weights(start, gradients, config, response)
    assert (ours.parameters["w"] - expected).abs().max() <= 2e-6


def test_each_logical_matrix_is_orthogonalized_and_scaled_alone() -> None:
    """Rows need not be contiguous, as in a fused QKV weight; the scale is that of the logical shape."""
    rows = {"qkv": [[0, 1, 4, 5], [2, 6], [3, 7]]}
    config = dataclasses.replace(FP32, coefficients="polar_express", ns_steps=12)
    ours = ReferenceMuon({"qkv": normal(0, 8, 3), "o": normal(1, 8, 3)}, rows, config)
    gradients = {"qkv": normal(2, 8, 3), "o": normal(3, 8, 3)}
    for name, blocks in {**rows, "o": [list(range(8))]}.items():
        update = ours.update(name, gradients[name])
        for block in blocks:
            expected = svd_update(gradients[name][block], torch.ones_like)
            assert torch.allclose(update[block].double(), expected, rtol=0, atol=2e-6)


def test_weight_decay_is_decoupled() -> None:
    """It shrinks weights by lr * weight_decay and never enters the momentum: seen where the gradient is zero."""
    start = normal(0, 4, 6)
    ours = ReferenceMuon({"w": start.clone(), "idle": start.clone()}, {}, FP32)
    expected = start.clone()
    for _ in range(3):
        ours.step({"w": torch.zeros(4, 6)}, lr=0.5, weight_decay=0.25)
        expected *= 1.0 - 0.5 * 0.25
    assert torch.equal(ours.parameters["w"], expected)
    assert torch.equal(ours.momenta["w"], torch.zeros(4, 6))
    # Without a gradient nothing happens to a parameter.
    assert torch.equal(ours.parameters["idle"], start)


def test_decay_acts_on_the_weight_before_the_update() -> None:
    """w*(1 - lr*wd) - lr*update and not (w - lr*update)*(1 - lr*wd)."""
    start, gradient = normal(0, 4, 6), normal(1, 4, 6)
    ours = ReferenceMuon({"w": start.clone()}, {}, FP32)
    update = ours.update("w", gradient + 0.95 * gradient)
    ours.step({"w": gradient}, lr=0.5, weight_decay=0.25)
    assert torch.equal(ours.parameters["w"], start * 0.875 - update * 0.5)


def test_exchange_in_bf16_rounds_both_ways() -> None:
    config = dataclasses.replace(FP32, exchange_dtype="bf16")
    ours, exact = (ReferenceMuon({"w": torch.zeros(8, 8)}, {}, c) for c in (config, FP32))
    direction = normal(1, 8, 8)
    update = ours.update("w", direction)
    assert torch.equal(update, exact.update("w", direction.bfloat16().float()).bfloat16().float())
    assert not torch.equal(update, exact.update("w", direction).bfloat16().float())
    # Momentum stays in fp32: it is never sent.
    ours.step({"w": direction}, lr=0.1, weight_decay=0.0)
    assert torch.equal(ours.momenta["w"], direction)
