"""The oracle of the Newton-Schulz tests: U p(S) V^T from a float64 SVD, and how far rounding may lead from it.

The tolerance, `rounding_bound`, is a first-order error analysis of the standard iteration. What is compared with it
stays below 0.7 of it in float32 and 0.2 in 16 bits; a wrong coefficient, step or scale exceeds it by far.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_muon.newton_schulz import Schedule, scaling_for
from megatron_muon.newton_schulz.coefficients import AOL_SIGMA_MAX

UNIT_ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def matrix(spectrum: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A float64 matrix with the given singular values, up to a factor."""
    generator = torch.Generator().manual_seed(seed)
    m = min(rows, columns)
    left, right, gauss = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((rows, m), (columns, m), (rows, columns))
    )
    if spectrum == "gauss":
        return gauss
    index = torch.arange(1, m + 1, dtype=torch.float64)
    values = {"flat": index**0, "1/i": 1 / index, "i^-1.5": index**-1.5, "rank1": (index == 1).double()}[spectrum]
    return (torch.linalg.qr(left)[0] * values) @ torch.linalg.qr(right)[0].mT


def compose(schedule: Schedule, sigma: Tensor) -> Tensor:
    """The schedule's polynomial of each singular value."""
    for a, b, c in schedule:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def scaled(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """What the iteration starts from, in float64; x already rounded to dtype."""
    x = x / (x.norm() * (1 + max(1e-7, torch.finfo(dtype).eps)))
    if scaling_for(name) == "frobenius":
        return x
    wide = x if x.size(0) <= x.size(1) else x.mT
    wide = AOL_SIGMA_MAX * (wide @ wide.mT).abs().sum(dim=1, keepdim=True).rsqrt() * wide
    return wide if x.size(0) <= x.size(1) else wide.mT


def lipschitz(schedule: Schedule, low: float, high: float) -> float:
    """Largest amplification of a perturbation: |p'| within a singular direction, |p(s)| / s across directions."""
    point = torch.logspace(math.log10(max(low, 1e-9)), math.log10(max(high, 1e-9)), 1000, dtype=torch.float64)
    value, slope = point, torch.ones_like(point)
    for a, b, c in schedule:
        slope = slope * (a + 3 * b * value**2 + 5 * c * value**4)
        value = a * value + b * value**3 + c * value**5
    return float(torch.maximum(slope.abs(), (value / point).abs()).max())


def rounding_bound(sigma: Tensor, schedule: Schedule, dtype: torch.dtype) -> float:
    """Frobenius norm of the error: each step's own rounding, amplified by the steps that follow it."""
    bound = float(sigma.norm()) * lipschitz(schedule, float(sigma.min()), float(sigma.max()))
    for index, (a, b, c) in enumerate(schedule):
        rounding = float((abs(a) * sigma + abs(b) * sigma**3 + abs(c) * sigma**5).norm())
        sigma = compose(schedule[index : index + 1], sigma)
        bound += rounding * lipschitz(schedule[index + 1 :], float(sigma.min()), float(sigma.max()))
    # The float64 oracle has itself the rounding of an SVD.
    return UNIT_ROUNDOFF[dtype] * bound * (4 if dtype == torch.float64 else 1)


def oracle(x: Tensor, schedule: Schedule, name: str) -> tuple[Tensor, float]:
    """U p(S) V^T of x in float64, and the tolerance of computing it in x.dtype."""
    u, s, vh = torch.linalg.svd(scaled(x.double(), x.dtype, name), full_matrices=False)
    return (u * compose(schedule, s)) @ vh, rounding_bound(s, schedule, x.dtype)
