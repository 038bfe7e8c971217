"""NorMuon and AdaMuon: what divides the orthogonalized matrix.

NorMuon keeps a running mean square for each line: a row of the logical matrix, or a column if it is wider than high, so
that a band of a team has its lines whole. The matrix's owner updates them, where whole lines lie. AdaMuon keeps one for
each element, where the momentum is stored; only the norm of the divided matrix takes a sum over the ranks.

Sources: NorMuon: arXiv 2510.05491, in the form of emerging-optimizers' `AdaptiveMuon` (the side along which the mean is
taken, the preserved norm). AdaMuon: arXiv 2507.11005.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_muon.config import MuonConfig, scale_factor
from megatron_muon.matrices.slice_elements import SliceElements

# Below this, sums of whole numbers in float64 are exact.
_EXACT_BITS = 53


def second_moment_numel(elements: SliceElements, config: MuonConfig) -> int:
    """How many running mean squares a slice keeps."""
    return elements.numel if config.variant == "adamuon" else len(elements.touched_lines)


def line_means(orthogonal: Tensor) -> Tensor:
    """The mean square of each line of (..., rows, cols), in float32: (..., lines)."""
    rows, cols = orthogonal.shape[-2:]
    # The norm, since it needs no squares in memory.
    norms: Tensor = torch.linalg.vector_norm(orthogonal, dim=-1 if rows >= cols else -2, dtype=torch.float32)
    return norms.square_().div_(min(rows, cols))


def advance_line_moments(moments: Tensor, means: Tensor, config: MuonConfig) -> Tensor:
    """v = beta2*v + (1 - beta2)*mean for each line.

    Args:
        moments: (..., lines), float32; mutated.
        means: `line_means` of the orthogonalized matrices.
        config: `beta2` and `second_moment_eps`.

    Returns:
        (..., 2): the sums over lines of `means` and of `means`/v, float64. From all lines of a matrix follows its norm
        before and after division.
    """
    moments.mul_(config.beta2).add_(means * (1.0 - config.beta2))
    divided = means / moments.clamp(min=config.second_moment_eps)
    return torch.stack([means, divided], dim=-1).sum(dim=-2, dtype=torch.float64)


def line_factors(moments: Tensor, sums: Tensor, shape: tuple[int, int], config: MuonConfig) -> Tensor:
    """What each line is multiplied by: it is divided by the root of v, the matrix keeps its norm and is scaled.

    Args:
        moments: v, (..., lines).
        sums: (..., 2) as from `advance_line_moments`, over all lines of each matrix.
        shape: (rows, cols) of the logical matrix.
        config: The scale.

    Returns:
        (..., lines), float32; zero for a matrix of zeros.
    """
    before, after = sums.unbind(dim=-1)
    gain = torch.where(after > 0, (before / after).sqrt() * scale_factor(*shape, config), torch.zeros_like(after))
    return gain.float()[..., None] / moments.clamp(min=config.second_moment_eps).sqrt()


def multiply_lines(orthogonal: Tensor, factors: Tensor, out: Tensor) -> None:
    """Writes each line of (..., rows, cols) times its factor to `out`, computed in float32 and rounded once."""
    rows, cols = orthogonal.shape[-2:]
    torch.mul(orthogonal, factors[..., :, None] if rows >= cols else factors[..., None, :], out=out)


def divide_elements(updates: Sequence[Tensor], moments: Sequence[Tensor], config: MuonConfig) -> None:
    """AdaMuon: advances the mean squares of elements, v = beta2*v + (1 - beta2)*u^2, and divides by their roots.

    Args:
        updates: u, float32; becomes u / (sqrt(v) + eps).
        moments: v, of the same shapes; mutated.
        config: `beta2` and `second_moment_eps`.
    """
    for update, moment in zip(updates, moments, strict=True):
        squares = update.square().mul_(1.0 - config.beta2)
        moment.mul_(config.beta2).add_(squares)
        update.div_(torch.sqrt(moment, out=squares).add_(config.second_moment_eps))


def square_bits(numel: int, beta2: float) -> int:
    """Binary digits after the point of the squares that `square_sum` adds, for a matrix of `numel` elements.

    v holds at least (1 - beta2) of the newest square, so that a square of u/sqrt(v) is below 1/(1 - beta2), and a sum
    of them below numel/(1 - beta2).
    """
    return _EXACT_BITS - 1 - math.ceil(math.log2(numel / (1.0 - beta2)))


def square_sum(values: Sequence[Tensor], bits: int, like: Tensor) -> Tensor:
    """The sum of the squares of all elements, each rounded to `bits` binary digits after the point.

    These are whole numbers of 2^-bits, few enough to be added exactly in float64: neither the order of the sum nor how
    a matrix is cut into slices changes a bit.

    Args:
        values: Parts of one divided matrix, float32.
        bits: From `square_bits` of the whole matrix.
        like: Any tensor on the device of the result.

    Returns:
        A float64 scalar, in units of 2^-bits.
    """
    total = torch.zeros((), dtype=torch.float64, device=like.device)
    for part in values:
        total += part.double().square_().mul_(2.0**bits).round_().sum()
    return total


def rms_factor(sums: Tensor, bits: int, shape: tuple[int, int], config: MuonConfig) -> Tensor:
    """What AdaMuon multiplies a divided matrix by: it gets the norm of an orthogonal matrix and is scaled.

    Args:
        sums: `square_sum` of the whole matrix.
        bits: Its digits.
        shape: (rows, cols) of the logical matrix.
        config: The scale.

    Returns:
        A float32 scalar; zero for a matrix of zeros.
    """
    squared = sums / 2.0**bits
    factor = (min(shape) / squared).sqrt() * scale_factor(*shape, config)
    return torch.where(squared > 0, factor, torch.zeros_like(squared)).float()
