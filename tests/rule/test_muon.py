"""Muon on plain tensors: values by hand, what is mutated, and that slicing does not change a bit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers.muon import get_muon_scale_factor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_muon.config import MuonConfig, scale_factor
from megatron_muon.newton_schulz import CoefficientSet, coefficients, orthogonalize
from megatron_muon.rule import muon
from megatron_muon.rule.muon import apply_updates, momentum_update, muon_update, orthogonalized_updates
from megatron_muon.rule.reference import ReferenceMuon

FP32 = MuonConfig(ns_dtype="fp32")
KELLER = (3.4445, -4.7750, 2.0315)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def directions(m: Sequence[Tensor], g: Sequence[Tensor], **settings: Any) -> list[Tensor]:
    """What `momentum_update` writes to new tensors."""
    out = [torch.full_like(t, math.nan, dtype=torch.float32) for t in m]
    momentum_update(list(m), list(g), out, **settings)
    return out


# Halves and quarters: every result below is exact in float32, so that equality is the test.


def test_heavy_ball_by_hand() -> None:
    m, g = torch.tensor([0.0, 4.0, -8.0]), torch.tensor([1.0, 2.0, 0.0])
    (direction,) = directions([m], [g], momentum=0.5, nesterov=False)
    assert m.tolist() == direction.tolist() == [1.0, 4.0, -4.0]
    (direction,) = directions([m], [g], momentum=0.5, nesterov=False)
    assert m.tolist() == direction.tolist() == [1.5, 4.0, -2.0]


def test_nesterov_by_hand() -> None:
    m, g = torch.tensor([0.0, 4.0, -8.0]), torch.tensor([1.0, 2.0, 0.0])
    (direction,) = directions([m], [g], momentum=0.5, nesterov=True)
    assert m.tolist() == [1.0, 4.0, -4.0]
    assert direction.tolist() == [1.5, 4.0, -2.0]
    (direction,) = directions([m], [g], momentum=0.5, nesterov=True)
    assert m.tolist() == [1.5, 4.0, -2.0]
    assert direction.tolist() == [1.75, 4.0, -1.0]


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_zero_is_the_gradient(nesterov: bool) -> None:
    m, g = torch.tensor([3.0, -5.0]), torch.tensor([1.0, 2.0])
    (direction,) = directions([m], [g], momentum=0.0, nesterov=nesterov)
    assert m.tolist() == direction.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_update_mutates_the_buffers_only(nesterov: bool) -> None:
    momenta, gradients = [normal(1, 5), normal(2, 3, 2), normal(3, 0)], [normal(4, 5), normal(5, 3, 2), normal(6, 0)]
    lists = list(momenta), list(gradients)
    before = [g.clone() for g in gradients]
    found = directions(momenta, gradients, momentum=0.9, nesterov=nesterov)
    assert all(same_bits(g, b) for g, b in zip(gradients, before, strict=True))
    assert all(a is b for pair in zip(lists, (momenta, gradients)) for a, b in zip(*pair, strict=True))
    # Writing to the result touches neither state nor gradient.
    states = [m.clone() for m in momenta]
    for direction in found:
        direction.fill_(math.nan)
    assert all(same_bits(m, s) for m, s in zip(momenta, states, strict=True))
    assert all(same_bits(g, b) for g, b in zip(gradients, before, strict=True))


def test_momentum_buffer_stays_fp32_under_bf16_gradients() -> None:
    m, g = torch.tensor([1.0]), torch.tensor([2.0**-8], dtype=torch.bfloat16)
    (direction,) = directions([m], [g], momentum=0.5, nesterov=True)
    # Neither sum is representable in bf16.
    assert m.dtype == direction.dtype == torch.float32
    assert m.item() == 0.5 + 2.0**-8
    assert direction.item() == 0.25 + 2.0**-9 + 2.0**-8


def test_apply_updates_by_hand() -> None:
    w, u = torch.tensor([8.0, -4.0, 0.0]), torch.tensor([1.0, 2.0, -4.0])
    apply_updates([w], [u], lr=0.5, weight_decay=0.25)
    # w * (1 - 0.125) - 0.5 * u
    assert w.tolist() == [6.5, -4.5, 2.0]


def test_weight_decay_zero_does_not_touch_the_weight() -> None:
    w, u = torch.tensor([8.0, -4.0]), torch.tensor([1.0, 2.0])
    apply_updates([w], [u], lr=0.5, weight_decay=0.0)
    assert w.tolist() == [7.5, -5.0]
    apply_updates([w], [torch.tensor([1.0, 2.0])], lr=0.0, weight_decay=0.25)
    assert w.tolist() == [7.5, -5.0]


def test_nothing_to_do() -> None:
    momentum_update([], [], [], momentum=0.9, nesterov=True)
    apply_updates([], [], lr=0.1, weight_decay=0.1)
    orthogonalized_updates([], FP32)


@st.composite
def cut_points(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A length beyond several vector registers, and positions to cut at, aligned to nothing."""
    n = draw(st.integers(1, 700))
    return n, sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=6))})


