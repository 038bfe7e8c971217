"""Stand-ins for Megatron modules that need kernels this machine lacks: their classes and weights, and no forward."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.moe.experts import TEGroupedMLP
from torch import Tensor, nn


def weight(*shape: int, like: Any = None, **attributes: Any) -> nn.Parameter:
    """A parameter with Megatron's attributes, given or taken from another."""
    parameter = nn.Parameter(torch.zeros(shape))
    for name in ("allreduce", "tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(like, name):
            attributes.setdefault(name, getattr(like, name))
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


class Weights(nn.Module):
    """A linear module's weights."""

    def __init__(self, **parameters: nn.Parameter) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


class GroupedExperts(TEGroupedMLP):  # type: ignore[misc]
    """TEGroupedMLP's weights: one for each expert, or a stack of all (`moe_single_grouped_weight`)."""

    def __init__(self, experts: Any, single: bool) -> None:
        nn.Module.__init__(self)
        self.config, self.ep_group = experts.config, experts.ep_group
        self.num_local_experts = len(experts.local_experts)
        for name in ("linear_fc1", "linear_fc2"):
            like: Tensor = getattr(experts.local_experts[0], name).weight
            count = self.num_local_experts
            weights = (
                {"weight": weight(count, *like.shape, like=like)}
                if single
                else {f"weight{i}": weight(*like.shape, like=like) for i in range(count)}
            )
            setattr(self, name, Weights(**weights))


class Mixer(MambaMixer):  # type: ignore[misc]
    """A Mamba mixer's weights; `sizes`: rows of z, x, B, C and dt in the whole of `in_proj`."""

    def __init__(self, hidden: int, sizes: dict[str, int], tp: int) -> None:
        nn.Module.__init__(self)
        split = dict(tensor_model_parallel=True, partition_stride=1)
        inner = sizes["x"] // tp
        self.in_proj = Weights(weight=weight(sum(sizes.values()) // tp, hidden, partition_dim=0, **split))
        self.conv1d_weight = weight((sizes["x"] + sizes["B"] + sizes["C"]) // tp, 1, 4, partition_dim=0, **split)
        self.conv1d_bias = weight((sizes["x"] + sizes["B"] + sizes["C"]) // tp, partition_dim=0, **split)
        self.out_proj = Weights(weight=weight(hidden, inner, partition_dim=1, **split))


class Delta(GatedDeltaNet):  # type: ignore[misc]
    """A gated delta net's projections."""

    def __init__(self, hidden: int, tp: int) -> None:
        nn.Module.__init__(self)
        split = dict(tensor_model_parallel=True, partition_stride=1)
        self.in_proj = Weights(weight=weight(48 // tp, hidden, partition_dim=0, **split))
        self.out_proj = Weights(weight=weight(hidden, 24 // tp, partition_dim=1, **split))
