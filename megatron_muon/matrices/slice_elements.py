"""What the elements of a slice are: which element of which logical matrix, whatever the layout.

A slice is a flat range of one tensor-parallel piece. Numbers given here are counted over the whole parameter, so that
they are the same on every rank that stores the element, in every layout.

An example: [gate; up] of 4 x 3 each, on two tensor-parallel ranks. A rank stores 4 x 3: two rows of gate, two of up.
Elements 3 to 8 of the second rank's piece, the end of gate and the beginning of up, have

    row of the piece   1 1 1   2 2 2
    part               0 0 0   1 1 1
    matrix             0 0 0   1 1 1
    number             9 .. 11 18 .. 20     gate's rows 0 to 3 come first, with numbers 0 to 11, then up's
    line               3 3 3   6 6 6        a line is a row here; gate has lines 0 to 3, up 4 to 7
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_muon.matrices.spec import MatrixSpec

# Index tensors take 8 bytes an element and are needed for a moment only.
_CHUNK_NUMEL = 1 << 22


class LogicalMatrices(NamedTuple):
    """The logical matrices of a parameter, one after the other in the order of parts and tiles.

    Attributes:
        shapes: (rows, cols) of each.
        first_line: For each, the number of its first line; one more entry says how many lines there are in all.
    """

    shapes: tuple[tuple[int, int], ...]
    first_line: tuple[int, ...]


def logical_matrices(spec: MatrixSpec) -> LogicalMatrices:
    """The logical matrices of a parameter. A *line* is a row of one, or a column if it is wider than high."""
    shapes = [
        spec.tile_shape(part)
        for part in range(len(spec.parts))
        for _ in range(spec.tile_grid(part)[0] * spec.tile_grid(part)[1])
    ]
    first = [0]
    for shape in shapes:
        first.append(first[-1] + max(shape))
    return LogicalMatrices(tuple(shapes), tuple(first))


@dataclass(frozen=True)
class SliceElements:
    """The elements [start, stop) of piece `piece` of a parameter, flattened.

    Attributes:
        spec: The parameter.
        piece: The tensor-parallel piece; 0 if every rank has the whole.
        start: First element in the piece.
        stop: One past the last.
        device: Of the tensors returned.
    """

    spec: MatrixSpec
    piece: int
    start: int
    stop: int
    device: torch.device

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @cached_property
    def _rows(self) -> _Rows:
        """What the rows of the piece contribute to the numbers of their elements."""
        spec = self.spec
        out = _Rows(*(torch.empty(spec.shape[0], dtype=torch.int64) for _ in _Rows._fields))
        element_row = matrix = line = 0
        for index, part in enumerate(spec.parts):
            joined_rows, _ = spec.joined_shape(index)
            (tile_rows, tile_cols), (_, across) = spec.tile_shape(index), spec.tile_grid(index)
            ranges = [torch.arange(start, stop) for start, stop in part.rows_in(self.piece)]
            at = torch.cat([torch.empty(0, dtype=torch.int64), *ranges])
            row = torch.arange(part.num_rows_in(self.piece)) + spec.offset_of_piece(index, self.piece)[0]
            tile, row_in_tile = row // tile_rows * across, row % tile_rows
            out.part[at] = index
            out.element[at] = element_row + row
            out.matrix[at] = matrix + tile
            tall = tile_rows >= tile_cols
            out.line[at] = line + tile * max(tile_rows, tile_cols) + (row_in_tile if tall else 0)
            out.tile_cols[at] = tile_cols
            out.lines_per_tile[at] = max(tile_rows, tile_cols)
            out.line_per_col[at] = 0 if tall else 1
            count = spec.tile_grid(index)[0] * across
            element_row, matrix, line = (
                element_row + joined_rows,
                matrix + count,
                line + count * max(tile_rows, tile_cols),
            )
        return _Rows(*(table.to(self.device) for table in out))

    def chunks(self) -> Iterator[slice]:
        """Ranges of the slice, small enough for tensors of numbers."""
        for at in range(0, self.numel, _CHUNK_NUMEL):
            yield slice(at, min(at + _CHUNK_NUMEL, self.numel))

    def _places(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """(row of the piece, column of the parameter) of each element."""
        cols = self.spec.shape[1]
        flat = torch.arange(self.start + chunk.start, self.start + chunk.stop, device=self.device)
        row = flat // cols
        return row, flat - row * cols + (self.piece * cols if self.spec.partition_dim == 1 else 0)

    def numbers(self, chunk: slice) -> Tensor:
        """(chunk,) int64: the element's number in the parameter, parts one after the other, row-major."""
        row, col = self._places(chunk)
        cols = self.spec.shape[1] * (self.spec.num_pieces if self.spec.partition_dim == 1 else 1)
        return self._rows.element[row] * cols + col

    def parts(self, chunk: slice) -> Tensor:
        """(chunk,) int64: the number of the part."""
        return self._rows.part[self._places(chunk)[0]]

    def matrices(self, chunk: slice) -> Tensor:
        """(chunk,) int64: the number of the logical matrix, as in `logical_matrices`."""
        row, col = self._places(chunk)
        return self._rows.matrix[row] + col // self._rows.tile_cols[row]

    def lines(self, chunk: slice) -> Tensor:
        """(chunk,) int64: the number of the line, as in `logical_matrices`."""
        row, col = self._places(chunk)
        tile = col // self._rows.tile_cols[row]
        within = (col - tile * self._rows.tile_cols[row]) * self._rows.line_per_col[row]
        return self._rows.line[row] + tile * self._rows.lines_per_tile[row] + within

    @cached_property
    def touched_lines(self) -> Tensor:
        """The lines that have an element in the slice, ascending."""
        seen = torch.zeros(logical_matrices(self.spec).first_line[-1], dtype=torch.bool, device=self.device)
        for chunk in self.chunks():
            seen[self.lines(chunk)] = True
        return seen.nonzero().view(-1)


class _Rows(NamedTuple):
    """One entry per row of a piece."""

    part: Tensor
    element: Tensor
    matrix: Tensor
    line: Tensor
    tile_cols: Tensor
    lines_per_tile: Tensor
    line_per_col: Tensor
