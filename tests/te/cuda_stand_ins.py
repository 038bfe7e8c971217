"""CPU stand-ins for Transformer Engine's CUDA kernels: everything of TE that tests/te replaces, in one file.

`install()` puts the functions of `KERNELS` in the place of those of the same names in TE's own torch extension. TE's
tensor classes, quantizers, modules, optimizers and
`quantize_master_weights`, and all of Megatron-Core, run as they are; matrix products (forward, backward) do not.

| stand-in | what the kernel does |
|---|---|
| `create_empty_quantized_tensor` | allocates |
| `quantize`, `dequantize`, `fp8_transpose` | whole tensors |
| `compute_amax`, `fp8_block_scaling_*` | the fragment of a tensor that a rank stores |
| `multi_tensor_compute_scale_and_scale_inv` | maxima -> scales |
| `multi_tensor_scale`, `multi_tensor_scale_tensor`, `multi_tensor_l2norm` | copies and clips gradients, their norm |
| `multi_tensor_adam` | the update of TE's `FusedAdam` |

Roundings follow the kernels' sources (transformer_engine 2.20: common/recipe/recipe_common.cuh, common/util/ptx.cuh,
common/recipe/{current_scaling,fp8_block_scaling,mxfp8_scaling}.cu, common/multi_tensor/*.cu).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BLOCK, MX_BLOCK = 128, 32
_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_FLOAT_MAX = torch.finfo(torch.float32).max

Lists = Sequence[Sequence[Tensor]]


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values as bytes of an FP8 type, out-of-range values at its largest. Rounds to nearest, ties to even."""
    return values.clamp(-_MAX[dtype], _MAX[dtype]).to(dtype).view(torch.uint8)


def scale_from_amax(
    amax: Tensor, largest: float, power_of_two: bool, epsilon: float = 0.0, *, for_inf: float = _FLOAT_MAX
) -> Tensor:
    """The factor that takes `amax` to `largest`; 1 where there is nothing to scale (0 or inf).

    Args:
        amax: fp32, any shape.
        largest: Largest value of the FP8 type.
        power_of_two: Whether the factor is rounded down to a power of two.
        epsilon: Smallest amax that is told apart.
        for_inf: The factor where the quotient overflows, before it is rounded.
    """
    amax = amax.clamp_min(epsilon)
    scale = (largest / amax).clamp_max(for_inf)
    if power_of_two:
        # The kernel clears the mantissa.
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where((amax == 0) | amax.isinf(), torch.ones_like(scale), scale)


def e8m0_from_amax(amax: Tensor, largest: float) -> Tensor:
    """Biased exponents, as uint8, of the smallest powers of two that take `amax` to `largest` or below."""
    # By the reciprocal, as the kernel does.
    value = amax.float() * torch.tensor(1.0 / largest, dtype=torch.float32)
    bits = value.view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    # A value below the smallest normal number rounds up once it is above 2^-127, which is exponent 0.
    up = torch.where(exponent == 0, mantissa > 0x400000, (mantissa > 0) & (exponent != 0xFE))
    return torch.where(value == 0, torch.zeros_like(exponent), exponent + up.int()).to(torch.uint8)


def e8m0_value(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) in fp32."""
    return torch.exp2(exponent.double() - 127).float()


def blocks_of(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """Largest magnitude of each block of rows x cols, fp32; the last block of a line may be smaller."""
    height, width = matrix.shape
    padded = torch.nn.functional.pad(matrix.float().abs(), (0, -width % cols, 0, -height % rows))
    return padded.view(-(-height // rows), rows, -(-width // cols), cols).amax(dim=(1, 3))


def spread(per_block: Tensor, rows: int, cols: int, shape: tuple[int, int]) -> Tensor:
    """Each block's value at every element of a matrix of `shape`."""
    return per_block.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: shape[0], : shape[1]]


def _put(padded: Tensor, values: Tensor) -> None:
    """Writes values into the corner of a scale tensor, which TE pads for its matrix products."""
    padded.zero_()
    padded[: values.shape[0], : values.shape[1]] = values.to(padded.dtype)


# Whole tensors


