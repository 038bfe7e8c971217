"""How kinds of weights are made of logical matrices.

A `Split` describes a whole parameter, whatever the tensor-parallel (TP) layout. `spec_from_split` translates it into
rows of the tensors that TP ranks store. The kinds below are those that Megatron-Core fuses; each gives its split under
the settings of a run. `megatron/model/registry.py` decides which parameter is of which kind.

An example: a fused QKV weight with two query groups, each of two query heads, a key head and a value head of 64 rows,
has 512 rows. With `qkv_split="qkv"` it has three parts, each joined from its rows of both groups:

    rows      0-127     128-191   192-255   256-383   384-447   448-511
    group 0:  q q       k         v
    group 1:                                q q       k         v
    part q: rows 0-127 and 256-383; part k: 128-191 and 384-447; part v: 192-255 and 448-511

On two TP ranks each stores one group; the joined matrix of each part is the same as on one rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Protocol

from megatron_muon.matrices.spec import Blocks, MatrixSpec, Part, Ranges

if TYPE_CHECKING:
    from megatron_muon.config import MuonConfig


@dataclass(frozen=True)
class Cut:
    """Cuts a part into logical matrices of equal size along rows (dim 0) or columns (dim 1).

    Attributes:
        dim: The dimension.
        size: Rows or columns of each; None if `count` is given.
        count: How many there are in the whole parameter; None if `size` is given.
    """

    dim: int
    size: int | None = None
    count: int | None = None


@dataclass(frozen=True)
class Section:
    """Rows of a parameter that follow each other and belong to one part.

    Attributes:
        label: The part's name; empty for the only part.
        rows: How many, in the whole parameter; None takes an equal share of what there is.
        cut: How to cut the part further; None keeps it whole.
    """

    label: str
    rows: int | None = None
    cut: Cut | None = None


@dataclass(frozen=True)
class Split:
    """How a parameter is made of logical matrices.

    Each TP rank stores its share of every group, one group after the other: [gate; up] of a gated MLP are two groups.
    What TP ranks store of one group are consecutive rows of it: Q, K and V of fused attention are one group. The
    sections of a group repeat until its rows end, if there is only one group.

    Attributes:
        groups: Groups of sections. Of all sections `rows` are given, or of none.
    """

    groups: tuple[tuple[Section, ...], ...]

    def __post_init__(self) -> None:
        rows = [section.rows for section in self.sections]
        alone = all(len(group) == 1 for group in self.groups)
        if not (all(rows) if any(rows) else alone and set(rows) == {None}):
            raise ValueError(f"split: got {_labels(self)}, expected rows of all parts or, in groups of one, of none")

    @property
    def sections(self) -> tuple[Section, ...]:
        return tuple(section for group in self.groups for section in group)

    def split(self, config: MuonConfig) -> Split:
        """Itself: a split that no setting changes is a kind of its own."""
        return self


class WeightKind(Protocol):
    """A kind of weights, with the sizes that decide on its splits."""

    def split(self, config: MuonConfig) -> Split:
        """The split under a run's settings."""
        ...


WHOLE = Split(((Section(""),),))


def pattern(sizes: Sequence[tuple[str, int]], cut: bool = False) -> Split:
    """A fused weight whose rows repeat the parts (label, rows) in turn; `cut` makes each repetition a matrix."""
    return Split((tuple(Section(label, rows, Cut(0, rows) if cut else None) for label, rows in sizes),))


@dataclass(frozen=True)
class FusedQkv:
    """Fused attention weights, whose rows repeat the same parts for each query group.

    Attributes:
        sizes: Label and rows of each part of a group.
        channels: Rows of a head.
    """

    sizes: tuple[tuple[str, int], ...]
    channels: int

    @classmethod
    def of_heads(cls, queries: int, channels: int, gate: bool = False) -> FusedQkv:
        """Of groups of so many query heads, (as many output gates,) a key and a value head, as Megatron has them."""
        query = queries * channels
        gates = (("gate", query),) if gate else ()
        return cls((("q", query), *gates, ("k", channels), ("v", channels)), channels)

    def split(self, config: MuonConfig) -> Split:
        """Whole, or as Q, K and V of all heads, of each group or of each head."""
        if config.qkv_split == "none":
            return WHOLE
        if config.qkv_split == "head":
            cut = Cut(0, self.channels)
            return Split((tuple(Section(label, rows, cut) for label, rows in self.sizes),))
        return pattern(self.sizes, cut=config.qkv_split == "group")