def element_wise_step(w: Sequence[Tensor], m: Sequence[Tensor], g: Sequence[Tensor], nesterov: bool) -> list[Tensor]:
    """All of a step but Newton-Schulz; the direction stands in for the update."""
    found = directions(m, g, momentum=0.95, nesterov=nesterov)
    apply_updates(list(w), [d.clone() for d in found], lr=0.0123, weight_decay=0.1)
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cut_points(), st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_slicing_does_not_change_a_bit(
    cuts: tuple[int, list[int]], nesterov: bool, copied: bool, dtype: torch.dtype
) -> None:
    """The whole tensor and its slices, wherever they begin in memory, give the same bits."""
    n, edges = cuts
    whole = [normal(seed, n) for seed in (1, 2)] + [normal(3, n).to(dtype)]
    sliced = [t.clone() for t in whole]
    pieces = [[t[a:b].clone() if copied else t[a:b] for a, b in pairwise(edges)] for t in sliced]
    w, m, g = whole
    (direction,) = element_wise_step([w], [m], [g], nesterov)
    directions = element_wise_step(pieces[0], pieces[1], pieces[2], nesterov)
    for expected, got in zip((*whole, direction), (*pieces, directions), strict=True):
        assert same_bits(torch.cat(got), expected)


def test_every_operation_rounds_once() -> None:
    """As in numpy's float32, one operation after the other. A fused multiply-add would round a product less."""
    w, m, g = (normal(seed, 200) for seed in (1, 2, 3))
    arrays = [t.numpy().copy() for t in (w, m, g)]
    (direction,) = element_wise_step([w], [m], [g], nesterov=True)
    f32 = np.float32
    expected_m = arrays[1] * f32(0.95) + arrays[2]
    expected_direction = expected_m * f32(0.95) + arrays[2]
    expected_w = arrays[0] * f32(1.0 - 0.0123 * 0.1) - expected_direction * f32(0.0123)
    for got, expected in ((m, expected_m), (direction, expected_direction), (w, expected_w)):
        assert same_bits(got, torch.from_numpy(expected))


def test_orthogonalized_updates_are_newton_schulz_times_the_scale() -> None:
    """Of views of any strides. Other elements are left alone."""
    storage = normal(1, 24, 10)
    tall, wide = storage[:12, :5], storage[13:23, 5:8].mT
    inputs = [view.clone() for view in (tall, wide)]
    assert [tuple(m.shape) for m in inputs] == [(12, 5), (3, 10)]
    before = storage.clone()
    orthogonalized_updates([tall, wide], FP32)
    schedule = coefficients("keller", 5)
    for view, matrix in zip((tall, wide), inputs, strict=True):
        expected = orthogonalize(matrix, schedule) * (0.2 * math.sqrt(max(matrix.shape)))
        assert same_bits(view.contiguous(), expected)
    touched = torch.zeros_like(storage, dtype=torch.bool)
    touched[:12, :5] = touched[13:23, 5:8] = True
    assert torch.equal(storage[~touched], before[~touched])
    assert not torch.isclose(storage[touched], before[touched]).any()


