"""What one rank collects of a part: its shares, and where their elements lie in slices and in collected tensors.

A share is a range of rows or of columns of the part's joined matrix. A part with one logical matrix is shared as bands
along its long side, by a team that orthogonalizes them together. A part with several logical matrices is shared as
groups of whole ones, by ranks that need nothing of each other.

Storage is row-major, so that what a flat slice has of a share is contiguous in the share's own row-major order within
one tensor-parallel piece. On the wire it is one run; in the slice and in the collected tensor it is at most three
strips for every range of rows: the end of a row, whole rows, the beginning of a row.

An example: 6 x 8, stored as two flat slices, a of 20 elements and b of 28, and shared by two owners as columns:

    columns   0 1 2 3   4 5 6 7
    row 0     a a a a   a a a a     Slice a has 12 elements of the left share, positions 0 to 11 of it: one strip of 3
    row 1     a a a a   a a a a     rows, 4 wide and 8 apart in the slice, and one run in the owner's tensor of 6 x 4.
    row 2     a a a a   b b b b     It has 8 elements of the right share, positions 0 to 7: 2 rows, the first at the
    row 3     b b b b   b b b b     slice's element 4. Slice b has the rest of both, from positions 12 and 8 on.
    row 4     b b b b   b b b b
    row 5     b b b b   b b b b
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_muon.matrices.spec import MatrixSpec

if TYPE_CHECKING:
    from torch import Tensor

# Bands that are wide enough begin at multiples of 16 elements, as matrix units want it.
_ALIGNMENT = 16


@dataclass(frozen=True, order=True)
class Share:
    """Rows (dim 0) or columns (dim 1) [start, stop) of a part's joined matrix."""

    dim: int
    start: int
    stop: int


class Strip(NamedTuple):
    """`rows` runs of `width` elements each, `pitch` apart, the first at `offset` of a flat tensor."""

    offset: int
    rows: int
    width: int
    pitch: int

    @property
    def numel(self) -> int:
        return self.rows * self.width

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.width,) if self.rows == 1 else (self.rows, self.width)

    def view(self, flat: Tensor) -> Tensor:
        """The strip in a 1-D contiguous tensor, of its `shape`."""
        if self.rows == 1:
            return flat[self.offset : self.offset + self.width]
        return flat.as_strided(self.shape, (self.pitch, 1), flat.storage_offset() + self.offset)