@dataclass(frozen=True)
class GatedMlp:
    """The first weight of a gated MLP, [gate; up] on each TP rank, or in turn if some kernel wants that.

    Attributes:
        interleave: Rows of gate and of up in turn; None if each TP rank has its gate, then its up.
    """

    interleave: int | None = None

    def split(self, config: MuonConfig) -> Split:
        """Whole, or as gate and up."""
        if not config.split_gated:
            return WHOLE
        if self.interleave:
            return pattern((("gate", self.interleave), ("up", self.interleave)))
        return Split(((Section("gate"),), (Section("up"),)))


@dataclass(frozen=True)
class LatentUp:
    """What makes heads of multi-head latent attention (MLA): for each head the given parts.

    Attributes:
        sizes: Label and rows of each part of a head.
    """

    sizes: tuple[tuple[str, int], ...]

    def split(self, config: MuonConfig) -> Split:
        """Whole, or as its parts, of all heads or of each."""
        return WHOLE if config.mla_split == "none" else pattern(self.sizes, cut=config.mla_split == "head")


@dataclass(frozen=True)
class LatentDown:
    """What compresses into MLA's latents: keys and values, followed by the shared rotary key; fused, queries before.

    Attributes:
        kv: Rows of the keys' and values' latent.
        rope: Rows of the rotary key.
        q: Rows of the queries' latent, where the projections are fused; 0 otherwise.
    """

    kv: int
    rope: int
    q: int = 0

    def split(self, config: MuonConfig) -> Split:
        """Queries apart in any case, as they are where Megatron does not fuse; the rotary key by choice."""
        if config.mla_split == "none":
            if not self.q:
                return WHOLE
            rest: tuple[Section, ...] = (Section("kv", self.kv + self.rope),)
        else:
            rest = (Section("kv", self.kv), Section("k_rope", self.rope))
        return Split(((Section("q", self.q),), rest)) if self.q else Split((rest,))


@dataclass(frozen=True)
class LatentOutput:
    """MLA's output projection, whose columns are the heads' values.

    Attributes:
        channels: Columns of a head.
    """

    channels: int

    def split(self, config: MuonConfig) -> Split:
        """Whole, or cut into heads."""
        return Split(((Section("", cut=Cut(1, self.channels)),),)) if config.mla_split == "head" else WHOLE


def spec_from_split(
    name: str,
    shape: tuple[int, ...],
    split: Split,
    *,
    tp_size: int = 1,
    partition_dim: int | None = None,
    tp_joined: bool = True,
) -> MatrixSpec:
    """The spec of a parameter.

    Args:
        name: Of the parameter.
        shape: (rows, cols) of the tensor that a TP rank stores; (matrices, rows, cols) of a stack of them, each of
            which the split is of.
        split: How the parameter, or each matrix of the stack, is made of logical matrices.
        tp_size: TP ranks that store it.
        partition_dim: 0 if these store different rows, 1 for columns (of each matrix), None if all store the whole.
        tp_joined: False makes each TP rank's piece a logical matrix of its own.

    Raises:
        ValueError: If the split does not divide the shape.
        NotImplementedError: If pieces are not to be joined and their parts differ.
    """
    *stack, rows, cols = shape
    pieces = tp_size if partition_dim == 0 else 1
    whole_cols = cols * tp_size if partition_dim == 1 else cols
    parts = parts_of(name, split, rows, whole_cols, pieces)
    if not tp_joined and any(part.pieces for part in parts):
        raise NotImplementedError(
            f"{name}: its {pieces} tensor-parallel pieces have different rows of {_labels(split)}, and tp_mode "
            "blockwise needs pieces that are alike; choose tp_mode exact, or switch the split off"
        )
    if stack:
        parts = tuple(_shifted(part, f"expert{i}", i * rows) for i in range(stack[0]) for part in parts)
    return MatrixSpec(name, (math.prod(stack) * rows, cols), tp_size, partition_dim, parts, tp_joined)


