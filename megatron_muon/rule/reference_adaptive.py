"""NorMuon, AdaMuon and their like on whole matrices in one process; the oracle beside `reference`, for reading as well.

As there, a parameter is one 2-D tensor and its logical matrices are rows (and columns) of it. AdaMuon's sum of squares
is taken of rounded numbers, as `adaptive` takes it, so that a distributed run can be compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_muon.config import TORCH_DTYPES, MuonConfig, scale_factor
from megatron_muon.rule.adaptive import square_bits
from megatron_muon.rule.reference import Logical, ReferenceMuon
from megatron_muon.rule.stochastic_rounding import random_bits, stochastic_bf16, stream


def rounded_sum_of_squares(x: Tensor, bits: int) -> Tensor:
    """Of all fp32 numbers, each square with `bits` binary digits after the point; in float64."""
    return (x.double() ** 2 * 2.0**bits).round().sum() / 2.0**bits


class ReferenceVariants(ReferenceMuon):
    """`ReferenceMuon` with every other setting of `MuonConfig` that changes the update.

    Args: as for `ReferenceMuon`. Momentum in bf16 takes its random bits from a parameter's name and the place of an
    element in its logical matrices, one after the other.
    """

    def __init__(
        self, parameters: dict[str, Tensor], logical: Mapping[str, Sequence[Logical]], config: MuonConfig
    ) -> None:
        super().__init__(parameters, logical, config)
        self.second_moments: dict[tuple[str, int], Tensor] = {}
        self.steps = 0

    def places(self, name: str) -> Sequence[Logical]:
        """Where each logical matrix of a parameter is."""
        return self.logical.get(name, [list(range(len(self.parameters[name])))])

    def direction(self, name: str, gradient: Tensor) -> Tensor:
        """Advances the momentum of `name` and returns what is orthogonalized."""
        mu = self.config.momentum
        gain = 1.0 if self.config.momentum_form == "heavy_ball" else 1.0 - mu
        m = self.momenta[name].mul(mu).add_(gradient * gain)
        self.momenta[name] = m.clone()
        if self.config.momentum_dtype == "bf16":
            numbers = torch.empty(m.shape, dtype=torch.int64)
            rows = [place[0] if isinstance(place, tuple) else place for place in self.places(name)]
            # Logical matrices that lie beside each other have the same rows, which are numbered once.
            order = list(dict.fromkeys(row for some in rows for row in some))
            numbers[order] = torch.arange(m.numel()).view(m.shape)
            bits = random_bits(numbers, stream(name, self.steps))
            self.momenta[name] = stochastic_bf16(m, bits).float()
        u = m.mul(mu).add_(gradient * gain) if self.config.nesterov else m
        return u.sign() if self.config.variant == "adamuon" else u

    def update(self, name: str, direction: Tensor) -> Tensor:
        """The scaled orthogonalized direction, divided by the root of its mean squares, before lr."""
        if self.config.variant == "muon":
            return super().update(name, direction)
        wire = TORCH_DTYPES[self.config.exchange_dtype]
        # `ReferenceMuon.update` scales nothing for the variants. NorMuon divides before the update is sent.
        is_normuon = self.config.variant == "normuon"
        update = self.orthogonalized(name, direction.to(wire).float())
        update = update if is_normuon else update.to(wire).float()
        for number, place in enumerate(self.places(name)):
            update[place] = self.divided(update[place], (name, number))
        return update.to(wire).float() if is_normuon else update

    def divided(self, o: Tensor, key: tuple[str, int]) -> Tensor:
        """The update of one logical matrix from the orthogonalized one."""
        beta2, eps = self.config.beta2, self.config.second_moment_eps
        factor = scale_factor(o.shape[0], o.shape[1], self.config)
        if self.config.variant == "adamuon":
            v = self.second_moments.setdefault(key, torch.zeros_like(o))
            v.mul_(beta2).add_(o * o * (1.0 - beta2))
            scaled = o / (v.sqrt() + eps)
            norm = rounded_sum_of_squares(scaled, square_bits(o.numel(), beta2))
            return scaled * ((min(o.shape) / norm).sqrt() * factor).float() if norm > 0 else scaled * 0.0
        # The mean is taken along the short side.
        dim = 1 if o.shape[0] >= o.shape[1] else 0
        mean = torch.linalg.vector_norm(o.contiguous(), dim=dim, keepdim=True) ** 2 / o.shape[dim]
        v = self.second_moments.setdefault(key, torch.zeros_like(mean))
        v.mul_(beta2).add_(mean * (1.0 - beta2))
        v_safe = v.clamp(min=eps)
        # The squares of a line divided by a number add up to its mean over that number, times the length of the line.
        before, after = mean.double().sum(), (mean / v_safe).double().sum()
        gain = ((before / after).sqrt() * factor).float() if after > 0 else torch.zeros(())
        return o * (gain / v_safe.sqrt())

    def step(self, gradients: dict[str, Tensor], *, lr: float, weight_decay: float) -> None:
        """One update of every parameter that has a gradient."""
        for name, gradient in gradients.items():
            update = self.update(name, self.direction(name, gradient))
            w = self.parameters[name]
            decayed = w * (1.0 - lr * weight_decay)
            if self.config.cautious_weight_decay:
                decayed = torch.where(w * update >= 0, decayed, w)
            w.copy_(decayed - update * lr)
        self.steps += 1
