"""Lines of logical matrices: rows, or columns of a matrix that is wider than high. NorMuon keeps a number for each.

A share of a part holds all elements of each of its lines. Its lines are counted tile by tile, tiles in row-major order;
so are the lines of a parameter, part by part. Only lines are counted here, never elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_muon.matrices.shares import Share, Strip, collected_strips, is_single, share_shape, stored_strips
from megatron_muon.matrices.spec import MatrixSpec


class _Tiles(NamedTuple):
    """The tiles of a share: whole logical matrices, or the band of one.

    Attributes:
        rows: Rows of a tile.
        cols: Columns of a tile.
        down: Tiles below each other.
        across: Tiles beside each other.
        tall: Whether lines are rows.
    """

    rows: int
    cols: int
    down: int
    across: int
    tall: bool

    @property
    def lines(self) -> int:
        """Lines of a tile."""
        return self.rows if self.tall else self.cols


def _tiles(spec: MatrixSpec, part: int, share: Share) -> _Tiles:
    rows, cols = share_shape(spec, part, share)
    tile_rows, tile_cols = spec.tile_shape(part)
    tall = tile_rows >= tile_cols
    if is_single(spec, part):
        return _Tiles(rows, cols, 1, 1, tall)
    return _Tiles(tile_rows, tile_cols, rows // tile_rows, cols // tile_cols, tall)


def num_lines(spec: MatrixSpec, part: int, share: Share) -> int:
    """How many lines a share has."""
    tiles = _tiles(spec, part, share)
    return tiles.down * tiles.across * tiles.lines


def touched_lines(spec: MatrixSpec, part: int, share: Share, piece: int, start: int, stop: int) -> Tensor:
    """The lines of a share that have an element in a run, ascending, int64 on the CPU.

    Args:
        spec: The parameter.
        part: Index of the part.
        share: A share of it.
        piece: The tensor-parallel piece.
        start: First element of the run, in the share's own order in the piece; see `shares.share_positions`.
        stop: One past the last.
    """
    tiles = _tiles(spec, part, share)
    cols = share_shape(spec, part, share)[1]
    seen = torch.zeros(tiles.down, tiles.across, tiles.lines, dtype=torch.bool)
    for strip in collected_strips(spec, part, share, piece, start, stop) if start < stop else ():
        row, col = divmod(strip.offset, cols)
        if strip.rows > 1 or strip.width <= cols - col:
            _mark(seen, tiles, (row, row + strip.rows), (col, col + strip.width))
            continue
        # A run over several whole rows, of which the first and the last may be cut.
        last, end = divmod(strip.offset + strip.width, cols)
        _mark(seen, tiles, (row, row + 1), (col, cols))
        _mark(seen, tiles, (row + 1, last), (0, cols))
        _mark(seen, tiles, (last, last + 1), (0, end))
    return seen.view(-1).nonzero().view(-1)


def _mark(seen: Tensor, tiles: _Tiles, rows: tuple[int, int], cols: tuple[int, int]) -> None:
    """Marks the lines that have an element in a rectangle of the collected tensor."""
    if rows[0] >= rows[1] or cols[0] >= cols[1]:
        return
    long, short = (rows, cols) if tiles.tall else (cols, rows)
    length, width = (tiles.rows, tiles.cols) if tiles.tall else (tiles.cols, tiles.rows)
    across = slice(short[0] // width, (short[1] - 1) // width + 1)
    for tile in range(long[0] // length, (long[1] - 1) // length + 1):
        within = slice(max(long[0] - tile * length, 0), min(long[1] - tile * length, length))
        where = (tile, across, within) if tiles.tall else (across, tile, within)
        seen[where] = True


def numbers_in_parameter(spec: MatrixSpec, part: int, share: Share, lines: Tensor) -> Tensor:
    """The numbers of a share's lines among all lines of the parameter; ascending if `lines` are. int64."""
    before = sum(
        spec.tile_grid(index)[0] * spec.tile_grid(index)[1] * max(spec.tile_shape(index)) for index in range(part)
    )
    if is_single(spec, part):
        return lines + (before + share.start)
    tiles = _tiles(spec, part, share)
    tile, within = lines // tiles.lines, lines % tiles.lines
    first = [0, 0]
    first[share.dim] = share.start // (tiles.rows, tiles.cols)[share.dim]
    tile = (tile // tiles.across + first[0]) * spec.tile_grid(part)[1] + tile % tiles.across + first[1]
    return tile * tiles.lines + within + before


class TileStrips(NamedTuple):
    """What a slice has of one logical matrix.

    Attributes:
        number: Of the logical matrix, among those of the parameter, parts one after the other.
        shape: (rows, cols) of the logical matrix.
        strips: Where its elements lie in the slice.
    """

    number: int
    shape: tuple[int, int]
    strips: tuple[Strip, ...]


def tiles_of_slice(spec: MatrixSpec, piece: int, start: int, stop: int) -> list[TileStrips]:
    """The logical matrices that the slice [start, stop) of piece `piece` has elements of."""
    out: list[TileStrips] = []
    before = 0
    for part in range(len(spec.parts)):
        grid, shape = spec.tile_grid(part), spec.tile_shape(part)
        blocks = spec.parts[part].blocks
        # With tiles in both directions, those of one piece lie along the direction of its blocks.
        dim = blocks.dim if blocks is not None and min(grid) > 1 else 0 if grid[0] >= grid[1] else 1
        for k in range(grid[dim]):
            share = Share(dim, k * shape[dim], (k + 1) * shape[dim])
            strips = tuple(stored_strips(spec, part, share, piece, start, stop))
            other = piece if grid[1 - dim] > 1 else 0
            tile = k * grid[1] + other if dim == 0 else other * grid[1] + k
            if strips:
                out.append(TileStrips(before + tile, shape, strips))
        before += grid[0] * grid[1]
    return out


def num_logical_matrices(spec: MatrixSpec) -> int:
    """How many logical matrices a parameter has."""
    return sum(spec.logical_shape(part)[0] for part in range(len(spec.parts)))
