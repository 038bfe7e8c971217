"""Muon on plain tensors: no ranks, no groups. Each operation rounds once, so that slicing does not change a bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_muon.config import TORCH_DTYPES, MuonConfig, gradient_gain, owner_factor
from megatron_muon.newton_schulz import BackendName, coefficients, load_backend, normalize, orthogonalize, scaling_for
from megatron_muon.newton_schulz.backends import Orthogonalize
from megatron_muon.rule.adaptive import advance_line_moments, line_factors, line_means, multiply_lines

# 32 MiB in bf16, a few experts' matrices: enough to fill a device, while Newton-Schulz needs about three times a stack.
_STACK_NUMEL = 2**24


def muon_update(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    config: MuonConfig,
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """One step of Muon on logical matrices that one process holds: the rule, which a run spreads over its ranks.

    A rank of a run does the first and the third line on the slices that it stores, and the second on the matrices that
    it owns. The exchange between them rounds to `exchange_dtype`; here nothing is rounded.

    Args:
        weights: Matrices (rows, cols), fp32; mutated.
        gradients: The same shapes; not mutated.
        momenta: fp32 buffers of the same shapes; mutated.
        config: The settings; of the variants, `muon` alone.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.

    Source: arXiv 2502.16982, section 2; its scale is `config.scale_factor`.
    """
    updates = [torch.empty_like(w) for w in weights]
    momentum_update(
        list(momenta),
        list(gradients),
        updates,
        momentum=config.momentum,
        nesterov=config.nesterov,
        gain=gradient_gain(config),
    )
    orthogonalized_updates(updates, config)
    apply_updates(list(weights), updates, lr=lr, weight_decay=weight_decay, cautious=config.cautious_weight_decay)


def momentum_update(
    momenta: list[Tensor],
    gradients: list[Tensor],
    out: list[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    gain: float = 1.0,
    store: Callable[[list[Tensor]], None] | None = None,
) -> None:
    """Advances the momentum buffers and writes what is to be orthogonalized to `out`.

    m = momentum*m + gain*g, and out = gain*g + momentum*m with Nesterov, else m.

    Args:
        momenta: Buffers of any shape; mutated, unless with `store`.
        gradients: The same shapes; not mutated.
        out: The same shapes, fp32; mutated.
        momentum: Decay.
        nesterov: Whether to look ahead.
        gain: 1 for heavy ball, 1 - momentum for an exponential moving average.
        store: For buffers of fewer bits: called with m in fp32, which it rounds and keeps. `out` follows from m before
            that rounding.
    """
    if not momenta:
        return
    if gain != 1.0:
        gradients = list(torch._foreach_mul([g.float() for g in gradients], gain))
    current = momenta if store is None else out
    if store is not None:
        torch._foreach_copy_(current, momenta)
    torch._foreach_mul_(current, momentum)
    torch._foreach_add_(current, gradients)
    if store is not None:
        store(current)
    else:
        torch._foreach_copy_(out, current)
    if nesterov:
        torch._foreach_mul_(out, momentum)
        torch._foreach_add_(out, gradients)


def in_ns_dtype(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix in the dtype of the Newton-Schulz iterations. fp16 has the range of no gradient: normalized before."""
    return normalize(matrix.float()).to(dtype) if dtype == torch.float16 else matrix.to(dtype)


@lru_cache(maxsize=8)
def _backend(name: BackendName, device_type: str) -> Orthogonalize:
    """A back end of another package, which keeps closures from call to call."""
    return load_backend(name, device_type)


class Stack(NamedTuple):
    """Logical matrices that are orthogonalized at once.

    Attributes:
        matrices: (count, rows, cols), or (rows, cols) for a single one, since a batch of one may run another kernel.
        line_moments: NorMuon's running mean squares, (count, lines) or (lines,); None otherwise.
    """

    matrices: Tensor
    line_moments: Tensor | None = None


def bounded_stacks(
    stacks: Sequence[Tensor], config: MuonConfig, line_moments: Sequence[Tensor] | None = None
) -> list[Stack]:
    """Cuts stacks into those that are orthogonalized at once: of at most 2**24 elements, or of one matrix.

    Args:
        stacks: Matrices (rows, cols), or several of one shape (count, rows, cols), of any strides.
        config: Whether matrices run together at all.
        line_moments: (count, lines) for each stack, if there are any.

    Returns:
        Views.
    """
    out = []
    for number, stack in enumerate(stacks):
        size = max(1, _STACK_NUMEL // stack.shape[-2:].numel()) if config.batched else 1
        moments = line_moments[number] if line_moments is not None else None
        if stack.dim() == 2:
            out.append(Stack(stack, moments))
            continue
        for at in range(0, len(stack), size):
            where: Any = slice(at, at + size) if min(at + size, len(stack)) - at > 1 else at
            out.append(Stack(stack[where], moments[where] if moments is not None else None))
    return out


def orthogonalized_update(stack: Stack, config: MuonConfig) -> None:
    """Replaces each logical matrix by its update: Newton-Schulz, then the scale of its own shape.

    NorMuon divides lines by the roots of their running mean squares in between.

    Args:
        stack: One of `bounded_stacks`; mutated. The matrices' dtype is kept; the iterations run in `config.ns_dtype`.
        config: Coefficients, steps, back end, variant and scale.
    """
    matrices = stack.matrices
    schedule, scaling = coefficients(config.coefficients, config.ns_steps), scaling_for(config.coefficients)
    run = orthogonalize if config.ns_backend == "torch" else _backend(config.ns_backend, matrices.device.type)
    rows, cols = matrices.shape[-2:]
    narrow = in_ns_dtype(matrices, TORCH_DTYPES[config.ns_dtype])
    update = run(narrow, schedule, iteration=config.ns_method, scaling=scaling)
    if stack.line_moments is not None:
        sums = advance_line_moments(stack.line_moments, line_means(update), config)
        multiply_lines(update, line_factors(stack.line_moments, sums, (rows, cols), config), matrices)
    elif update.dtype == matrices.dtype:
        # The factor is a number and not a tensor, so that it is not rounded to bf16 before it is applied.
        torch.mul(update, owner_factor(rows, cols, config), out=matrices)
    else:
        matrices.copy_(update.float().mul_(owner_factor(rows, cols, config)))


def orthogonalized_updates(stacks: Sequence[Tensor], config: MuonConfig) -> None:
    """`orthogonalized_update` of everything in `stacks`, see `bounded_stacks`."""
    for stack in bounded_stacks(stacks, config):
        orthogonalized_update(stack, config)


def apply_updates(
    parameters: list[Tensor],
    updates: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    cautious: bool = False,
) -> None:
    """w = w*(1 - lr*weight_decay) - lr*update; with `cautious`, only those w decay for which update*w >= 0.

    Args:
        parameters: Any shapes; mutated.
        updates: The same shapes and dtype; mutated (scratch).
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        cautious: Source: arXiv 2510.12402.
    """
    if not parameters:
        return
    if weight_decay != 0.0:
        if cautious:
            for w, update in zip(parameters, updates, strict=True):
                w.copy_(torch.where(w * update >= 0, w * (1.0 - lr * weight_decay), w))
        else:
            torch._foreach_mul_(parameters, 1.0 - lr * weight_decay)
    torch._foreach_mul_(updates, lr)
    torch._foreach_sub_(parameters, updates)
