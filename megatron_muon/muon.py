"""Muon on plain tensors: no ranks, no groups. Each operation rounds once, so that slicing does not change a bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_muon.config import TORCH_DTYPES, MuonConfig, scale_factor
from megatron_muon.newton_schulz import coefficients, orthogonalize


def momentum_update(
    momenta: Sequence[Tensor], gradients: Sequence[Tensor], *, momentum: float, nesterov: bool
) -> list[Tensor]:
    """Advances the momentum buffers and returns what is to be orthogonalized.

    m = momentum*m + g, and u = g + momentum*m with Nesterov, else m.

    Args:
        momenta: Buffers of any shape; mutated.
        gradients: Of the same shapes and dtype; not mutated.

    Returns:
        One tensor per buffer. Without Nesterov these are the buffers themselves: read, do not write.
    """
    if not momenta:
        return []
    torch._foreach_mul_(list(momenta), momentum)
    torch._foreach_add_(list(momenta), list(gradients))
    if not nesterov:
        return list(momenta)
    directions = list(torch._foreach_mul(list(momenta), momentum))
    torch._foreach_add_(directions, list(gradients))
    return directions


def orthogonalized_updates(views: Sequence[Tensor], config: MuonConfig) -> None:
    """Replaces each logical matrix by its update: Newton-Schulz, then the scale of its own shape.

    Args:
        views: 4-D views (row outer, row inner, column outer, column inner) as `MatrixSpec.logical_views` returns
            them; mutated. Their dtype is kept; the iterations run in `config.ns_dtype`.
        config: Coefficients, steps, scale and whether matrices of equal shape are stacked.
    """
    schedule = coefficients(config.coefficients, config.ns_steps)
    dtype = TORCH_DTYPES[config.ns_dtype]
    by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for view in views:
        by_shape[view.shape[0] * view.shape[1], view.shape[2] * view.shape[3]].append(view)
    for (rows, cols), group in by_shape.items():
        factor = scale_factor(rows, cols, config)
        for stack in [group] if config.batched else [[view] for view in group]:
            matrices = [view.reshape(rows, cols).to(dtype) for view in stack]
            batch = torch.stack(matrices) if len(matrices) > 1 else matrices[0]
            # Scaled in fp32: in bf16 the factor would be rounded before it is applied.
            update = orthogonalize(batch, schedule).float().mul_(factor)
            for view, matrix in zip(stack, update if len(matrices) > 1 else [update], strict=True):
                view.copy_(matrix.view(view.shape))


def apply_updates(parameters: Sequence[Tensor], updates: Sequence[Tensor], *, lr: float, weight_decay: float) -> None:
    """w = w*(1 - lr*weight_decay) - lr*update.

    Args:
        parameters: Any shapes; mutated.
        updates: The same shapes and dtype; mutated (scratch).
    """
    if not parameters:
        return
    if weight_decay != 0.0:
        torch._foreach_mul_(list(parameters), 1.0 - lr * weight_decay)
    torch._foreach_mul_(list(updates), lr)
    torch._foreach_sub_(list(parameters), list(updates))
