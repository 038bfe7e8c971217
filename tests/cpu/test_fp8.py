"""The CPU backend's FP8: quantizers against Transformer Engine's bytes and brute force, products against formulas."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_muon.cpu import quantizers
from megatron_muon.cpu.quantizers import E4M3, E5M2, DelayedQuantizer, Quantized, cast, quantize
from tests import models
from tests.distributed import RankError, run_ranks
from tests.models import Layout
from tests.paths import TESTS
from tests.training_runs import MUON, differences, launch_ranks

GOLDEN = np.load(TESTS / "golden" / "fp8_te_2.20.2.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN})
# A format's finite values by byte: sign, exponent, mantissa.
FORMATS = {E4M3: (4, 3, 7, 448.0), E5M2: (5, 2, 15, 57344.0)}


def golden_input(case: str) -> Tensor:
    return torch.from_numpy(GOLDEN[f"{case}/input_bf16_as_int16"]).view(torch.bfloat16)


def value(byte: int, fp8: torch.dtype) -> Fraction | None:
    """What an FP8 byte says, from the format's definition; None for infinities and NaN."""
    exponent_bits, mantissa_bits, bias, largest = FORMATS[fp8]
    exponent = byte >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = Fraction(byte & (1 << mantissa_bits) - 1, 1 << mantissa_bits)
    magnitude = (
        mantissa * Fraction(2) ** (1 - bias) if exponent == 0 else (1 + mantissa) * Fraction(2) ** (exponent - bias)
    )
    return None if magnitude > largest else magnitude * (-1 if byte >> 7 else 1)


@functools.cache
def values(fp8: torch.dtype) -> list[tuple[Fraction, int]]:
    """A format's finite values, with their bytes."""
    return [(v, byte) for byte in range(256) if (v := value(byte, fp8)) is not None]


def nearest(number: Fraction, fp8: torch.dtype) -> Fraction:
    """The format's value nearest to a number, ties to the even byte, by trying all of them."""
    return min(values(fp8), key=lambda pair: (abs(pair[0] - number), pair[1] % 2))[0]


class TestQuantize:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize(
        ("recipe", "rule", "block"),
        [
            ("blockwise128", quantizers.power_of_two_scale, (128, 128)),
            ("tensorwise", quantizers.current_scale, None),
        ],
    )
    def test_bytes_are_transformer_engines(
        self, case: str, recipe: str, rule: quantizers.ScaleRule, block: tuple[int, int] | None
    ) -> None:
        quantized = quantize(golden_input(case), E4M3, rule, block)
        expected = GOLDEN[f"{case}/{recipe}_e4m3_bytes"]
        assert np.array_equal(quantized.data.view(torch.uint8).numpy(), expected)
        # Bit for bit, so that a NaN or a signed zero would count.
        scale_inv = quantized.scale_inv.numpy().reshape(GOLDEN[f"{case}/{recipe}_scale_inv"].shape)
        assert np.array_equal(scale_inv.view(np.int32), GOLDEN[f"{case}/{recipe}_scale_inv"].view(np.int32))

    @pytest.mark.parametrize("block", [(1, 128), (128, 1), (1, 32), (32, 1), (128, 128)])
    @pytest.mark.parametrize("rule", [quantizers.power_of_two_scale, quantizers.e8m0_scale])
    def test_a_block_is_quantized_as_if_it_were_alone(self, block: tuple[int, int], rule: quantizers.ScaleRule) -> None:
        """Also the cut ones at the end."""
        tensor = golden_input("ragged")
        quantized = quantize(tensor, E4M3, rule, block)
        dequantized = quantized.dequantize()
        for row in range(0, tensor.shape[0], block[0]):
            for column in range(0, tensor.shape[1], block[1]):
                place = slice(row, row + block[0]), slice(column, column + block[1])
                alone = quantize(tensor[place], E4M3, rule)
                assert torch.equal(quantized.data[place].view(torch.uint8), alone.data.view(torch.uint8))
                assert torch.equal(dequantized[place], alone.dequantize())

    def test_mxfp8_by_brute_force(self) -> None:
        """2^e is the least power of two that keeps amax / 2^e within 448, and each value the nearest one."""
        exact = torch.tensor([448.0, -448.0, 450.0, 224.0, 1.0, 2.0**-100, 2.0**100, 0.0])
        tensor = torch.cat((golden_input("rows")[3, :320].view(10, 32), torch.zeros(8, 32, dtype=torch.bfloat16)))
        tensor[10:, 5] = exact.bfloat16()
        quantized = quantize(tensor, E4M3, quantizers.e8m0_scale, (1, 32))
        dequantized = quantized.dequantize()
        for row, block in enumerate(tensor.tolist()):
            amax = max(map(abs, block))
            exponent = 0
            if amax:
                exponent = math.floor(math.log2(amax / 448)) - 2
                while 448 * Fraction(2) ** exponent < Fraction(amax):
                    exponent += 1
            assert quantized.scale_inv[row].item() == 2.0**exponent, row
            expected = [nearest(Fraction(v) / Fraction(2) ** exponent, E4M3) * Fraction(2) ** exponent for v in block]
            assert [Fraction(v) for v in dequantized[row].tolist()] == expected

    @pytest.mark.parametrize("rule", [quantizers.current_scale, quantizers.power_of_two_scale, quantizers.e8m0_scale])
    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    def test_an_overflow_stays_one_in_its_block(self, bad: float, rule: quantizers.ScaleRule) -> None:
        tensor = torch.ones(2, 64, dtype=torch.bfloat16)
        tensor[1, 40] = bad
        finite = quantize(tensor, E4M3, rule, (1, 32)).dequantize().isfinite()
        assert not finite[1, 40] and finite[0].all() and finite[1, :32].all()

    @pytest.mark.parametrize("shape", [(0, 64), (0, 0)])
    def test_no_rows(self, shape: tuple[int, int]) -> None:
        for block in (None, (1, 32), (32, 1), (128, 128)):
            assert quantize(torch.empty(shape), E4M3, quantizers.e8m0_scale, block).dequantize().shape == shape

    def test_dequantize_takes_each_blocks_scale(self) -> None:
        data = torch.full((3, 5), 2.0).to(E4M3)
        scale_inv = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        expected = torch.tensor([[2.0, 2, 4, 4, 6], [2, 2, 4, 4, 6], [8, 8, 10, 10, 12]])
        assert torch.equal(Quantized(data, scale_inv, (2, 2)).dequantize(), expected)


