"""NorMuon and AdaMuon: what divides the orthogonalized matrix, on slices of it.

Both keep running mean squares where the momentum is stored, AdaMuon's for each element, NorMuon's for each line of the
slice (a line is a row of the logical matrix, or a column if it is wider than high: the long side's members, so that a
band of a team has them whole). A line is on as many ranks as it is cut into, and all of them hold the same number.

Sums over a line or a matrix are taken of the slices' own elements, in whole numbers, so that neither their order nor
the cut changes a bit; one small all-reduce brings the ranks' shares together.

Sources: NorMuon: arXiv 2510.05491, in the form of emerging-optimizers' `AdaptiveMuon` (the side along which the mean is
taken, the preserved norm). AdaMuon: arXiv 2507.11005.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_muon.config import MuonConfig, scale_factor
from megatron_muon.matrices.slice_elements import LogicalMatrices, SliceElements, logical_matrices
from megatron_muon.matrices.spec import MatrixSpec

# Binary digits after the point in sums of squares along a line, each below 4: its length is at most a singular value.
LINE_BITS = 40
_SUM_BITS = 62


def norm_bits(numel: int, beta2: float) -> int:
    """Binary digits after the point in the sum of a divided matrix's squares, which is below numel/(1 - beta2).

    The running mean square v holds at least (1 - beta2) of the newest one, so that o^2/v is below 1/(1 - beta2) for an
    element, and below `cols`/(1 - beta2) for a line of `cols` elements.
    """
    return min(LINE_BITS, _SUM_BITS - math.ceil(math.log2(numel / (1.0 - beta2))) - 1)


def whole_squares(x: Tensor, bits: int) -> Tensor:
    """Squares with `bits` digits after the point, as whole numbers. x: fp32; int64 of its shape is returned."""
    return x.double().square_().mul_(2.0**bits).round_().to(torch.int64)


AllReduce = Callable[[Tensor], None]
"""Sums an int64 tensor over the ranks, in place."""


@dataclass(frozen=True)
class Piece:
    """This rank's part of one matrix parameter in a round.

    Attributes:
        elements: Of its slice.
        update: The orthogonalized direction; becomes the update.
        second_moment: The running mean squares; mutated.
        counts: Whether this rank's elements enter the sums: of several copies of a parameter, one's do.
    """

    elements: SliceElements
    update: Tensor
    second_moment: Tensor
    counts: bool


def second_moment_numel(elements: SliceElements, config: MuonConfig) -> int:
    """How many running mean squares a slice keeps."""
    return elements.numel if config.variant == "adamuon" else len(elements.touched_lines)


def divide(
    specs: Mapping[int, MatrixSpec],
    pieces: Mapping[int, Piece],
    config: MuonConfig,
    device: torch.device,
    all_reduce: AllReduce,
) -> None:
    """Turns the orthogonalized directions of a round into updates.

    Collective: every rank calls it with the same `specs`, also with no pieces. AdaMuon issues one all-reduce, NorMuon
    two.

    Args:
        specs: All matrices of the round, by number.
        pieces: This rank's, by number.
        config: The variant and its settings.
        device: Where the ranks' sums are kept.
        all_reduce: Sums over the ranks.
    """
    layout = {index: logical_matrices(spec) for index, spec in specs.items()}
    before: Tensor | None = None
    if config.variant == "normuon":
        lines = _Sums(layout, [m.first_line[-1] for m in layout.values()], device)
        for index, piece in pieces.items():
            if piece.counts:
                for chunk in piece.elements.chunks():
                    lines.add(index, piece.elements.lines(chunk), whole_squares(piece.update[chunk], LINE_BITS))
        all_reduce(lines.total)
        for index, piece in pieces.items():
            _divide_lines(piece, lines.of(index), layout[index], config)
        before = torch.cat([_by_matrix(lines.of(index), matrices) for index, matrices in layout.items()])
    else:
        for piece in pieces.values():
            _divide_elements(piece, config)
    norms = _Sums(layout, [len(m.shapes) for m in layout.values()], device)
    bits = {i: [norm_bits(rows * cols, config.beta2) for rows, cols in m.shapes] for i, m in layout.items()}
    for index, piece in pieces.items():
        if piece.counts:
            power = torch.tensor([2.0**b for b in bits[index]], dtype=torch.float64, device=device)
            for chunk in piece.elements.chunks():
                number = piece.elements.matrices(chunk)
                squares = piece.update[chunk].double().square_().mul_(power[number]).round_()
                norms.add(index, number, squares.to(torch.int64))
    all_reduce(norms.total)
    scales = _scales(norms, before, layout, bits, config)
    for index, piece in pieces.items():
        for chunk in piece.elements.chunks():
            piece.update[chunk].mul_(scales[index][piece.elements.matrices(chunk)])


class _Sums:
    """Whole-number sums for each line or each logical matrix of a round, one tensor for all parameters."""

    def __init__(self, layout: Mapping[int, LogicalMatrices], sizes: list[int], device: torch.device) -> None:
        starts = [*accumulate(sizes, initial=0)]
        self._range = {index: slice(*starts[at : at + 2]) for at, index in enumerate(layout)}
        self.total = torch.zeros(starts[-1], dtype=torch.int64, device=device)

    def of(self, index: int) -> Tensor:
        return self.total[self._range[index]]

    def add(self, index: int, numbers: Tensor, values: Tensor) -> None:
        self.of(index).index_add_(0, numbers, values)


def _by_matrix(lines: Tensor, matrices: LogicalMatrices) -> Tensor:
    return torch.stack([lines[a:b].sum() for a, b in zip(matrices.first_line, matrices.first_line[1:])])


def _divide_lines(piece: Piece, sums: Tensor, matrices: LogicalMatrices, config: MuonConfig) -> None:
    """Advances the mean squares of the piece's lines and divides by their roots."""
    length = torch.cat([torch.full((max(shape),), min(shape)) for shape in matrices.shapes]).to(sums.device)
    mean = (sums.double() / 2.0**LINE_BITS / length).float()
    touched = piece.elements.touched_lines
    piece.second_moment.mul_(config.beta2).add_(mean[touched].mul_(1.0 - config.beta2))
    roots = torch.ones_like(mean)
    roots[touched] = piece.second_moment.clamp(min=config.second_moment_eps).sqrt_()
    for chunk in piece.elements.chunks():
        piece.update[chunk].div_(roots[piece.elements.lines(chunk)])