def parts_of(name: str, split: Split, rows: int, cols: int, pieces: int) -> tuple[Part, ...]:
    """The parts of a parameter with `rows` rows on each of `pieces` TP ranks and `cols` columns on all together.

    Raises:
        ValueError: If the split does not divide the rows.
    """
    bounds = _group_bounds(name, split, rows, pieces)
    parts = []
    for group, (first, last) in zip(split.groups, pairwise(bounds)):
        extent = last - first
        sizes = [section.rows if section.rows is not None else extent * pieces for section in group]
        total, period = extent * pieces, sum(sizes)
        if total % period:
            raise ValueError(
                f"{name}: {total} rows do not divide into repetitions of {_labels(split)} = {period} rows; check the "
                "head and query group counts, or switch the split off"
            )
        for section, size, offset in zip(group, sizes, accumulate(sizes, initial=0)):
            whole = [(at + offset, at + offset + size) for at in range(0, total, period)]
            by_piece = tuple(tuple(_clipped(whole, piece * extent, extent, first)) for piece in range(pieces))
            alike = len(set(by_piece)) == 1
            blocks = _blocks(name, section, len(whole) * size, cols)
            parts.append(Part(section.label, by_piece[0] if alike else (), blocks, () if alike else by_piece))
    return tuple(parts)


def _group_bounds(name: str, split: Split, rows: int, pieces: int) -> list[int]:
    """Where the groups begin in a TP rank's tensor, and where the last one ends."""
    groups = split.groups
    if len(groups) == 1:
        return [0, rows]
    if all(section.rows is None for section in split.sections):
        if rows % len(groups):
            raise ValueError(f"{name}: {rows} rows on a rank are not {len(groups)} equal parts: {_labels(split)}")
        return list(range(0, rows + 1, rows // len(groups)))
    sizes = [sum(section.rows or 0 for section in group) for group in groups]
    if sum(sizes) != rows * pieces or any(size % pieces for size in sizes):
        raise ValueError(
            f"{name}: {rows} rows on each of {pieces} tensor-parallel ranks are not {_labels(split)}, expected "
            f"{rows * pieces} rows in all, of each part as many on every rank"
        )
    return list(accumulate((size // pieces for size in sizes), initial=0))


def _clipped(ranges: list[tuple[int, int]], start: int, extent: int, shift: int) -> Iterator[tuple[int, int]]:
    """What [start, start + extent) has of some ranges, counted from `start` on, plus `shift`."""
    for first, last in ranges:
        low, high = max(first - start, 0), min(last - start, extent)
        if low < high:
            yield low + shift, high + shift


def _blocks(name: str, section: Section, rows: int, cols: int) -> Blocks | None:
    cut = section.cut
    if cut is None:
        return None
    extent = (rows, cols)[cut.dim]
    size = cut.size
    if size is None:
        count = cut.count or 0
        if count < 1 or extent % count:
            raise ValueError(
                f"{'.'.join(filter(None, (name, section.label)))}: {extent} {('rows', 'columns')[cut.dim]} do not "
                f"divide into {count} blocks of equal size"
            )
        size = extent // count
    return Blocks(cut.dim, size)


def _shifted(part: Part, label: str, by: int) -> Part:
    def moved(ranges: Ranges) -> Ranges:
        return tuple((start + by, stop + by) for start, stop in ranges)

    return replace(
        part,
        label=".".join(filter(None, (label, part.label))),
        rows=moved(part.rows),
        pieces=tuple(map(moved, part.pieces)),
    )


def _labels(split: Split) -> str:
    return " + ".join(
        f"{section.rows} ({section.label})" if section.rows is not None else section.label for section in split.sections
    )
