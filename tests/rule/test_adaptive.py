"""The variants' parts: numbers of elements, stochastic rounding, NorMuon and AdaMuon against emerging-optimizers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers.adaptive_muon import AdaptiveMuon
from torch import Tensor

from megatron_muon.config import MuonConfig, scale_factor
from megatron_muon.matrices.fused import pattern, spec_from_split
from megatron_muon.matrices.lines import (
    num_lines,
    num_logical_matrices,
    numbers_in_parameter,
    tiles_of_slice,
    touched_lines,
)
from megatron_muon.matrices.shares import divide_part, logical_views, max_shares, share_positions
from megatron_muon.matrices.slice_elements import SliceElements, logical_matrices
from megatron_muon.matrices.spec import Blocks, MatrixSpec, Part, whole
from megatron_muon.rule.adaptive import (
    advance_line_moments,
    divide_elements,
    line_factors,
    line_means,
    multiply_lines,
    rms_factor,
    square_bits,
    square_sum,
)
from megatron_muon.rule.muon import apply_updates, momentum_update
from megatron_muon.rule.reference_adaptive import ReferenceVariants
from megatron_muon.rule.stochastic_rounding import random_bits, stochastic_bf16, stream
from tests.distributed import run_ranks
from tests.models import Layout, initialize, make_chunks, optimizer_config, places, wrap
from tests.models import normal as model_normal
from tests.plans import qkv_parts

CPU = torch.device("cpu")
FP32 = MuonConfig(ns_dtype="fp32", exchange_dtype="fp32", batched=False)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Numbers of elements.

SPECS = [
    MatrixSpec("whole", (5, 7), 1, None, whole(5)),
    MatrixSpec("rows", (5, 7), 2, 0, whole(5)),
    MatrixSpec("columns", (9, 4), 2, 1, whole(9)),
    MatrixSpec("copies", (6, 3), 2, None, whole(6)),
    MatrixSpec("qkv", (8, 5), 2, 0, qkv_parts(8, 2, 1, 1)),
    MatrixSpec("heads", (6, 4), 2, 0, (Part("", ((0, 6),), Blocks(0, 3)),)),
    MatrixSpec("column blocks", (2, 6), 2, 0, (Part("", ((0, 2),), Blocks(1, 3)),)),
    MatrixSpec("pieces", (8, 3), 2, 1, whole(8), tp_joined=False),
    # q has three rows on the first rank and one on the second, which has all of k.
    spec_from_split("uneven", (3, 5), pattern([("q", 4), ("k", 2)]), tp_size=2, partition_dim=0),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_elements_know_their_place(spec: MatrixSpec) -> None:
    """Against joined matrices that are put together, and cut into logical ones, as the exchange does it."""
    joined: list[Tensor] = []
    number = 0
    for index, _ in enumerate(spec.parts):
        rows, cols = spec.joined_shape(index)
        joined.append(torch.arange(number, number + rows * cols).view(rows, cols))
        number += rows * cols
    matrix_of, line_of = torch.empty(number, dtype=torch.int64), torch.empty(number, dtype=torch.int64)
    matrix = line = 0
    for index, whole_part in enumerate(joined):
        for view in logical_views(spec, index, whole_part):
            rows, cols = view.shape
            lines = torch.arange(line, line + max(rows, cols))
            matrix_of[view] = matrix
            line_of[view] = lines[:, None].expand(rows, cols) if rows >= cols else lines[None, :].expand(rows, cols)
            matrix, line = matrix + 1, line + max(rows, cols)
    layout = logical_matrices(spec)
    assert len(layout.shapes) == matrix and layout.first_line[-1] == line
    for piece in range(spec.num_pieces):
        expected = torch.empty(spec.shape, dtype=torch.int64)
        parts = torch.empty(spec.shape, dtype=torch.int64)
        for index, part in enumerate(spec.parts):
            ranges = part.pieces[piece] if part.pieces else part.rows
            rows = [row for start, stop in ranges for row in range(start, stop)]
            own = joined[index]
            if part.pieces:
                sizes = [sum(stop - start for start, stop in of_piece) for of_piece in part.pieces]
                own = own.split(sizes)[piece]
            elif spec.partition_dim is not None:
                own = own.chunk(spec.tp_size, dim=spec.partition_dim)[piece]
            expected[rows], parts[rows] = own, index
        for start, stop in ((0, spec.local_numel), (4, 11), (spec.local_numel - 5, spec.local_numel)):
            elements = SliceElements(spec, piece, start, stop, CPU)
            everything = slice(0, stop - start)
            numbers = expected.view(-1)[start:stop]
            assert torch.equal(elements.numbers(everything), numbers)
            assert torch.equal(elements.parts(everything), parts.view(-1)[start:stop])
            assert torch.equal(elements.matrices(everything), matrix_of[numbers])
            assert torch.equal(elements.lines(everything), line_of[numbers])
            assert torch.equal(elements.touched_lines, line_of[numbers].unique())


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_lines_of_runs_are_those_of_their_elements(spec: MatrixSpec, count: int) -> None:
    """Lines counted by rectangles against the numbers of single elements, in every slice and every share."""
    for piece in range(spec.num_pieces):
        for start, stop in ((0, spec.local_numel), (4, 11), (spec.local_numel - 5, spec.local_numel), (3, 4)):
            elements = SliceElements(spec, piece, start, stop, CPU)
            everything = slice(0, stop - start)
            got = []
            for part in range(len(spec.parts)):
                for share in divide_part(spec, part, min(count, max_shares(spec, part))):
                    first, last = share_positions(spec, part, share, piece, np.array([start, stop])).tolist()
                    own = touched_lines(spec, part, share, piece, first, last)
                    assert torch.equal(own, own.unique())
                    assert not len(own) or int(own[-1]) < num_lines(spec, part, share)
                    numbers = numbers_in_parameter(spec, part, share, own)
                    assert torch.equal(numbers, numbers.sort().values)
                    got.append(numbers)
            assert torch.equal(torch.cat(got).sort().values, elements.touched_lines)
            flat = torch.zeros(stop - start, dtype=torch.int64) - 1
            for tile in tiles_of_slice(spec, piece, start, stop):
                assert tile.shape == logical_matrices(spec).shapes[tile.number]
                for strip in tile.strips:
                    strip.view(flat).fill_(tile.number)
            assert torch.equal(flat, elements.matrices(everything))
    assert sum(num_logical_matrices(s) for s in (spec,)) == len(logical_matrices(spec).shapes)


def test_chunks_cover_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_muon.matrices.slice_elements as module

    elements = SliceElements(SPECS[4], 1, 3, 38, CPU)
    once = elements.numbers(slice(0, 35))
    monkeypatch.setattr(module, "_CHUNK_NUMEL", 8)
    assert torch.equal(torch.cat([elements.numbers(chunk) for chunk in elements.chunks()]), once)


# Stochastic rounding.


def test_rounding_is_unbiased_and_to_a_neighbour() -> None:
    """Of a value a part p of the way between two neighbours, a part p of 2^16 tries goes up.

    Each try's standard deviation is at most half a spacing, so that the mean's is 2^-9 of one: five of them are 0.01.
    """
    tries = torch.arange(1 << 16)
    for part in (0.0, 0.1, 0.5, 0.9, 2**-16):
        for sign in (1.0, -1.0):
            low, high = sign * 1.5, sign * (1.5 + 2**-7)
            value = torch.tensor(low + (high - low) * part, dtype=torch.float32).expand(len(tries))
            rounded = stochastic_bf16(value, random_bits(tries, stream("w", 3))).double()
            assert set(rounded.tolist()) <= {low, high}
            assert abs(((rounded - low) / (high - low)).mean().item() - part) <= 0.01


def test_every_rounding_of_16_bits_happens_as_often() -> None:
    """Exactly unbiased if the bits are: over all 2^16 of them, a value goes up as often as its lower half says."""
    bits = torch.arange(1 << 16)
    value = (torch.tensor(0x3FC01234, dtype=torch.int32)).view(torch.float32).expand(1 << 16)
    up = stochastic_bf16(value, bits) > torch.tensor(0x3FC00000, dtype=torch.int32).view(torch.float32)
    assert int(up.sum()) == 0x1234


def test_bits_are_uniform_and_independent() -> None:
    numbers = torch.arange(1 << 18)
    streams = [random_bits(numbers, stream(name, step)) for name, step in (("a", 0), ("a", 1), ("b", 0))]
    for bits in streams:
        assert int(bits.min()) >= 0 and int(bits.max()) < 1 << 16
        # 256 bins of 1024 each: chi squared has mean 255 and standard deviation 22.6.
        counts = torch.bincount(bits >> 8, minlength=256).double()
        assert ((counts - 1024) ** 2 / 1024).sum() < 255 + 5 * 22.6
        # Neighbouring elements, and one bit with another: correlation of 2^18 pairs is within 5 * 2^-9 of none.
        assert abs(torch.corrcoef(torch.stack([bits[1:], bits[:-1]]).double())[0, 1]) < 5 * 2**-9
    assert abs(torch.corrcoef(torch.stack(streams).double()) - torch.eye(3)).max() < 5 * 2**-9


def test_what_bf16_holds_stays() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.nan, 2.0**-130])
    rounded = stochastic_bf16(values, torch.full((8,), 0xFFFF))
    assert torch.equal(rounded.float().view(torch.int32)[:6], values.view(torch.int32)[:6])
    assert rounded[6].isnan() and rounded[7] == values[7]


# Momentum forms and weight decay.


@pytest.mark.parametrize("nesterov", [False, True])
def test_ema_is_emerging_optimizers(nesterov: bool) -> None:
    """Its `lerp` for the buffer and for the look ahead."""
    m, expected = torch.zeros(50), torch.zeros(50)
    for step in range(4):
        g = normal(step, 50)
        u = torch.empty(50)
        momentum_update([m], [g], [u], momentum=0.9, nesterov=nesterov, gain=1.0 - 0.9)
        expected.lerp_(g, 1 - 0.9)
        torch.testing.assert_close(m, expected)
        torch.testing.assert_close(u, g.lerp(expected, 0.9) if nesterov else expected)


def test_cautious_weight_decay_by_hand() -> None:
    w, u = torch.tensor([8.0, -8.0, 8.0, -8.0, 8.0]), torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    apply_updates([w], [u], lr=0.5, weight_decay=0.25, cautious=True)
    # Where both signs agree, or the update is zero: w * 0.875 - u / 2.
    assert w.tolist() == [6.5, -8.5, 8.5, -6.5, 7.0]


# NorMuon and AdaMuon.


def divided(o: Tensor, moment: Tensor, config: MuonConfig) -> Tensor:
    """The update of one orthogonalized matrix, by the product's functions; `moment` is mutated."""
    shape, out = (o.shape[0], o.shape[1]), o.clone()
    if config.variant == "normuon":
        sums = advance_line_moments(moment, line_means(o), config)
        multiply_lines(o, line_factors(moment, sums, shape, config), out)
        return out
    divide_elements([out], [moment.view(shape)], config)
    bits = square_bits(o.numel(), config.beta2)
    return out.mul_(rms_factor(square_sum([out], bits, out), bits, shape, config))