@pytest.mark.parametrize("fp8", FORMATS)
class TestCast:
    def test_rounds_to_nearest(self, fp8: torch.dtype) -> None:
        """Every value of the format, the middle between it and the next, and a little to each side of that."""
        positive = [v for byte in range(128) if (v := value(byte, fp8)) is not None]
        numbers = [*positive]
        for low, high in pairwise(positive):
            middle = (low + high) / 2
            numbers += [middle, middle + (high - low) / 64, middle - (high - low) / 64]
        numbers += [-n for n in numbers]
        got = cast(torch.tensor([float(n) for n in numbers]), fp8).float().tolist()
        assert [Fraction(g) for g in got] == [nearest(n, fp8) for n in numbers]

    def test_too_large_is_the_largest_and_infinite_is_nan(self, fp8: torch.dtype) -> None:
        largest = FORMATS[fp8][3]
        values = torch.tensor([largest * 1.2, -largest * 1e9, math.inf, -math.inf, math.nan])
        got = cast(values, fp8).float()
        assert got[:2].tolist() == [largest, -largest] and got[2:].isnan().all()


class TestDelayed:
    # Largest values of six steps; one has no tokens, one an overflow.
    AMAXES = (2.0, 8.0, 0.0, 4.0, math.inf, 1.0)

    @pytest.mark.parametrize(
        ("length", "algorithm", "margin", "scale_inverses"),
        [
            # The scale that quantizes step i is 448 over the value that stands here; 448: none yet.
            (1, "most_recent", 0, (448.0, 2.0, 8.0, 8.0, 4.0, 4.0)),
            (3, "most_recent", 0, (448.0, 2.0, 8.0, 8.0, 4.0, 4.0)),
            (3, "max", 0, (448.0, 2.0, 8.0, 8.0, 8.0, 8.0)),
            (2, "max", 1, (448.0, 4.0, 16.0, 16.0, 8.0, 8.0)),
        ],
    )
    def test_scale_follows_the_history(
        self, length: int, algorithm: Any, margin: int, scale_inverses: tuple[float, ...]
    ) -> None:
        quantizer = DelayedQuantizer(E4M3, length, algorithm, margin)
        for amax, expected in zip(self.AMAXES, scale_inverses):
            assert quantizer.scale == 448.0 / expected
            tensor = torch.tensor([[amax, amax / 3, -0.01]]) if amax else torch.empty(0, 3)
            rows, columns = quantizer(tensor, training=True)
            assert rows is columns
            finite = tensor.isfinite()
            scaled = (tensor * (448.0 / expected)).clamp(-448, 448)
            assert torch.equal(rows[finite], (scaled.to(E4M3).float() * (1 / (448.0 / expected)))[finite])
            assert rows[~finite].isnan().all()

    def test_after_an_overflow_left_the_history_scales_go_on(self) -> None:
        quantizer = DelayedQuantizer(E5M2, 2, "max")
        for amax in (math.inf, 3.0, 5.0):
            quantizer(torch.tensor([[amax]]), training=True)
        assert quantizer.scale == pytest.approx(57344 / 5.0)

    def test_evaluation_changes_nothing(self) -> None:
        quantizer = DelayedQuantizer(E4M3)
        quantizer(torch.ones(2, 2), training=False)
        assert (quantizer.scale, quantizer.history) == (1.0, [])


