"""What a parameter is made of: the logical matrices that Muon orthogonalizes, and where they lie in it.

A parameter is stored per tensor-parallel (TP) rank as a local 2-D tensor. Its `Part`s are sets of rows of that local
tensor, each with one owner in the plan: the Q rows of a fused QKV weight, the gate of a fused gated MLP, or all of it.
A part's rows, joined over the TP ranks, make one logical matrix, or several if the part is cut into blocks (heads).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Cuts a part into logical matrices of `size` rows (dim 0) or columns (dim 1) of its local tensor."""

    dim: int
    size: int


@dataclass(frozen=True)
class Part:
    """Rows of a parameter's local tensor that one owner orthogonalizes.

    Attributes:
        label: Name within the parameter, such as "q"; empty for the only part.
        rows: Disjoint, ascending half-open row ranges of the local tensor.
        blocks: How to cut the part into several logical matrices; None keeps it whole.
    """

    label: str
    rows: tuple[tuple[int, int], ...]
    blocks: Blocks | None = None

    @property
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

    def part_shape(self, index: int) -> tuple[int, int, int]:
        """(TP pieces, rows, cols) of the tensor in which the owner collects part `index`."""
        return self.num_pieces, self.parts[index].num_rows, self.shape[1]

    def logical_shape(self, index: int) -> tuple[int, int, int]:
        """(count, rows, cols) of the logical matrices of part `index`; a part's are all of one shape."""
        pieces, *extent = self.part_shape(index)
        count = 1
        if not self.tp_joined:
            count, pieces = pieces, 1
        blocks = self.parts[index].blocks
        if blocks is not None:
            if blocks.dim == self.partition_dim:
                count, pieces = count * pieces, 1
            count *= extent[blocks.dim] // blocks.size
            extent[blocks.dim] = blocks.size
        if self.partition_dim is not None:
            extent[self.partition_dim] *= pieces
        return count, extent[0], extent[1]

    def logical_views(self, index: int, collected: Tensor) -> list[Tensor]:
        """Views of the logical matrices inside a part that an owner has collected.

        Args:
            index: The part.
            collected: (TP pieces, rows, cols) as `part_shape` says.

        Returns:
            4-D views (row outer, row inner, column outer, column inner). Flattening the first and the last two
            dimensions gives the logical matrix; writing to a view writes to `collected`.
        """
        if not self.tp_joined and collected.shape[0] > 1:
            return [v for piece in torch.split(collected, 1) for v in self.logical_views(index, piece)]
        blocks = self.parts[index].blocks
        pieces = [collected]
        if blocks is not None:
            if blocks.dim == self.partition_dim:
                # A head lies on one TP rank: nothing to join.
                pieces = list(torch.split(collected, 1))
            pieces = [block for piece in pieces for block in torch.split(piece, blocks.size, dim=1 + blocks.dim)]
        if self.partition_dim == 1:
            # (pieces, rows, cols) -> rows, then columns joined over the pieces.
            return [p.permute(1, 0, 2).unsqueeze(0) for p in pieces]
        return [p.unsqueeze(2) for p in pieces]

    def part_offset(self, index: int, flat: int) -> int:
        """How many elements of part `index` lie before position `flat` of the local tensor, flattened."""
        cols = self.shape[1]
        return sum(min(max(flat - start * cols, 0), (stop - start) * cols) for start, stop in self.parts[index].rows)

    def runs(self, index: int, start: int, stop: int) -> list[tuple[int, int]]:
        """The half-open flat ranges of the local tensor that belong to part `index`, within [start, stop)."""
        cols = self.shape[1]
        clipped = ((max(a * cols, start), min(b * cols, stop)) for a, b in self.parts[index].rows)
        return [(a, b) for a, b in clipped if a < b]


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
