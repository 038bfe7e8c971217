"""MatrixSpec against an oracle made of index tensors: number every element of a whole parameter and follow it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_muon.matrices.shares import divide_part, logical_views, share_positions, share_shape, stored_strips
from megatron_muon.matrices.spec import Blocks, MatrixSpec, Part, Ranges, whole

EXAMPLES = settings(max_examples=200, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Numbered:
    """A whole parameter whose elements are 0, 1, 2, ..., and what follows from its spec by indexing alone."""

    spec: MatrixSpec

    @property
    def whole(self) -> Tensor:
        sizes = list(self.spec.shape)
        if self.spec.partition_dim is not None:
            sizes[self.spec.partition_dim] *= self.spec.tp_size
        return torch.arange(sizes[0] * sizes[1]).view(sizes[0], sizes[1])

    def local(self, tp_rank: int) -> Tensor:
        """The tensor that a TP rank stores."""
        rows, cols = self.spec.shape
        if self.spec.partition_dim == 0:
            return self.whole[tp_rank * rows : (tp_rank + 1) * rows]
        if self.spec.partition_dim == 1:
            return self.whole[:, tp_rank * cols : (tp_rank + 1) * cols]
        return self.whole

    def part_rows(self, index: int, piece: int) -> list[int]:
        """The part's rows of a piece's local tensor."""
        part = self.spec.parts[index]
        return [row for start, stop in (part.pieces[piece] if part.pieces else part.rows) for row in range(start, stop)]

    def pieces(self, index: int) -> list[Tensor]:
        """The part's rows of each piece."""
        pieces = range(1 if self.spec.partition_dim is None else self.spec.tp_size)
        return [self.local(piece)[self.part_rows(index, piece)] for piece in pieces]

    def collected(self, index: int) -> Tensor:
        """What the owner of a part collects: the part's rows of each piece, joined along the partitioned dimension."""
        return torch.cat(self.pieces(index), dim=self.spec.partition_dim or 0)

    def logical(self, index: int) -> list[Tensor]:
        """The logical matrices of a part, cut from the whole parameter."""
        spec, blocks = self.spec, self.spec.parts[index].blocks
        if not spec.tp_joined and spec.partition_dim is not None:
            matrices = self.pieces(index)
        elif spec.partition_dim == 0:
            ranks = range(spec.tp_size)
            matrices = [self.whole[[t * spec.shape[0] + row for t in ranks for row in self.part_rows(index, t)]]]
        else:
            matrices = [self.whole[self.part_rows(index, 0)]]
        if blocks is None:
            return matrices
        return [block for matrix in matrices for block in torch.split(matrix, blocks.size, dim=blocks.dim)]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def dealt(draw: st.DrawFn, rows: int, count: int) -> list[Ranges]:
    """Any rows for each of `count` parts."""
    owners = draw(st.lists(st.integers(0, count - 1), min_size=rows, max_size=rows))
    return [tuple((row, row + 1) for row in range(rows) if owners[row] == part) for part in range(count)]