def _create_empty_quantized_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_empty_quantized_tensor(
        quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
    ) -> Any:
        """TE's own on the CPU; for per-tensor scaling in Python, since TE's own asks the driver for the device."""
        from transformer_engine.pytorch.tensor import Float8CurrentScalingQuantizer, Float8Quantizer, Float8Tensor
        from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

        if not isinstance(quantizer, Float8CurrentScalingQuantizer | Float8Quantizer):
            return original(quantizer, shape, dtype, torch.device("cpu"), False)
        # One buffer serves both usages where the device multiplies every layout of FP8 matrices.
        both = is_non_tn_fp8_gemm_supported()
        data = torch.empty(shape, dtype=torch.uint8) if quantizer.rowwise_usage or both else None
        transposed = quantizer.columnwise_usage and not both
        return Float8Tensor(
            shape=shape,
            dtype=dtype,
            data=data,
            data_transpose=torch.empty((shape[-1], *shape[:-1]), dtype=torch.uint8) if transposed else None,
            fp8_scale_inv=torch.ones(1),
            fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
            device=torch.device("cpu"),
        )

    return create_empty_quantized_tensor


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Quantizes a tensor into `output`, or into a new one."""
    from transformer_engine.pytorch.tensor import (
        Float8BlockQuantizer,
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
        MXFP8Quantizer,
    )

    if noop is not None and noop.item():
        return output
    if output is None:
        output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=torch.device("cpu"))
    source = tensor.detach().float()
    dtype = torch_dtype(quantizer.dtype)
    match quantizer:
        case Float8Quantizer():
            _fill_per_tensor(output, source, quantizer.scale, dtype)
            if quantizer.amax.numel():
                # The kernel takes the maximum with what is there; the recipe zeroes it once a step.
                quantizer.amax.copy_(torch.maximum(quantizer.amax, source.abs().max()))
        case Float8CurrentScalingQuantizer():
            amax = source.abs().max().view(1)
            scale = scale_from_amax(amax, _MAX[dtype], quantizer.force_pow_2_scales, quantizer.amax_epsilon)
            _fill_per_tensor(output, source, scale, dtype)
        case Float8BlockQuantizer(block_scaling_dim=2):
            _fill_blockwise(output, source.view(-1, source.shape[-1]), quantizer, dtype)
        case MXFP8Quantizer(with_2d_quantization=False, optimize_for_gemm=False):
            _fill_mx(output, source.view(-1, source.shape[-1]), dtype)
        case _:
            raise NotImplementedError(f"no stand-in quantizes with {quantizer}")
    return output


def _fill_per_tensor(output: Any, source: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    data = saturated(source * scale, dtype)
    if output._data is not None:
        output._data.copy_(data.view(output._data.shape))
    if output._transpose is not None:
        output._transpose.copy_(data.view(-1, source.shape[-1]).t().reshape(output._transpose.shape))
        output._transpose_invalid = False
    output._scale_inv.copy_(scale.reciprocal().view(output._scale_inv.shape))


def _fill_blockwise(output: Any, source: Tensor, quantizer: Any, dtype: torch.dtype) -> None:
    # The kernel caps the factor at the largest value of the input's type.
    scale = scale_from_amax(
        blocks_of(source, BLOCK, BLOCK),
        _MAX[dtype],
        quantizer.force_pow_2_scales,
        quantizer.amax_epsilon,
        for_inf=torch.finfo(output.dtype).max,
    )
    data = saturated(source * spread(scale, BLOCK, BLOCK, tuple(source.shape)), dtype)
    if output._rowwise_data is not None:
        output._rowwise_data.copy_(data.view(output._rowwise_data.shape))
        _put(output._rowwise_scale_inv, scale.reciprocal())
    if output._columnwise_data is not None:
        output._columnwise_data.copy_(data.t().reshape(output._columnwise_data.shape))
        _put(output._columnwise_scale_inv, scale.reciprocal().t())


def _fill_mx(output: Any, source: Tensor, dtype: torch.dtype) -> None:
    sides = (("rowwise", 1, MX_BLOCK), ("columnwise", MX_BLOCK, 1))
    for side, rows, cols in sides:
        data, scale_inv = getattr(output, f"_{side}_data"), getattr(output, f"_{side}_scale_inv")
        if data is None:
            continue
        exponent = e8m0_from_amax(blocks_of(source, rows, cols), _MAX[dtype])
        factor = e8m0_value(254 - exponent.int())
        data.copy_(saturated(source * spread(factor, rows, cols, tuple(source.shape)), dtype).view(data.shape))
        _put(scale_inv, exponent)


def dequantize(tensor: Any, te_dtype: Any) -> Tensor:
    """Of MXFP8; TE's Python does the other kinds itself on a CPU."""
    rowwise = tensor._rowwise_data is not None
    data, scale = (
        (tensor._rowwise_data, tensor._rowwise_scale_inv)
        if rowwise
        else (tensor._columnwise_data, tensor._columnwise_scale_inv)
    )
    matrix = data.view(-1, data.shape[-1]).view(torch_dtype(tensor._fp8_dtype)).float()
    block = (1, MX_BLOCK) if rowwise else (MX_BLOCK, 1)
    out = matrix * spread(e8m0_value(scale), *block, tuple(matrix.shape))
    return out.view(data.shape).to(torch_dtype(te_dtype))


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """The bytes of a matrix, transposed; leading dimensions count as rows."""
    transposed = data.view(-1, data.shape[-1]).t()
    if out is None:
        return transposed.contiguous()
    out.copy_(transposed.reshape(out.shape))
    return out


# Fragments: the flat range [start, start + numel) of a matrix of height x width