def blockwise_by_hand(tensor: Tensor, block: tuple[int, int] | None, fp8: torch.dtype, rule: str) -> Tensor:
    """A loop over blocks, each with its own scale from its largest value."""
    height, width = block or tensor.shape
    out = torch.empty(tensor.shape)
    for row in range(0, tensor.shape[0], height):
        for column in range(0, tensor.shape[1], width):
            part = tensor[row : row + height, column : column + width].float()
            amax, largest = part.abs().max(), FORMATS[fp8][3]
            if rule == "exact":
                scale = largest / amax
            elif rule == "floor":
                scale = torch.tensor(2.0 ** math.floor(math.log2(largest / amax.item())))
            else:
                scale = torch.tensor(2.0 ** -math.ceil(math.log2(amax.item() / largest)))
            out[row : row + height, column : column + width] = cast(part * scale, fp8).float() * (1 / scale)
    return out


# Recipe -> rule of scales, gradient's format, blocks of (activations by rows, by columns, weights by rows, by columns).
RECIPES: dict[str, tuple[str, torch.dtype, tuple[Any, Any, Any, Any]]] = {
    "tensorwise": ("exact", E5M2, (None, None, None, None)),
    "blockwise": ("floor", E4M3, ((1, 128), (128, 1), (128, 128), (128, 128))),
    "mxfp8": ("ceil", E4M3, ((1, 32), (32, 1), (1, 32), (32, 1))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_the_formulas(recipe: str, dtype: torch.dtype) -> None:
    from megatron_muon.cpu.fp8 import LinearQuantizers, _Product

    rule, gradient_format, (x_rows, x_columns, w_rows, w_columns) = RECIPES[recipe]
    generator = torch.Generator().manual_seed(5)
    # Rows of different sizes, or scales by row and by tensor would be alike; 2 x 70 tokens.
    x = (torch.randn(2, 70, 160, generator=generator) * torch.logspace(-2, 2, 70)[:, None]).to(dtype).requires_grad_()
    weight = (
        (torch.randn(192, 160, generator=generator) * torch.logspace(-1, 1, 192)[:, None]).to(dtype).requires_grad_()
    )
    gradient = (torch.randn(2, 70, 192, generator=generator) * 1e-4).to(dtype)
    output = _Product.apply(
        x, weight, LinearQuantizers(recipe, "hybrid" if gradient_format == E5M2 else "e4m3", None), True
    )
    output.backward(gradient)

    flat, flat_gradient = x.detach().view(-1, 160), gradient.view(-1, 192)
    by_hand: Callable[..., Tensor] = blockwise_by_hand
    expected = by_hand(flat, x_rows, E4M3, rule) @ by_hand(weight.detach(), w_rows, E4M3, rule).t()
    assert torch.equal(output, expected.to(dtype).view(2, 70, 192))
    to_input = by_hand(flat_gradient, x_rows, gradient_format, rule) @ by_hand(weight.detach(), w_columns, E4M3, rule)
    to_weight = by_hand(flat_gradient, x_columns, gradient_format, rule).t() @ by_hand(flat, x_columns, E4M3, rule)
    assert x.grad is not None and torch.equal(x.grad, to_input.to(dtype).view(x.shape))
    assert weight.grad is not None and torch.equal(weight.grad, to_weight.to(dtype))


def test_an_unknown_recipe() -> None:
    from megatron_muon.cpu.fp8 import LinearQuantizers

    with pytest.raises(
        ValueError, match="recipe: got 'rowwise', expected one of delayed, tensorwise, blockwise, mxfp8"
    ):
        LinearQuantizers("rowwise", "e4m3", None)


def test_delayed_products_take_megatrons_settings() -> None:
    from megatron_muon.cpu.fp8 import LinearQuantizers

    config = SimpleNamespace(fp8_amax_history_len=7, fp8_amax_compute_algo="max", fp8_margin=2)
    made = LinearQuantizers("delayed", "hybrid", config)
    assert made.input == made.weight == DelayedQuantizer(E4M3, 7, "max", 2)
    assert made.gradient == DelayedQuantizer(E5M2, 7, "max", 2)
    assert made.input is not made.weight


# Multiples of 32 on every rank, so that blocks of MXFP8 lie within a rank's part.
WIDE: dict[str, Any] = dict(
    hidden_size=64, moe_ffn_hidden_size=64, moe_shared_expert_intermediate_size=64, moe_aux_loss_coeff=0.0
)


def losses(rank: int, world_size: int, layout: Layout, recipe: Any, steps: int) -> dict[str, Any]:
    """Losses of a few steps with Distributed Muon, in fp32, and which linears compute in FP8."""
    from megatron.core import optimizer as stock
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    import megatron_muon

    megatron_muon.enable(moe_fp8=recipe, exchange_dtype="fp32")
    models.initialize(layout)
    chunks = models.make_chunks("moe", layout, torch.float32)
    wrapped = models.wrap(chunks, layout)
    linears = {n: m for n, m in chunks[0].named_modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)}
    emulated = {n for n, m in linears.items() if "_forward_impl" in vars(m)}
    optimizer = stock.get_megatron_optimizer(models.optimizer_config(layout, torch.float32, lr=5e-3), wrapped)
    trained = [models.train_step(wrapped, optimizer, step) for step in range(steps)]
    return {"losses": trained, "emulated": emulated, "linears": set(linears)}


ALONE = Layout(1, config=WIDE)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "mxfp8"])
def test_experts_alone_are_emulated_and_learn(recipe: str) -> None:
    [off] = run_ranks(losses, 1, ALONE, "off", 1)
    [got] = run_ranks(losses, 1, ALONE, recipe, 6)
    assert off["emulated"] == set()
    assert got["emulated"] == {name for name in got["linears"] if "experts." in name}
    assert len(got["emulated"]) == 2 * (4 + 1) and len(got["linears"]) > 14
    # The same weights and data: rounding to FP8 changes the first loss, and not much.
    difference = abs(got["losses"][0] - off["losses"][0])
    assert 1e-6 < difference < 0.05
    # Two batches in turn.
    assert got["losses"][4] < got["losses"][0] - 0.05 and got["losses"][5] < got["losses"][1] - 0.05