@st.composite
def numbered(draw: st.DrawFn) -> Numbered:
    """A spec whose parts are any rows, the same on all TP pieces or not, whole or in blocks."""
    rows, cols, tp_size = draw(st.integers(1, 12)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    dim, tp_joined = draw(st.sampled_from([None, 0, 1])), draw(st.booleans())
    count = draw(st.integers(1, 3))
    if dim == 0 and tp_joined and draw(st.booleans()):
        by_piece = [dealt(draw, rows, count) for _ in range(tp_size)]
        parts = [Part(str(i), (), pieces=tuple(piece[i] for piece in by_piece)) for i in range(count)]
    else:
        parts = [Part(str(i), ranges) for i, ranges in enumerate(dealt(draw, rows, count))]
    result = []
    for part in parts:
        pieces = tp_size if dim == 0 else 1
        extent = [sum(part.num_rows_in(piece) for piece in range(pieces)), cols * (tp_size if dim == 1 else 1)]
        if not tp_joined:
            extent = [part.num_rows_in(0), cols]
        if extent[0]:
            block_dim = draw(st.sampled_from([None, 0, 1]))
            size = draw(st.sampled_from(divisors(extent[block_dim or 0])))
            result.append(replace(part, blocks=None if block_dim is None else Blocks(block_dim, size)))
    return Numbered(MatrixSpec("w", (rows, cols), tp_size, dim, tuple(result), tp_joined))


def in_order(matrices: list[Tensor]) -> list[list[list[int]]]:
    """The matrices as lists, in an order that does not depend on who made them."""
    return sorted(matrix.tolist() for matrix in matrices)


@EXAMPLES
@given(numbered())
def test_logical_views_are_the_logical_matrices(case: Numbered) -> None:
    spec = case.spec
    for index in range(len(spec.parts)):
        collected = case.collected(index)
        assert spec.joined_shape(index) == tuple(collected.shape)
        (everything,) = divide_part(spec, index, 1)
        assert share_shape(spec, index, everything) == tuple(collected.shape)
        views = logical_views(spec, index, collected)
        expected = case.logical(index)
        assert in_order(views) == in_order(expected)
        count, rows, cols = spec.logical_shape(index)
        assert spec.tile_shape(index) == (rows, cols) and math.prod(spec.tile_grid(index)) == count
        assert len(views) == count
        assert {tuple(matrix.shape) for matrix in expected} == {(rows, cols)}


@EXAMPLES
@given(numbered())
def test_logical_views_share_the_parts_memory(case: Numbered) -> None:
    for index in range(len(case.spec.parts)):
        collected = case.collected(index)
        views = logical_views(case.spec, index, collected)
        matrix_of = torch.full((case.whole.numel(),), -1)
        for number, view in enumerate(views):
            matrix_of[view] = number
        expected = matrix_of[collected]
        for number, view in enumerate(views):
            view.fill_(number)
        assert torch.equal(collected, expected)


@EXAMPLES
@given(numbered(), st.data())
def test_strips_and_offsets_of_a_flat_range(case: Numbered, data: st.DataObject) -> None:
    """Where the elements of a slice lie in it, part by part; shares that are no whole parts are tested in test_plan."""
    spec = case.spec
    start = data.draw(st.integers(0, spec.local_numel))
    stop = data.draw(st.integers(start, spec.local_numel))
    covered: list[list[int]] = [[] for _ in range(spec.num_pieces)]
    for index in range(len(spec.parts)):
        (everything,) = divide_part(spec, index, 1)
        for piece in range(spec.num_pieces):
            rows = set(case.part_rows(index, piece))
            strips = stored_strips(spec, index, everything, piece, start, stop)
            assert all(strip.numel for strip in strips)
            positions = [int(i) for s in strips for i in s.view(torch.arange(start, stop)).flatten()]
            assert positions == [i for i in range(start, stop) if i // spec.shape[1] in rows]
            before = [i for i in range(start) if i // spec.shape[1] in rows]
            # A piece of the part, flattened, is its runs in a row: a slice lies at [offset(start), offset(stop)) of it.
            ends = np.array([start, stop])
            first, last = spec.part_offsets(index, piece, ends).tolist()
            assert first == len(before)
            assert share_positions(spec, index, everything, piece, ends).tolist() == [first, last]
            inside = case.pieces(index)[piece].flatten()[first:last]
            assert torch.equal(inside, case.local(piece).flatten()[positions])
            covered[piece] += positions
    assert all(sorted(positions) == list(range(start, stop)) for positions in covered)


@EXAMPLES
@given(numbered())
def test_sizes(case: Numbered) -> None:
    spec = case.spec
    pieces = {tuple(case.local(t).flatten().tolist()) for t in range(spec.tp_size)}
    assert spec.num_pieces == len(pieces) == len(case.pieces(0))
    assert spec.replicated == (spec.tp_size > len(pieces))
    assert spec.local_numel == case.local(0).numel()
    assert spec.numel == case.whole.numel()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shape": (0, 3)}, "w: got shape (0, 3), expected two positive sizes"),
        ({"shape": (4, -1)}, "w: got shape (4, -1), expected two positive sizes"),
        (
            {"tp_size": 0},
            "w: got tp_size 0 and partition_dim 0, expected a positive size and 0, 1 or None",
        ),
        (
            {"partition_dim": 2},
            "w: got tp_size 2 and partition_dim 2, expected a positive size and 0, 1 or None",
        ),
        (
            {"partition_dim": -1},
            "w: got tp_size 2 and partition_dim -1, expected a positive size and 0, 1 or None",
        ),
        # A gap, an overlap, rows twice, an empty range, a range backwards, rows that are not there.
        (
            {"parts": (Part("", ((0, 1), (2, 4))),)},
            "w: the parts' rows [((0, 1), (2, 4))] do not cover 0..4 exactly once",
        ),
        (
            {"parts": (Part("a", ((0, 3),)), Part("b", ((2, 4),)))},
            "w: the parts' rows [((0, 3),), ((2, 4),)] do not cover 0..4 exactly once",
        ),
        (
            {"parts": (Part("a", ((0, 4),)), Part("b", ((0, 4),)))},
            "w: the parts' rows [((0, 4),), ((0, 4),)] do not cover 0..4 exactly once",
        ),
        (
            {"parts": (Part("", ((0, 0), (0, 4))),)},
            "w: the parts' rows [((0, 0), (0, 4))] do not cover 0..4 exactly once",
        ),
        (
            {"parts": (Part("", ((0, -1), (0, 4))),)},
            "w: the parts' rows [((0, -1), (0, 4))] do not cover 0..4 exactly once",
        ),
        ({"parts": whole(3)}, "w: the parts cover 3 rows, expected 4"),
        ({"parts": whole(5)}, "w: the parts cover 5 rows, expected 4"),
        ({"parts": ()}, "w: the parts cover 0 rows, expected 4"),
        (
            {"parts": (Part("q", ((2, 4), (0, 2))),)},
            "w.q: got rows ((2, 4), (0, 2)), expected ascending ranges",
        ),
        (
            {"parts": (Part("q", ((0, 4),), Blocks(0, 3)),)},
            "w.q: 8 rows do not divide into blocks of 3",
        ),
        (
            {"parts": (Part("q", ((0, 4),), Blocks(1, 2)),)},
            "w.q: 3 columns do not divide into blocks of 2",
        ),
        (
            {"parts": (Part("q", ((0, 4),), Blocks(0, 0)),)},
            "w.q: 8 rows do not divide into blocks of 0",
        ),
        (
            {"parts": (Part("q", ((0, 4),), Blocks(0, 8)),), "tp_joined": False},
            "w.q: 4 rows on a rank do not divide into blocks of 8",
        ),
        (
            {"parts": (Part("q", (), pieces=(((0, 4),),)),)},
            "w.q: got rows for each of 1 pieces, expected them only for the joined pieces of a parameter split along "
            "dim 0, of which there are 2",
        ),
        (
            {"parts": (Part("q", (), pieces=(((0, 4),), ((0, 3),))),)},
            "w: the parts cover 3 rows, expected 4",
        ),
        (
            {"parts": (Part("q", (), pieces=(((0, 4),), ((0, 4),))),), "tp_joined": False},
            "w.q: got rows for each of 2 pieces, expected them only for the joined pieces of a parameter split along "
            "dim 0, of which there are 2",
        ),
    ],
)
def test_bad_spec(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = dict(name="w", shape=(4, 3), tp_size=2, partition_dim=0, parts=whole(4))
    assert MatrixSpec(**good).num_pieces == 2
    with pytest.raises(ValueError) as error:
        MatrixSpec(**{**good, **changes})
    assert str(error.value) == message