@pytest.mark.parametrize(
    "coefficient_set, steps", [("keller", 5), ("you", 5), ("polar_express", 8), ("deepseek_v4", 10)]
)
def test_batched_equals_unbatched(coefficient_set: str, steps: int) -> None:
    """Other kernels, other order of sums, at (16, 256) the other iteration: equal but for rounding.

    A step of keller's adds terms of 3.4 + 4.8 + 2.0 = 10 times its result, and so rounds by 10 * 2^-24 = 6e-7 of it.
    The steps after it pass that on with a slope of up to 1.6 near one: 6e-7 * (1 + 1.6 + ... + 1.6^4) = 1e-5.
    Measured: up to 6e-6 of the largest element.
    """
    config = MuonConfig(ns_dtype="fp32", coefficients=coefficient_set, ns_steps=steps)
    shapes = [(3, 9, 30), (2, 30, 9), (2, 16, 256), (2, 7, 25), (1, 1, 7)]
    stacks = [normal(seed, *shape) for seed, shape in enumerate(shapes)]
    batched, single = [m.clone() for m in stacks], [m.clone() for m in stacks]
    orthogonalized_updates(batched, config)
    orthogonalized_updates(single, dataclasses.replace(config, batched=False))
    for some, others in zip(batched, single, strict=True):
        for a, b in zip(some, others, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_a_stack_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven matrices in stacks of three: no product sees more, and all are updated."""
    stacks: list[int] = []

    def counted(batch: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        stacks.append(batch.shape[0] if batch.ndim == 3 else 1)
        return orthogonalize(batch, *args, **kwargs)

    matrices = normal(7, 7, 8, 20)
    expected = matrices.clone()
    orthogonalized_updates([expected], FP32)
    monkeypatch.setattr(muon, "orthogonalize", counted)
    monkeypatch.setattr(muon, "_STACK_NUMEL", 3 * 8 * 20 + 1)
    orthogonalized_updates([matrices], FP32)
    assert stacks == [3, 3, 1]
    for matrix, one_stack in zip(matrices, expected, strict=True):
        assert (matrix - one_stack).abs().max() <= 1e-5 * one_stack.abs().max()  # see the test above


def test_unbatched_does_not_depend_on_the_other_matrices() -> None:
    config = dataclasses.replace(FP32, batched=False)
    matrices = normal(3, 3, 8, 20)
    together = matrices.clone()
    orthogonalized_updates([together], config)
    for matrix, expected in zip(matrices, together, strict=True):
        orthogonalized_updates([matrix], config)
        assert same_bits(matrix, expected)


@pytest.mark.parametrize("batched", [False, True])
def test_nan_in_one_matrix_stays_there(batched: bool) -> None:
    matrices = normal(3, 3, 6, 6)
    matrices[1][2, 3] = math.nan
    orthogonalized_updates([matrices], dataclasses.replace(FP32, batched=batched))
    assert [bool(m.isnan().any()) for m in matrices] == [False, True, False]


def test_iterations_run_in_ns_dtype_and_the_scale_does_not() -> None:
    matrix = normal(1, 16, 24)
    expected = orthogonalize(matrix.bfloat16(), coefficients("keller", 5)).float() * (0.2 * math.sqrt(24))
    orthogonalized_updates([matrix], MuonConfig(ns_dtype="bf16"))
    assert matrix.dtype == torch.float32 and same_bits(matrix, expected)
    # Had the product been rounded to bf16, every element would be representable in it.
    assert not torch.equal(matrix, matrix.bfloat16().float())


@pytest.mark.parametrize(
    "ns_dtype",
    [
        "fp32",
        "bf16",
        "fp16",
    ],
)
@pytest.mark.parametrize("exponent", [-40, -20, 40])
def test_update_does_not_depend_on_the_gradients_scale(ns_dtype: Any, exponent: int) -> None:
    """Gradients of 1e-6 are common, and gradient clipping scales them at will; powers of two even keep every bit."""
    config = MuonConfig(ns_dtype=ns_dtype)
    expected, scaled = normal(1, 16, 24), normal(1, 16, 24) * 2.0**exponent
    orthogonalized_updates([expected], config)
    orthogonalized_updates([scaled], config)
    assert same_bits(scaled, expected)


@pytest.mark.parametrize(
    "coefficient_set",
    [
        *(name for name in get_args(CoefficientSet) if name != "aol"),
        "aol",
    ],
)
def test_every_coefficient_set_that_a_config_takes_orthogonalizes(coefficient_set: str) -> None:
    """Its update is near 0.2 * sqrt(24) U V^T; keller's singular values are the farthest off, down to 0.68."""
    steps = {"deepseek_v4": 10, "aol": 4}.get(coefficient_set, 5)
    matrix = normal(1, 8, 24)
    orthogonalized_updates([matrix], MuonConfig(coefficients=coefficient_set, ns_steps=steps, ns_dtype="fp32"))
    sigma = torch.linalg.svdvals(matrix) / (0.2 * math.sqrt(24))
    assert sigma.min() > 0.68 and sigma.max() < 1.14


@pytest.mark.parametrize("mode", ["spectral", "unit_rms_norm", "shape_scaling"])
@pytest.mark.parametrize("rows, cols", [(1, 1), (1, 64), (64, 1), (96, 96), (2048, 1408), (1408, 2048)])
def test_scale_modes_are_those_of_emerging_optimizers(mode: Any, rows: int, cols: int) -> None:
    config = MuonConfig(scale_mode=mode, extra_scale_factor=0.3, update_rms=0.7)
    # x ** 0.5 and sqrt(x) may differ in the last bit of a float64.
    assert scale_factor(rows, cols, config) == pytest.approx(0.3 * get_muon_scale_factor(rows, cols, mode), rel=1e-15)


def test_scale_mode_rms_is_moonlights() -> None:
    assert scale_factor(2048, 1408, MuonConfig()) == 0.2 * math.sqrt(2048)
    assert scale_factor(512, 2048, MuonConfig(update_rms=0.18)) == 0.18 * math.sqrt(2048)
    assert scale_factor(16, 4, MuonConfig(extra_scale_factor=0.5)) == 0.2 * 4 * 0.5


def polynomial(sigma: Tensor, steps: int = 5) -> Tensor:
    a, b, c = KELLER
    for _ in range(steps):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


@pytest.mark.parametrize("rows, cols", [(24, 96), (96, 24), (32, 48), (7, 300)])
@pytest.mark.parametrize("update_rms", [0.2, 0.18])
def test_update_rms(rows: int, cols: int, update_rms: float) -> None:
    """The update's RMS is update_rms times that of p(s) over the singular values s of the normalized matrix.

    |U p(S) V^T|^2 is the sum of min(rows, cols) squares p(s)^2, and the scale's max(rows, cols) cancels the rest of
    rows*cols. The matrices' s, from 0.04 on, lie where five steps of keller's quintic give 0.68 < p(s) < 1.14.
    """
    matrix = normal(rows, rows, cols)
    sigma = torch.linalg.svdvals(matrix.double())
    p = polynomial(sigma / sigma.norm())
    orthogonalized_updates([matrix], MuonConfig(ns_dtype="fp32", update_rms=update_rms))
    rms = matrix.double().square().mean().sqrt().item()
    # fp32 iterations: a few hundred roundings of 2^-24 in sums of this length.
    assert rms == pytest.approx(update_rms * p.square().mean().sqrt().item(), rel=1e-5)
    assert p.min() > 0.68 and p.max() < 1.14
    assert 0.68 * update_rms < rms < 1.14 * update_rms


def test_the_chosen_back_end_and_method_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []

    def backend(name: str, device_type: str) -> Any:
        def run(x: Tensor, schedule: Any, *, iteration: str, scaling: str) -> Tensor:
            calls.append((name, iteration))
            return torch.full_like(x, 2.0)

        return run

    monkeypatch.setattr("megatron_muon.rule.muon._backend", backend)
    config = MuonConfig(ns_backend="gram-newton-schulz", ns_method="standard", max_team_size=1, scale_mode="spectral")
    views = [normal(0, 2, 4, 9)]
    orthogonalized_updates(views, config)
    assert calls == [("gram-newton-schulz", "standard")]
    assert torch.equal(views[0], torch.full((2, 4, 9), 6.0))


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_the_method_is_the_chosen_one(method: Any) -> None:
    config = dataclasses.replace(FP32, ns_method=method, scale_mode="unit_rms_norm")
    x = normal(3, 8, 32)
    update = x.clone()
    orthogonalized_updates([update], config)
    expected = orthogonalize(x, coefficients("keller", 5), iteration=method) * math.sqrt(8 / 32)
    assert same_bits(update, expected)
    other = orthogonalize(x, coefficients("keller", 5), iteration="gram" if method == "standard" else "standard") * 0.5
    assert not torch.equal(update, other)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_rule_as_one_function_is_the_references(nesterov: bool) -> None:
    """Three steps of matrices of two shapes, bit for bit."""
    config = MuonConfig(ns_dtype="fp32", exchange_dtype="fp32", batched=False, nesterov=nesterov, momentum=0.9)
    weights = {"tall": normal(1, 24, 7), "wide": normal(2, 8, 30)}
    reference = ReferenceMuon({name: w.clone() for name, w in weights.items()}, {}, config)
    momenta = [torch.zeros_like(w) for w in weights.values()]
    for step in range(3):
        gradients = {name: normal(10 * step + i, *w.shape) for i, (name, w) in enumerate(weights.items())}
        muon_update(
            list(weights.values()), list(gradients.values()), momenta, config, lr=0.02 * (step + 1), weight_decay=0.1
        )
        reference.step(gradients, lr=0.02 * (step + 1), weight_decay=0.1)
        assert all(same_bits(weights[name], reference.parameters[name]) for name in weights)
    assert all(same_bits(m, reference.momenta[name]) for m, name in zip(momenta, weights, strict=True))
