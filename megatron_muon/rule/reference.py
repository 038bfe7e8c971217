"""Muon on whole matrices in one process: the oracle that tests compare the distributed optimizer with.

Written for reading, not for speed. It knows nothing of slices, plans or tensor-parallel layouts: a parameter is one
2-D tensor, and its logical matrices are lists of its row numbers, with a range of columns where these are not all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_muon.config import TORCH_DTYPES, MuonConfig, owner_factor
from megatron_muon.newton_schulz import coefficients, normalize, orthogonalize, scaling_for

Logical = list[int] | tuple[list[int], slice]


class ReferenceMuon:
    """The update of arXiv 2502.16982 on whole fp32 parameters.

    Args:
        parameters: Name -> (rows, cols) fp32 tensor; mutated by `step`.
        logical: Name -> rows (and columns) of each logical matrix; a name that is missing is one matrix.
        config: Settings; `exchange_dtype` rounds what a distributed run would send, also here.
    """

    def __init__(
        self, parameters: dict[str, Tensor], logical: Mapping[str, Sequence[Logical]], config: MuonConfig
    ) -> None:
        self.parameters = parameters
        self.logical = logical
        self.config = config
        self.momenta = {name: torch.zeros_like(w) for name, w in parameters.items()}

    def direction(self, name: str, gradient: Tensor) -> Tensor:
        """Advances the momentum of `name` and returns what is orthogonalized."""
        m = self.momenta[name]
        m.mul_(self.config.momentum).add_(gradient)
        return m.mul(self.config.momentum).add_(gradient) if self.config.nesterov else m.clone()

    def update(self, name: str, direction: Tensor) -> Tensor:
        """The scaled orthogonalized direction, before lr."""
        wire = TORCH_DTYPES[self.config.exchange_dtype]
        return self.orthogonalized(name, direction.to(wire).float()).to(wire).float()

    def orthogonalized(self, name: str, direction: Tensor) -> Tensor:
        """The scaled orthogonalized direction as its owner computes it."""
        schedule = coefficients(self.config.coefficients, self.config.ns_steps)
        update = torch.empty_like(direction)
        for place in self.logical.get(name, [list(range(len(direction)))]):
            matrix = direction[place]
            if self.config.ns_dtype == "fp16":
                matrix = normalize(matrix)
            matrix = matrix.to(TORCH_DTYPES[self.config.ns_dtype])
            orthogonal = orthogonalize(matrix, schedule, scaling=scaling_for(self.config.coefficients)).float()
            update[place] = orthogonal * owner_factor(matrix.shape[0], matrix.shape[1], self.config)
        return update

    def step(self, gradients: dict[str, Tensor], *, lr: float, weight_decay: float) -> None:
        """One update of every parameter that has a gradient."""
        for name, gradient in gradients.items():
            update = self.update(name, self.direction(name, gradient))
            w = self.parameters[name]
            w.mul_(1.0 - lr * weight_decay).sub_(update * lr)
