"""Transformer Engine's FP8 quantizers in plain torch: the same bytes and scales, on a CPU.

A quantizer makes of a tensor what its products see: values rounded to FP8, times their scale, in fp32. A tensor of
rows x columns is quantized twice where a recipe has blocks along one dimension: along its rows for the product that
sums over columns, and along its columns for the one that sums over rows.

Scales are those of Transformer Engine 2.20.2; `tests/golden` holds bytes of its reference quantizers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Largest absolute value -> factor that takes it to the format's largest, given that and the tensor's data type.
ScaleRule = Callable[[Tensor, torch.dtype, torch.dtype], Tensor]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Quantized:
    """An FP8 tensor with one scale for each block.

    Attributes:
        data: (rows, columns), e4m3 or e5m2.
        scale_inv: (blocks of rows, blocks of columns), fp32: what a block's values are multiplied with.
        block: Rows and columns of a block; those at the end may be cut.
    """

    data: Tensor
    scale_inv: Tensor
    block: tuple[int, int]

    def dequantize(self) -> Tensor:
        """(rows, columns), fp32."""
        return self.data.float() * _spread(self.scale_inv, self.data.shape, self.block)


def current_scale(amax: Tensor, fp8: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The format's largest value over `amax`; 1 for zeros. Source: `_scale_from_amax_tensor` of Transformer Engine."""
    scale = torch.finfo(fp8).max / amax
    # Where amax is so small that the quotient overflows.
    scale = torch.where(scale.isinf(), torch.finfo(dtype).max, scale)
    return torch.where(amax == 0, 1.0, scale)


def power_of_two_scale(amax: Tensor, fp8: torch.dtype, dtype: torch.dtype) -> Tensor:
    """`current_scale` rounded down to a power of two, as for blocks of 128. Source: as there."""
    exponent = torch.frexp(current_scale(amax, fp8, dtype))[1] - 1
    scale = torch.ldexp(torch.ones_like(amax), exponent)
    return torch.where(amax == 0, 1.0, torch.where(amax.isinf(), 0.0, scale))


def e8m0_scale(amax: Tensor, fp8: torch.dtype, dtype: torch.dtype) -> Tensor:
    """One over amax/largest rounded up to a power of two, which MXFP8 stores in 8 bits.

    Source: OCP Microscaling Formats v1.0 for the storage; Transformer Engine's cast kernel for rounding up, where the
    standard rounds down and saturates.
    """
    mantissa, exponent = torch.frexp(amax * torch.tensor(1 / torch.finfo(fp8).max))
    exponent = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(-127, 127)
    scale = torch.ldexp(torch.ones_like(amax), -exponent)
    # Zeros stay zeros whatever the scale; 1 spares them an exponent at the end of the range.
    return torch.where(amax == 0, 1.0, torch.where(amax.isfinite(), scale, torch.nan))


def quantize(tensor: Tensor, fp8: torch.dtype, rule: ScaleRule, block: tuple[int, int] | None = None) -> Quantized:
    """Quantizes with scales of the tensor's own largest values.

    Args:
        tensor: (rows, columns), floating point.
        fp8: The format.
        rule: How a scale follows from a block's largest absolute value.
        block: Rows and columns that share a scale; None: all.

    Returns:
        The FP8 tensor. A block with an infinity or NaN dequantizes to NaN.
    """
    rows, columns = tensor.shape
    block = block or (max(rows, 1), max(columns, 1))
    values = tensor.float()
    scale = rule(_block_amax(values, block), fp8, tensor.dtype)
    data = cast(values * _spread(scale, tensor.shape, block), fp8)
    return Quantized(data, torch.reciprocal(scale), block)


def cast(values: Tensor, fp8: torch.dtype) -> Tensor:
    """Rounds fp32 values to FP8: too large ones to the format's largest, infinities to NaN.

    torch's cast to e5m2 does not saturate, and its cast to e4m3 makes a finite number of an infinity.
    """
    largest = torch.finfo(fp8).max
    return torch.where(values.isfinite(), values.clamp(-largest, largest), torch.nan).to(fp8)


def _block_amax(values: Tensor, block: tuple[int, int]) -> Tensor:
    """(blocks of rows, blocks of columns) of largest absolute values; NaN where a block has one."""
    (rows, columns), (height, width) = values.shape, block
    padded = torch.nn.functional.pad(values.abs(), (0, -columns % width, 0, -rows % height))
    if padded.numel() == 0:
        return padded.new_zeros(padded.shape[0] // height, padded.shape[1] // width)
    return padded.view(padded.shape[0] // height, height, -1, width).amax(dim=(1, 3))


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Each element's scale, (rows, columns)."""
    if scale.numel() == 1:
        return scale.expand(shape)
    return scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


class Quantizer(Protocol):
    """Quantizes one operand of a linear, again and again."""

    def __call__(self, tensor: Tensor, *, training: bool) -> Pair:
        """What products see of a (rows, columns) tensor: the one that sums over columns, the one that sums over rows.

        Args:
            tensor: Floating point.
            training: Whether a backward pass will follow. Only then may a quantizer change its state.
        """


@dataclass
class TensorQuantizer:
    """One scale for the whole tensor, from its own largest value."""

    fp8: torch.dtype

    def __call__(self, tensor: Tensor, *, training: bool) -> Pair:
        """As for `Quantizer`."""
        values = quantize(tensor, self.fp8, current_scale).dequantize()
        return values, values


@dataclass
class BlockQuantizer:
    """One scale for each block."""

    fp8: torch.dtype
    rule: ScaleRule
    by_rows: tuple[int, int]
    by_columns: tuple[int, int]

    def __call__(self, tensor: Tensor, *, training: bool) -> Pair:
        """As for `Quantizer`."""
        rows = quantize(tensor, self.fp8, self.rule, self.by_rows).dequantize()
        if self.by_columns == self.by_rows:
            return rows, rows
        return rows, quantize(tensor, self.fp8, self.rule, self.by_columns).dequantize()


@dataclass
class DelayedQuantizer:
    """One scale for the whole tensor, from largest values of earlier steps.

    Args:
        fp8: The format.
        history_length: How many of them are kept.
        algorithm: Which of them counts.
        margin: The scale is divided by two to this power.

    Source: `_amax_and_scale_update` of Transformer Engine; there the largest values are those of all ranks of the
    tensor- and data-parallel groups, here this rank's.
    """

    fp8: torch.dtype
    history_length: int = 1
    algorithm: Literal["most_recent", "max"] = "most_recent"
    margin: int = 0
    scale: float = 1.0
    history: list[float] = field(default_factory=list)

    def __call__(self, tensor: Tensor, *, training: bool) -> Pair:
        """As for `Quantizer`: quantizes with the scale so far, and then brings it up to date."""
        scale = torch.tensor(self.scale)
        values = cast(tensor.float() * scale, self.fp8).float() * torch.reciprocal(scale)
        if training:
            self._update(tensor.abs().amax().item() if tensor.numel() else 0.0)
        return values, values

    def _update(self, amax: float) -> None:
        self.history = [amax, *self.history][: self.history_length]
        # torch's maximum, unlike Python's, keeps a NaN.
        recent = torch.tensor(self.history).amax() if self.algorithm == "max" else torch.tensor(amax)
        # A step without tokens, or with an overflow, says nothing about the next one.
        if recent > 0 and recent.isfinite():
            scale = (torch.finfo(self.fp8).max / recent) / 2**self.margin
            self.scale = scale.clamp(max=torch.finfo(torch.float32).max).item()