def _places(fragment: Tensor, width: int, start: int) -> tuple[Tensor, Tensor]:
    """Row and column of each element."""
    flat = torch.arange(start, start + fragment.numel())
    return flat // width, flat % width


def _fold_maxima(fragment: Tensor, amax: Tensor, at: tuple[Tensor, Tensor]) -> None:
    amax.zero_()
    index = at[0] * amax.shape[1] + at[1]
    amax.view(-1).scatter_reduce_(0, index, fragment.reshape(-1).abs().to(amax.dtype), "amax")


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """Largest magnitude, into `amax`."""
    amax.copy_(tensor.abs().max())


def fp8_block_scaling_compute_partial_amax(
    fragment: Tensor, amax: Tensor, height: int, width: int, start: int, block: int
) -> None:
    """Largest magnitude in each block x block, as far as the fragment reaches."""
    row, col = _places(fragment, width, start)
    _fold_maxima(fragment, amax, (row // block, col // block))


def fp8_block_scaling_partial_cast(
    fragment: Tensor, out: Tensor, scale: Tensor, height: int, width: int, start: int, block: int, dtype: Any
) -> None:
    """The fragment's bytes, given each block's factor."""
    row, col = _places(fragment, width, start)
    out.copy_(saturated(fragment.float() * scale[row // block, col // block], torch_dtype(dtype)))


# Lists of tensors. `noop` is the kernels' overflow flag: what is found is set, what is set stops the kernel.


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: Tensor, lists: Lists, largest: float, power_of_two: bool, epsilon: float
) -> None:
    """Factors and their reciprocals, from maxima."""
    for amax, scale, scale_inv in zip(*lists, strict=True):
        scale.copy_(scale_from_amax(amax, largest, power_of_two, epsilon).view(scale.shape))
        scale_inv.copy_(scale.reciprocal().view(scale_inv.shape))


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Lists, factor: float) -> None:
    """Scaled copies; sets the flag if an input is inf or NaN."""
    for source, target in zip(*lists, strict=True):
        if not source.isfinite().all():
            noop.fill_(1)
        target.copy_(source.float() * factor)


def multi_tensor_scale_tensor(chunk: int, noop: Tensor, lists: Lists, factor: Tensor) -> None:
    """As `multi_tensor_scale`, with the factor in a tensor."""
    multi_tensor_scale(chunk, noop, lists, factor.item())


def multi_tensor_l2norm(chunk: int, noop: Tensor, lists: Lists, per_tensor: bool | None) -> tuple[Tensor, Tensor]:
    """Norm of all tensors together, and of each on request."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.empty(0)


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    decay: float,
) -> None:
    """AdamW, or Adam with an L2 penalty, on fp32 tensors in place. lists: gradients, parameters, both moments."""
    if noop.item():
        return
    correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        g = gradient.float() if decoupled else gradient.float() + decay * parameter
        mean.mul_(beta1).add_(g, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (mean / correction1) / ((square / correction2).sqrt() + epsilon)
        if decoupled:
            update = update + decay * parameter
        parameter.sub_(update, alpha=lr)


KERNELS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        quantize,
        dequantize,
        fp8_transpose,
        compute_amax,
        fp8_block_scaling_compute_partial_amax,
        fp8_block_scaling_partial_cast,
        multi_tensor_compute_scale_and_scale_inv,
        multi_tensor_scale,
        multi_tensor_scale_tensor,
        multi_tensor_l2norm,
        multi_tensor_adam,
    )
}


def torch_dtype(te_dtype: Any) -> torch.dtype:
    """torch's name of a type of TE."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[te_dtype]  # type: ignore[no-any-return]


def install() -> None:
    """Replaces TE's kernels in this process, also where modules of TE or Megatron hold them by name.

    Raises:
        RuntimeError: If a kernel is missing in the installed TE.
    """
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch as tex

    if tex.quantize is quantize:
        return
    missing = [name for name in KERNELS if not hasattr(tex, name)]
    if missing:
        raise RuntimeError(f"transformer_engine_torch has no {', '.join(missing)}; the stand-ins are for 2.20.2")
    empty = tex.create_empty_quantized_tensor
    stand_ins = {id(getattr(tex, name)): function for name, function in KERNELS.items()}
    stand_ins[id(empty)] = _create_empty_quantized_tensor(empty)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("transformer_engine", "transformer_engine_torch", "megatron"):
            for attribute, value in list(vars(module).items()):
                if id(value) in stand_ins:
                    setattr(module, attribute, stand_ins[id(value)])


@contextmanager
def modules_may_be_built() -> Iterator[None]:
    """TE's modules refuse to be built without a device. They only ask; the CPU backend makes their tensors on the CPU.

    Not for longer than that: torch.optim and DataLoader ask the same question and act on the answer.
    """
    with mock.patch("torch.cuda.is_available", lambda: True):
        yield
