"""MatrixSpec against an oracle made of index tensors: number every element of a whole parameter and follow it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_muon.matrices import Blocks, MatrixSpec, Part, gated, interleaved, whole
from megatron_muon.shares import logical_views, share_run, share_shape, shares, stored_strips

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

    def part_rows(self, index: int) -> list[int]:
        return [row for start, stop in self.spec.parts[index].rows for row in range(start, stop)]

    def pieces(self, index: int) -> list[Tensor]:
        """The part's rows of each piece."""
        pieces = range(1 if self.spec.partition_dim is None else self.spec.tp_size)
        return [self.local(piece)[self.part_rows(index)] for piece in pieces]

    def collected(self, index: int) -> Tensor:
        """What the owner of a part collects: the part's rows of each piece, joined along the partitioned dimension."""
        return torch.cat(self.pieces(index), dim=self.spec.partition_dim or 0)

    def logical(self, index: int) -> list[Tensor]:
        """The logical matrices of a part, cut from the whole parameter."""
        spec, rows, blocks = self.spec, self.part_rows(index), self.spec.parts[index].blocks
        if not spec.tp_joined and spec.partition_dim is not None:
            matrices = [self.local(tp_rank)[rows] for tp_rank in range(spec.tp_size)]
        elif spec.partition_dim == 0:
            matrices = [self.whole[[t * spec.shape[0] + row for t in range(spec.tp_size) for row in rows]]]
        else:
            matrices = [self.whole[rows]]
        if blocks is None:
            return matrices
        return [block for matrix in matrices for block in torch.split(matrix, blocks.size, dim=blocks.dim)]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def parts_of(draw: st.DrawFn, rows: int, cols: int) -> tuple[Part, ...]:
    """Any parts of a local tensor: all of it, a repeated pattern, halves, or rows dealt out at random."""
    kind = draw(st.sampled_from(["whole", "interleaved", "gated", "random"]))
    if kind == "interleaved":
        period = draw(st.sampled_from(divisors(rows)))
        inner = draw(st.sets(st.integers(1, period - 1), max_size=2)) if period > 1 else set()
        cuts = sorted({0, *inner, period})
        sizes = [b - a for a, b in pairwise(cuts)]
        parts = interleaved("w", rows, sizes, "qkv"[: len(sizes)])
    elif kind == "gated" and rows % 2 == 0:
        parts = gated("w", rows)
    elif kind == "random":
        owners = draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
        parts = tuple(
            Part(str(owner), tuple((row, row + 1) for row in range(rows) if owners[row] == owner))
            for owner in sorted(set(owners))
        )
    else:
        parts = whole(rows)
    result = []
    for part in parts:
        dim = draw(st.sampled_from([None, 0, 1]))
        size = draw(st.sampled_from(divisors((part.num_rows, cols)[dim or 0])))
        result.append(Part(part.label, part.rows, None if dim is None else Blocks(dim, size)))
    return tuple(result)


@st.composite
def numbered(draw: st.DrawFn) -> Numbered:
    rows, cols = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    return Numbered(
        MatrixSpec(
            name="w",
            shape=(rows, cols),
            tp_size=draw(st.integers(1, 4)),
            partition_dim=draw(st.sampled_from([None, 0, 1])),
            parts=draw(parts_of(rows, cols)),
            tp_joined=draw(st.booleans()),
        )
    )


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
        (everything,) = shares(spec, index, 1)
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
    covered = []
    for index in range(len(spec.parts)):
        rows = set(case.part_rows(index))
        (everything,) = shares(spec, index, 1)
        for piece in range(spec.num_pieces):
            strips = stored_strips(spec, index, everything, piece, start, stop)
            assert all(strip.numel for strip in strips)
            positions = [int(i) for s in strips for i in s.view(torch.arange(start, stop)).flatten()]
            assert positions == [i for i in range(start, stop) if i // spec.shape[1] in rows]
            before = [i for i in range(start) if i // spec.shape[1] in rows]
            assert spec.part_offset(index, start) == len(before)
            # A piece of the part, flattened, is its runs in a row: a slice lies at [offset(start), offset(stop)) of it.
            first, last = spec.part_offset(index, start), spec.part_offset(index, stop)
            assert share_run(spec, index, everything, piece, start, stop) == (first, last)
            inside = case.pieces(index)[piece].flatten()[first:last]
            assert torch.equal(inside, case.local(piece).flatten()[positions])
        covered += positions
    assert sorted(covered) == list(range(start, stop))


@EXAMPLES
@given(numbered())
def test_sizes(case: Numbered) -> None:
    spec = case.spec
    pieces = {tuple(case.local(t).flatten().tolist()) for t in range(spec.tp_size)}
    assert spec.num_pieces == len(pieces) == len(case.pieces(0))
    assert spec.replicated == (spec.tp_size > len(pieces))
    assert spec.local_numel == case.local(0).numel()
    assert spec.numel == case.whole.numel()


def test_megatrons_qkv_layout() -> None:
    """Two query groups on a rank, each with 2 query heads, a key and a value head of 3 rows."""
    parts = interleaved("qkv", 24, (6, 3, 3), ("q", "k", "v"))
    assert [(p.label, p.rows, p.num_rows) for p in parts] == [
        ("q", ((0, 6), (12, 18)), 12),
        ("k", ((6, 9), (18, 21)), 6),
        ("v", ((9, 12), (21, 24)), 6),
    ]


def test_gate_and_up_under_tensor_parallelism() -> None:
    """Each TP rank stores [gate; up], so the whole gate is no contiguous block of the gathered parameter."""
    spec = MatrixSpec("fc1", (4, 2), 2, 0, gated("fc1", 4))
    case = Numbered(spec)
    (gate,) = logical_views(spec, 0, case.collected(0))
    (up,) = logical_views(spec, 1, case.collected(1))
    assert gate.tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert up.tolist() == [[4, 5], [6, 7], [12, 13], [14, 15]]


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
            "w.q: 4 rows on a rank do not divide into blocks of 3",
        ),
        (
            {"parts": (Part("q", ((0, 4),), Blocks(1, 2)),)},
            "w.q: 3 columns on a rank do not divide into blocks of 2",
        ),
        (
            {"parts": (Part("q", ((0, 4),), Blocks(0, 0)),)},
            "w.q: 4 rows on a rank do not divide into blocks of 0",
        ),
    ],
)
def test_bad_spec(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = dict(name="w", shape=(4, 3), tp_size=2, partition_dim=0, parts=whole(4))
    assert MatrixSpec(**good).num_pieces == 2
    with pytest.raises(ValueError) as error:
        MatrixSpec(**{**good, **changes})
    assert str(error.value) == message


@pytest.mark.parametrize("sizes", [(4, 2, 1), (0, 5, 5), (-2, 6, 6)])
def test_pattern_that_does_not_divide(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError) as error:
        interleaved("layers.3.qkv", 20, sizes, ("q", "k", "v"))
    assert str(error.value) == (
        f"layers.3.qkv: 20 rows on a rank do not divide into repetitions of {sizes[0]} (q) + {sizes[1]} (k) + "
        f"{sizes[2]} (v) = {sum(sizes)} rows; check the attention head and query group counts, or switch the split off"
    )


def test_gated_with_odd_rows() -> None:
    with pytest.raises(ValueError, match=r"^fc1: 7 rows on a rank are not a gate and an up half of equal size$"):
        gated("fc1", 7)
