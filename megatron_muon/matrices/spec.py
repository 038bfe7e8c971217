"""What a parameter is made of: the logical matrices that Muon orthogonalizes, and where they lie in it.

A parameter is stored per tensor-parallel (TP) rank as a local 2-D tensor, a piece of the whole. Its `Part`s are sets of
rows of that local tensor: the Q rows of a fused QKV weight, the gate of a fused gated MLP, or all of it. A part's rows,
joined over the TP ranks, make the part's *joined matrix*. That is one logical matrix, or it is tiled by several of one
shape if the part is cut into blocks (heads) or TP pieces are not joined. `splits` makes the parts of kinds of weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Blocks:
    """Cuts a part into logical matrices of `size` rows (dim 0) or columns (dim 1)."""

    dim: int
    size: int


Ranges = tuple[tuple[int, int], ...]
"""Disjoint, ascending, half-open ranges of rows."""


@dataclass(frozen=True)
class Part:
    """Rows of a parameter that are orthogonalized together.

    Attributes:
        label: Name within the parameter, such as "q"; empty for the only part.
        rows: The rows of the local tensor, where they are the same on all TP pieces.
        blocks: How to cut the part into several logical matrices; None keeps it whole.
        pieces: The rows of each TP piece, where they differ; a piece may have none. Then `rows` is empty.
    """

    label: str
    rows: Ranges
    blocks: Blocks | None = None
    pieces: tuple[Ranges, ...] = ()

    def rows_in(self, piece: int) -> Ranges:
        """The rows of a piece's local tensor."""
        return self.pieces[piece] if self.pieces else self.rows

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.pieces or (self.rows,))

    def num_rows_in(self, piece: int) -> int:
        """How many rows a piece's local tensor has of the part."""
        return self._counts[piece if self.pieces else 0]

    def first_row_of(self, piece: int) -> int:
        """How many rows the pieces before have together."""
        return sum(self._counts[:piece]) if self.pieces else piece * self._counts[0]