def _divide_elements(piece: Piece, config: MuonConfig) -> None:
    """Advances the mean squares of the piece's elements and divides by their roots."""
    squares = piece.update.square().mul_(1.0 - config.beta2)
    piece.second_moment.mul_(config.beta2).add_(squares)
    piece.update.div_(torch.sqrt(piece.second_moment, out=squares).add_(config.second_moment_eps))


def _scales(
    norms: _Sums,
    before: Tensor | None,
    layout: Mapping[int, LogicalMatrices],
    bits: Mapping[int, list[int]],
    config: MuonConfig,
) -> dict[int, Tensor]:
    """For each parameter, the fp32 factor of each of its logical matrices.

    NorMuon keeps the norm that the matrix had before; AdaMuon gives it that of an orthogonal one. Then as for Muon.
    """
    out = {}
    at = 0
    for index, matrices in layout.items():
        count = len(matrices.shapes)
        device = norms.total.device
        table = torch.tensor(
            [
                (2.0 ** bits[index][i], scale_factor(*shape, config), min(shape))
                for i, shape in enumerate(matrices.shapes)
            ],
            dtype=torch.float64,
            device=device,
        )
        digits, factor, orthogonal = table.unbind(dim=1)
        norm = norms.of(index).double() / digits
        wanted = orthogonal if before is None else before[at : at + count].double() / 2.0**LINE_BITS
        # A zero matrix stays zero.
        scale = torch.where(norm > 0, (wanted / norm).sqrt() * factor, torch.zeros_like(norm))
        out[index] = scale.float()
        at += count
    return out