class _Rectangle(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of a row-major matrix of `pitch` columns."""

    top: int
    bottom: int
    left: int
    right: int
    pitch: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def empty(self) -> bool:
        return self.top >= self.bottom or self.left >= self.right

    def before(self, flat: int) -> int:
        """How many of its elements lie before position `flat` of the flattened matrix."""
        row, col = divmod(flat, self.pitch)
        if row < self.top:
            return 0
        if row >= self.bottom:
            return (self.bottom - self.top) * self.width
        return (row - self.top) * self.width + min(max(col - self.left, 0), self.width)

    def strips(self, start: int, stop: int) -> list[Strip]:
        """Elements [start, stop), counted in its own row-major order, as at most three strips of the matrix."""
        origin = self.top * self.pitch + self.left
        if self.width == self.pitch:
            return [Strip(origin + start, 1, stop - start, self.pitch)] if start < stop else []
        out = []
        row, col = divmod(start, self.width)
        while start < stop:
            rows = (stop - start) // self.width if col == 0 else 0
            width = self.width if rows else min(self.width - col, stop - start)
            out.append(Strip(origin + row * self.pitch + col, max(rows, 1), width, self.pitch))
            start += out[-1].numel
            row, col = row + max(rows, 1), 0
        return out


def is_single(spec: MatrixSpec, part: int) -> bool:
    """Whether the part is one logical matrix, whose sharing takes a team."""
    return spec.logical_shape(part)[0] == 1


def share_dim(spec: MatrixSpec, part: int) -> int:
    """The dimension of the joined matrix along which a part is shared: the long one, or that with more tiles."""
    extent = spec.joined_shape(part) if is_single(spec, part) else spec.tile_grid(part)
    return 0 if extent[0] >= extent[1] else 1


def max_shares(spec: MatrixSpec, part: int) -> int:
    """The largest number of shares, each with at least one row or column, or one logical matrix."""
    extent = spec.joined_shape(part) if is_single(spec, part) else spec.tile_grid(part)
    return max(extent)


def split(extent: int, count: int, unit: int = 1) -> list[int]:
    """The bounds, `count` + 1 of them, of `count` nearly equal ranges of `extent` that begin at multiples of `unit`."""
    units = extent // unit
    return [*(units * i // count * unit for i in range(count)), extent]


def divide_part(spec: MatrixSpec, part: int, count: int) -> tuple[Share, ...]:
    """Divides a part into `count` shares of nearly equal size, which together are all of it.

    Raises:
        ValueError: If the part does not divide into so many.
    """
    dim, most = share_dim(spec, part), max_shares(spec, part)
    if not 1 <= count <= most:
        raise ValueError(f"{spec.name}.{spec.parts[part].label}: got {count} shares, expected 1 to {most}")
    extent = spec.joined_shape(part)[dim]
    if is_single(spec, part):
        unit = _ALIGNMENT if extent >= _ALIGNMENT * _ALIGNMENT * count else 1
    else:
        unit = spec.tile_shape(part)[dim]
    bounds = split(extent, count, unit)
    return tuple(Share(dim, start, stop) for start, stop in pairwise(bounds))


def share_shape(spec: MatrixSpec, part: int, share: Share) -> tuple[int, int]:
    """(rows, cols) of the tensor in which the owner collects a share."""
    rows, cols = spec.joined_shape(part)
    extent = share.stop - share.start
    return (extent, cols) if share.dim == 0 else (rows, extent)


def logical_views(spec: MatrixSpec, part: int, collected: Tensor) -> list[Tensor]:
    """2-D views of the logical matrices inside a collected share that is no band; writing to them writes to it."""
    # Here, since planning imports no torch.
    import torch

    rows, cols = spec.tile_shape(part)
    return [tile for row in torch.split(collected, rows, dim=0) for tile in torch.split(row, cols, dim=1)]


def _in_piece(spec: MatrixSpec, part: int, share: Share, piece: int) -> tuple[_Rectangle, _Rectangle]:
    """What a share has of a TP piece: as a rectangle of the part's rows of the piece, and of the collected tensor."""
    extent = (spec.parts[part].num_rows_in(piece), spec.shape[1])
    # The pieces lie one after the other in the joined matrix; the collected tensor begins where the share does.
    at = [*spec.offset_of_piece(part, piece)]
    low, high = [0, 0], [*extent]
    low[share.dim] = min(max(share.start - at[share.dim], 0), extent[share.dim])
    high[share.dim] = min(max(share.stop - at[share.dim], 0), extent[share.dim])
    at[share.dim] = max(at[share.dim] - share.start, 0)
    stored = _Rectangle(low[0], high[0], low[1], high[1], extent[1])
    pitch = share_shape(spec, part, share)[1]
    collected = _Rectangle(at[0], at[0] + high[0] - low[0], at[1], at[1] + high[1] - low[1], pitch)
    return stored, collected


def share_positions(
    spec: MatrixSpec, part: int, share: Share, piece: int, flat: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many elements of a share lie before each of some positions of piece `piece`, flattened.

    Of a slice [start, stop) the elements between the two results belong to the share, in the share's own order.
    """
    stored, _ = _in_piece(spec, part, share, piece)
    if stored.empty:
        return np.zeros_like(flat)
    row, col = np.divmod(spec.part_offsets(part, piece, flat), stored.pitch)
    height = stored.bottom - stored.top
    # Not np.clip, which takes four times as long for arrays of few elements.
    in_row = np.minimum(np.maximum(col - stored.left, 0), stored.width)
    in_row = np.where((row >= stored.top) & (row < stored.bottom), in_row, 0)
    before: NDArray[np.int64] = np.minimum(np.maximum(row - stored.top, 0), height) * stored.width + in_row
    return before


def stored_strips(spec: MatrixSpec, part: int, share: Share, piece: int, start: int, stop: int) -> list[Strip]:
    """Where the elements of `share_run` lie in the slice [start, stop) of piece `piece`, in wire order."""
    stored, _ = _in_piece(spec, part, share, piece)
    out = []
    above = 0
    for first, last in spec.parts[part].rows_in(piece):
        # The part's rows from `above` on are rows `first`.. of the local tensor.
        top, bottom = max(stored.top - above, 0) + first, min(stored.bottom - above + first, last)
        above += last - first
        local = _Rectangle(top, bottom, stored.left, stored.right, spec.shape[1])
        if not local.empty:
            strips = local.strips(local.before(start), local.before(stop))
            out += [strip._replace(offset=strip.offset - start) for strip in strips]
    return out


def collected_strips(spec: MatrixSpec, part: int, share: Share, piece: int, start: int, stop: int) -> list[Strip]:
    """Where elements [start, stop) of a share's own order in piece `piece` lie in the collected tensor, flattened."""
    return _in_piece(spec, part, share, piece)[1].strips(start, stop)
