"""What a parameter is made of: the logical matrices that Muon orthogonalizes, and where they lie in it.

A parameter is stored per tensor-parallel (TP) rank as a local 2-D tensor, a piece of the whole. Its `Part`s are sets of
rows of that local tensor: the Q rows of a fused QKV weight, the gate of a fused gated MLP, or all of it. A part's rows,
joined over the TP ranks, make the part's *joined matrix*. That is one logical matrix, or it is tiled by several of one
shape if the part is cut into blocks (heads) or TP pieces are not joined. A `Share` is what one rank collects of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Blocks:
    """Cuts a part into logical matrices of `size` rows (dim 0) or columns (dim 1) of its local tensor."""

    dim: int
    size: int


@dataclass(frozen=True)
class Part:
    """Rows of a parameter's local tensor that are orthogonalized together.

    Attributes:
        label: Name within the parameter, such as "q"; empty for the only part.
        rows: Disjoint, ascending half-open row ranges of the local tensor.
        blocks: How to cut the part into several logical matrices; None keeps it whole.
    """

    label: str
    rows: tuple[tuple[int, int], ...]
    blocks: Blocks | None = None

    @cached_property
    def num_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)


@dataclass(frozen=True)
class MatrixSpec:
    """A matrix parameter: its local shape, its tensor-parallel layout and its parts.

    Attributes:
        name: Unique within the ranks that share a plan, and the same on all of them.
        shape: (rows, cols) of the tensor that one TP rank stores.
        tp_size: Number of TP ranks that store the parameter.
        partition_dim: Dimension split over TP; None if every TP rank stores the whole.
        parts: Cover every row exactly once.
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
        at = 0
        for start, stop in sorted(r for part in self.parts for r in part.rows):
            if start != at or stop <= start:
                raise ValueError(
                    f"{self.name}: the parts' rows {[p.rows for p in self.parts]} do not cover 0..{rows} exactly once"
                )
            at = stop
        if at != rows:
            raise ValueError(f"{self.name}: the parts cover {at} rows, expected {rows}")
        for part in self.parts:
            if list(part.rows) != sorted(part.rows):
                raise ValueError(f"{self.name}.{part.label}: got rows {part.rows}, expected ascending ranges")
            if part.blocks is not None and part.blocks.dim not in (0, 1):
                raise ValueError(f"{self.name}.{part.label}: got blocks along dim {part.blocks.dim}, expected 0 or 1")
            if part.blocks is not None:
                extent = (part.num_rows, cols)[part.blocks.dim]
                if part.blocks.size < 1 or extent % part.blocks.size:
                    raise ValueError(
                        f"{self.name}.{part.label}: {extent} {('rows', 'columns')[part.blocks.dim]} on a rank "
                        f"do not divide into blocks of {part.blocks.size}"
                    )

    @property
    def replicated(self) -> bool:
        """Every TP rank stores the whole parameter, and there are several."""
        return self.partition_dim is None and self.tp_size > 1

    @property
    def num_pieces(self) -> int:
        """Number of TP pieces that make up the parameter; copies do not count."""
        return 1 if self.partition_dim is None else self.tp_size

    @property
    def local_numel(self) -> int:
        return math.prod(self.shape)

    @property
    def numel(self) -> int:
        """Elements of the whole parameter over its TP pieces."""
        return self.local_numel * self.num_pieces

    def joined_shape(self, index: int) -> tuple[int, int]:
        """(rows, cols) of part `index`, joined over the TP pieces along the partitioned dimension."""
        return self._joined(self.parts[index].num_rows, self.shape[1])

    def _joined(self, rows: int, cols: int) -> tuple[int, int]:
        return (
            rows * self.num_pieces if self.partition_dim == 0 else rows,
            cols * self.num_pieces if self.partition_dim == 1 else cols,
        )

    def tile_shape(self, index: int) -> tuple[int, int]:
        """(rows, cols) of one logical matrix; the logical matrices of a part tile its joined matrix."""
        extent = [self.parts[index].num_rows, self.shape[1]]
        if self.tp_joined:
            extent = [*self._joined(*extent)]
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

    def part_offset(self, index: int, flat: int) -> int:
        """How many elements of part `index` lie before position `flat` of the local tensor, flattened."""
        cols = self.shape[1]
        return sum(min(max(flat - start * cols, 0), (stop - start) * cols) for start, stop in self.parts[index].rows)


def whole(rows: int) -> tuple[Part, ...]:
    """The parts of a parameter that is one logical matrix."""
    return (Part("", ((0, rows),)),)


def interleaved(name: str, rows: int, sizes: Sequence[int], labels: Sequence[str]) -> tuple[Part, ...]:
    """The parts of a fused weight whose rows repeat a pattern, as Megatron's QKV does for each query group.

    Args:
        name: The parameter, for the error message.
        rows: Rows of the local tensor.
        sizes: Rows of each part in one repetition.
        labels: The parts' names.

    Raises:
        ValueError: If the pattern does not divide `rows`.
    """
    period = sum(sizes)
    if period < 1 or min(sizes) < 1 or rows % period:
        raise ValueError(
            f"{name}: {rows} rows on a rank do not divide into repetitions of "
            f"{' + '.join(f'{size} ({label})' for size, label in zip(sizes, labels, strict=True))} = {period} rows; "
            "check the attention head and query group counts, or switch the split off"
        )
    parts = []
    offset = 0
    for size, label in zip(sizes, labels, strict=True):
        ranges = tuple((at + offset, at + offset + size) for at in range(0, rows, period))
        parts.append(Part(label, ranges))
        offset += size
    return tuple(parts)


def gated(name: str, rows: int) -> tuple[Part, ...]:
    """The parts of a fused gated MLP's first weight, [gate; up] on each TP rank.

    Raises:
        ValueError: If `rows` is odd.
    """
    if rows % 2:
        raise ValueError(f"{name}: {rows} rows on a rank are not a gate and an up half of equal size")
    return interleaved(name, rows, (rows // 2, rows // 2), ("gate", "up"))