def adaptive(method: Any, shape: tuple[int, int], config: MuonConfig) -> AdaptiveMuon:
    return AdaptiveMuon(
        [torch.nn.Parameter(torch.zeros(shape))],
        lr=1.0,
        momentum=0.9,
        weight_decay=0.0,
        moment2_method=method,
        beta2=config.beta2,
        eps=config.second_moment_eps,
    )


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6), (1, 9)], ids=str)
@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
def test_second_moments_are_emerging_optimizers(variant: Any, shape: tuple[int, int]) -> None:
    """State and direction over three steps; AdaMuon's norm is the paper's, where theirs is left as it comes out."""
    config = dataclasses.replace(FP32, variant=variant, beta2=0.9)
    theirs = adaptive(variant, shape, config)
    dims = max(shape) if variant == "normuon" else shape[0] * shape[1]
    moment = torch.zeros(dims)
    if variant == "adamuon":
        their_moment = torch.zeros(shape)
    else:
        their_moment = torch.zeros((shape[0], 1) if shape[0] >= shape[1] else (1, shape[1]))
    for step in range(3):
        o = torch.linalg.svd(normal(step, *shape), full_matrices=False)
        direction = (o.U @ o.Vh).contiguous()
        expected = theirs._apply_moment2_normalization(direction.clone(), their_moment, 0.9, config.second_moment_eps)
        if variant == "adamuon":
            expected *= (min(shape) ** 0.5) / expected.norm()
        update = divided(direction, moment, config)
        torch.testing.assert_close(moment, their_moment.flatten(), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(update, expected * scale_factor(*shape, config), rtol=1e-5, atol=1e-7)
        if variant == "adamuon":
            # The paper's alignment: the RMS that Muon would have with an exactly orthogonal matrix.
            rms = config.update_rms * (min(shape) * max(shape)) ** 0.5 / (shape[0] * shape[1]) ** 0.5
            assert update.square().mean().sqrt().item() == pytest.approx(rms, rel=1e-5)


@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
def test_zero_matrix_stays_zero(variant: Any) -> None:
    config = dataclasses.replace(FP32, variant=variant)
    oracle = ReferenceVariants({"w": normal(1, 4, 6)}, {}, config)
    before = oracle.parameters["w"].clone()
    oracle.step({"w": torch.zeros(4, 6)}, lr=0.1, weight_decay=0.0)
    assert torch.equal(oracle.parameters["w"], before)
    moment = torch.zeros(6 if variant == "normuon" else 24)
    assert not divided(torch.zeros(4, 6), moment, config).any() and not moment.any()


def test_a_stack_is_divided_as_its_matrices_alone() -> None:
    config = dataclasses.replace(FP32, variant="normuon")
    stack = normal(1, 3, 9, 4)
    moments = torch.rand(3, 9)
    alone = torch.stack([divided(m, v.clone(), config) for m, v in zip(stack, moments, strict=True)])
    out = stack.clone()
    sums = advance_line_moments(moments, line_means(stack), config)
    multiply_lines(stack, line_factors(moments, sums, (9, 4), config), out)
    torch.testing.assert_close(out, alone)


def test_sums_of_squares_do_not_depend_on_the_cut() -> None:
    """The largest matrices and decays that make sense leave digits; the sums are exact in any order."""
    for numel, beta2 in ((1, 0.0), (2**31, 0.999), (7168 * 18432, 0.95)):
        bits = square_bits(numel, beta2)
        assert bits >= 10 and numel / (1 - beta2) * 2.0**bits <= 2.0**53
    values, bits = normal(3, 10_000) * 4, square_bits(10_000, 0.95)
    whole_sum = square_sum([values], bits, values)
    for seed in range(3):
        shuffled = values[torch.randperm(10_000, generator=torch.Generator().manual_seed(seed))]
        parts = sum(square_sum([part], bits, part) for part in torch.split(shuffled, 777))
        assert torch.equal(torch.as_tensor(parts), whole_sum)
    assert whole_sum.item() / 2.0**bits == pytest.approx(values.double().square().sum().item(), rel=1e-6)


# Groups.


def groups_session(rank: int, world_size: int, overridden: bool) -> dict[str, Any]:
    """One step with learning rates and weight decays that Megatron's scheduler sets, of overrides or not."""
    from megatron.core.optimizer import ParamKey, get_standard_config_overrides
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer

    layout = Layout(2)
    initialize(layout)
    chunks = make_chunks("dense", layout, torch.float32)
    tag_parameters(chunks, FP32)
    wrapped = wrap(chunks, layout)
    config = optimizer_config(layout, torch.float32, lr=0.02, clip_grad=0.0)
    overrides: dict[Any, Any] = get_standard_config_overrides(config)
    if overridden:
        overrides[ParamKey(name="*linear_fc2.weight")] = {"max_lr": 0.002, "min_lr": 0.0, "wd_mult": 3.0}
    optimizer = get_megatron_optimizer(config, wrapped, overrides, muon=FP32)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=0.02,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=10,
        lr_decay_style="constant",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=10,
        wd_incr_style="constant",
    )
    scheduler.step(1)
    everything = places(wrapped[0], layout)
    wrapped[0].zero_grad_buffer()
    for place in everything:
        place.parameter.main_grad.copy_(model_normal(f"gradient {place.name}", place.shape))  # type: ignore[attr-defined]
    before = {p.name: p.parameter.detach().clone() for p in everything}
    optimizer.step()
    return {p.name: (before[p.name], p.parameter.detach().clone()) for p in everything}


def test_groups_have_their_own_learning_rate_and_weight_decay() -> None:
    plain, overridden = (run_ranks(groups_session, 2, flag)[0] for flag in (False, True))
    changed = [name for name in plain if name.endswith("linear_fc2.weight")]
    assert len(changed) == 2
    for name, (before, after) in plain.items():
        if name not in changed:
            assert torch.equal(after, overridden[name][1]), name
            continue
        update = (before * (1 - 0.02 * 0.1) - after) / 0.02
        expected = before * (1 - 0.002 * 0.3) - 0.002 * update
        torch.testing.assert_close(overridden[name][1], expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(overridden[name][1], before * (1 - 0.002 * 0.1) - 0.002 * update, atol=1e-5)
