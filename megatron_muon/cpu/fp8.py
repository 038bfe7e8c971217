"""Experts in emulated FP8: the recipes of `--muon-moe-fp8` on a CPU, without Transformer Engine.

The operands of an expert's three products (forward, and backward towards input and weight) are rounded to FP8 and
scaled back, and multiplied in fp32; gradients go straight through the rounding. So a run shows what the rounding does
to training. It shows nothing of FP8's speed or memory, nor of the order in which a GPU sums.

torchao's emulation (0.18, `Float8LinearConfig(emulate=True)`) is not used: it replaces `nn.Linear`, which Megatron's
parallel linears are not, it has neither delayed scaling nor 128 x 128 blocks, and its scales have another floor.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from .quantizers import (
    E4M3,
    E5M2,
    BlockQuantizer,
    DelayedQuantizer,
    Quantizer,
    TensorQuantizer,
    e8m0_scale,
    power_of_two_scale,
)


class LinearQuantizers:
    """The quantizers of a linear's operands, and their state.

    Args:
        recipe: delayed, tensorwise, blockwise or mxfp8.
        fp8_format: hybrid has gradients in e5m2, e4m3 has all in e4m3.
        config: Megatron's TransformerConfig, for delayed scaling's settings.

    Raises:
        ValueError: If the recipe is unknown.
    """

    def __init__(self, recipe: str, fp8_format: str, config: Any) -> None:
        backward = E5M2 if fp8_format == "hybrid" else E4M3
        make = _MAKERS.get(recipe)
        if make is None:
            raise ValueError(f"recipe: got {recipe!r}, expected one of {', '.join(_MAKERS)}; correct it")
        self.recipe = recipe
        self.input: Quantizer = make(E4M3, False, config)
        self.weight: Quantizer = make(E4M3, True, config)
        self.gradient: Quantizer = make(backward, False, config)


def _delayed(fp8: torch.dtype, is_weight: bool, config: Any) -> Quantizer:
    return DelayedQuantizer(fp8, config.fp8_amax_history_len, config.fp8_amax_compute_algo, config.fp8_margin)


def _tensorwise(fp8: torch.dtype, is_weight: bool, config: Any) -> Quantizer:
    return TensorQuantizer(fp8)


def _blockwise(fp8: torch.dtype, is_weight: bool, config: Any) -> Quantizer:
    by_rows, by_columns = ((128, 128), (128, 128)) if is_weight else ((1, 128), (128, 1))
    return BlockQuantizer(fp8, power_of_two_scale, by_rows, by_columns)


def _mxfp8(fp8: torch.dtype, is_weight: bool, config: Any) -> Quantizer:
    return BlockQuantizer(fp8, e8m0_scale, (1, 32), (32, 1))


_MAKERS = {"delayed": _delayed, "tensorwise": _tensorwise, "blockwise": _blockwise, "mxfp8": _mxfp8}


class _Product(torch.autograd.Function):
    """input @ weight.T, and its two backward products, of quantized operands."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, quantizers: LinearQuantizers, training: bool) -> Tensor:
        rows, columns = quantizers.input(input.reshape(-1, input.shape[-1]), training=training)
        weight_rows, weight_columns = quantizers.weight(weight, training=training)
        ctx.save_for_backward(columns, weight_columns)
        ctx.quantizers, ctx.shape, ctx.dtypes = quantizers, input.shape, (input.dtype, weight.dtype)
        return (rows @ weight_rows.t()).to(input.dtype).view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        columns, weight_columns = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        gradient_rows, gradient_columns = ctx.quantizers.gradient(gradient, training=True)
        to_input = (gradient_rows @ weight_columns).to(ctx.dtypes[0]).view(ctx.shape)
        to_weight = (gradient_columns.t() @ columns).to(ctx.dtypes[1])
        return to_input, to_weight, None, None


def _forward_impl(
    quantizers: LinearQuantizers,
    *,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sequence_parallel: bool,
    tp_group: Any,
    **others: Any,
) -> Tensor:
    """Megatron's `_forward_impl` of a parallel linear: the product, and the communication within it.

    Input gradients are not summed over tensor-parallel ranks here: experts train with sequence parallelism, or
    Megatron refuses them.
    """
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    # Asked here, since a Function's forward pass itself runs without gradients.
    output: Tensor = _Product.apply(input, weight, quantizers, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return output if bias is None else output + bias


def emulate_fp8(model: nn.Module, recipe: str, fp8_format: str) -> list[str]:
    """Makes the linears of a model's routed and shared experts compute in emulated FP8. Mutates the model.

    The state of delayed scaling begins anew and is in no checkpoint.

    Args:
        model: A model chunk of Megatron's local layers, or what wraps one.
        recipe: delayed, tensorwise, blockwise or mxfp8.
        fp8_format: hybrid or e4m3.

    Returns:
        The names of these linears; none where the chunk has no experts.

    Raises:
        ValueError: If the recipe is unknown.
    """
    emulated = []
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        for part in ("experts", "shared_experts"):
            experts = getattr(layer, part, None)
            for name, linear in experts.named_modules() if experts is not None else ():
                if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
                    quantizers = LinearQuantizers(recipe, fp8_format, linear.config)
                    linear._forward_impl = functools.partial(_forward_impl, quantizers)
                    emulated.append(f"{layer_name}.{part}.{name}")
    return emulated