LAYOUTS = {
    "TP2 SP EP2": Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True, config=WIDE),
    "TP2 SP, expert TP2": Layout(2, tp=2, sequence_parallel=True, config=WIDE),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_do_not_depend_on_the_layout(name: str) -> None:
    layout = LAYOUTS[name]
    [alone] = run_ranks(losses, 1, ALONE, "mxfp8", 2)
    for got in run_ranks(losses, layout.world_size, layout, "mxfp8", 2):
        assert len(got["emulated"]) == 2 * (4 // layout.ep + 1)
        # MXFP8's blocks are the same in both, so that only sums in fp32 differ. Now and then a sum lies so near the
        # middle of two FP8 values that it goes the other way: a step of 1/16 in one of 64 terms of a token's output,
        # of which the loss averages 64 tokens.
        assert got["losses"] == pytest.approx(alone["losses"], abs=2e-4)


def refused(rank: int, world_size: int) -> None:
    losses(rank, world_size, LAYOUTS["TP2 SP, expert TP2"], "blockwise", 1)


def test_a_shape_that_a_recipe_does_not_take_is_refused_on_every_rank() -> None:
    with pytest.raises(RankError) as raised:
        run_ranks(refused, 2)
    assert sorted(raised.value.errors) == [0, 1]
    for name, message, _ in raised.value.errors.values():
        assert name == "ValueError" and "expected a multiple of 128 with moe_fp8 blockwise" in message


def test_a_launched_run_resumes_in_fp8_and_without(tmp_path: Path) -> None:
    """Through the launcher's flag and megatron.training's checkpoints, which hold no FP8."""
    fp8 = [*MUON, "--muon-moe-fp8", "mxfp8"]
    saving = launch_ranks(*fp8, "--save", str(tmp_path), "--save-interval", "2", "--ckpt-format", "torch_dist")
    assert "--muon-moe-fp8 mxfp8: the experts' products are emulated in fp32 on this CPU" in saving[0].printed
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    load = ["--load", str(tmp_path), "--ckpt-format", "torch_dist"]
    assert differences(launch_ranks(*fp8, *load), saving, range(2, 4)) == []
    without = launch_ranks(*MUON, *load)
    for rank, trace in enumerate(without):
        assert all(torch.equal(v, trace.states[2][key]) for key, v in saving[rank].states[2].items())
        # The same weights and data: the loss differs by the rounding to FP8 alone.
        assert trace.losses[2] != saving[rank].losses[2]
        assert trace.losses[2]["lm loss"] == pytest.approx(saving[rank].losses[2]["lm loss"], rel=1e-2)