@dataclass(frozen=True)
class MatrixSpec:
    """A matrix parameter: its local shape, its tensor-parallel layout and its parts.

    Attributes:
        name: Unique within the ranks that share a plan, and the same on all of them.
        shape: (rows, cols) of the tensor that one TP rank stores.
        tp_size: Number of TP ranks that store the parameter.
        partition_dim: Dimension split over TP; None if every TP rank stores the whole.
        parts: Cover every row of every piece exactly once.
        tp_joined: False makes each TP rank's piece a logical matrix of its own ("blockwise").

    Raises:
        ValueError: If the parts do not cover the rows exactly once, or blocks do not divide a part.
    """

    name: str
    shape: tuple[int, int]
    tp_size: int
    partition_dim: int | None
    parts: tuple[Part, ...]
    tp_joined: bool = True

    def __post_init__(self) -> None:
        rows, cols = self.shape
        if rows < 1 or cols < 1:
            raise ValueError(f"{self.name}: got shape {self.shape}, expected two positive sizes")
        if self.tp_size < 1 or self.partition_dim not in (None, 0, 1):
            raise ValueError(
                f"{self.name}: got tp_size {self.tp_size} and partition_dim {self.partition_dim}, "
                "expected a positive size and 0, 1 or None"
            )
        self._check_pieces()
        for piece in range(self.num_pieces if any(part.pieces for part in self.parts) else 1):
            self._check_cover([part.rows_in(piece) for part in self.parts])
        for part in self.parts:
            for ranges in part.pieces or (part.rows,):
                if list(ranges) != sorted(ranges):
                    raise ValueError(f"{self.name}.{part.label}: got rows {ranges}, expected ascending ranges")
        for index, part in enumerate(self.parts):
            self._check_blocks(index, part)

    def _check_pieces(self) -> None:
        for part in self.parts:
            if not part.pieces:
                continue
            if self.partition_dim != 0 or len(part.pieces) != self.tp_size or part.rows or not self.tp_joined:
                raise ValueError(
                    f"{self.name}.{part.label}: got rows for each of {len(part.pieces)} pieces, expected them only for "
                    f"the joined pieces of a parameter split along dim 0, of which there are {self.num_pieces}"
                )

    def _check_cover(self, ranges: list[Ranges]) -> None:
        at, rows = 0, self.shape[0]
        for start, stop in sorted(r for part in ranges for r in part):
            if start != at or stop <= start:
                raise ValueError(f"{self.name}: the parts' rows {ranges} do not cover 0..{rows} exactly once")
            at = stop
        if at != rows:
            raise ValueError(f"{self.name}: the parts cover {at} rows, expected {rows}")

    def _check_blocks(self, index: int, part: Part) -> None:
        if part.blocks is None:
            return
        dim, size = part.blocks.dim, part.blocks.size
        if dim not in (0, 1):
            raise ValueError(f"{self.name}.{part.label}: got blocks along dim {dim}, expected 0 or 1")
        extent = (self.joined_shape(index) if self.tp_joined else (part.num_rows_in(0), self.shape[1]))[dim]
        if size < 1 or extent % size:
            whose = "" if self.tp_joined or self.num_pieces == 1 else " on a rank"
            raise ValueError(
                f"{self.name}.{part.label}: {extent} {('rows', 'columns')[dim]}{whose} do not divide into blocks of "
                f"{size}"
            )

    @property
    def replicated(self) -> bool:
        """Every TP rank stores the whole parameter, and there are several."""
        return self.partition_dim is None and self.tp_size > 1

    @property
    def num_pieces(self) -> int:
        """Number of TP pieces that make up the parameter; copies do not count."""
        return 1 if self.partition_dim is None else self.tp_size

    def piece_of(self, tp_rank: int) -> int:
        """Which piece a TP rank stores."""
        return tp_rank if self.num_pieces > 1 else 0

    @property
    def local_numel(self) -> int:
        return math.prod(self.shape)

    @property
    def numel(self) -> int:
        """Elements of the whole parameter over its TP pieces."""
        return self.local_numel * self.num_pieces

    def joined_shape(self, index: int) -> tuple[int, int]:
        """(rows, cols) of part `index`, joined over the TP pieces along the partitioned dimension."""
        part, cols = self.parts[index], self.shape[1]
        if self.partition_dim == 0:
            return part.first_row_of(self.tp_size), cols
        return part.num_rows_in(0), cols * self.tp_size if self.partition_dim == 1 else cols

    def offset_of_piece(self, index: int, piece: int) -> tuple[int, int]:
        """(row, col) of the joined matrix of part `index` where what piece `piece` has of it begins."""
        if self.partition_dim == 0:
            return self.parts[index].first_row_of(piece), 0
        return 0, piece * self.shape[1] if self.partition_dim == 1 else 0

    def tile_shape(self, index: int) -> tuple[int, int]:
        """(rows, cols) of one logical matrix; the logical matrices of a part tile its joined matrix."""
        extent = [*(self.joined_shape(index) if self.tp_joined else (self.parts[index].num_rows_in(0), self.shape[1]))]
        blocks = self.parts[index].blocks
        if blocks is not None:
            extent[blocks.dim] = blocks.size
        return extent[0], extent[1]

    def logical_shape(self, index: int) -> tuple[int, int, int]:
        """(count, rows, cols) of the logical matrices of part `index`; a part's are all of one shape."""
        tiles, (rows, cols) = self.tile_grid(index), self.tile_shape(index)
        return tiles[0] * tiles[1], rows, cols

    def tile_grid(self, index: int) -> tuple[int, int]:
        """How many logical matrices lie below and beside each other in the joined matrix of part `index`."""
        joined, tile = self.joined_shape(index), self.tile_shape(index)
        return joined[0] // tile[0], joined[1] // tile[1]

    def part_offsets(self, index: int, piece: int, flat: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many elements of part `index` lie before each of some positions of piece `piece`, flattened."""
        # Here, since the command line lists models without numpy.
        import numpy as np

        cols, before = self.shape[1], np.zeros_like(flat)
        for start, stop in self.parts[index].rows_in(piece):
            before += np.minimum(np.maximum(flat - start * cols, 0), (stop - start) * cols)
        return before


def whole(rows: int) -> tuple[Part, ...]:
    """The parts of a parameter that is one logical matrix."""
    return (Part("", ((0, rows),)),)
