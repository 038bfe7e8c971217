"""Copies between fixed places, prepared once and run in every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_muon.matrices.shares import Strip


@dataclass
class Copies:
    """Pairs of views of persistent buffers.

    Contiguous pairs run in a few kernels. One strided pair would make `torch._foreach_copy_` launch one kernel for
    each pair of its list, so that strided pairs have a list of their own.
    """

    _contiguous: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    _strided: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))

    def add(self, destination: Tensor, source: Tensor) -> None:
        """Adds a pair of one shape; their data types may differ."""
        dense = destination.is_contiguous() and source.is_contiguous()
        pairs = self._contiguous if dense else self._strided
        pairs[0].append(destination)
        pairs[1].append(source)

    def __bool__(self) -> bool:
        return bool(self._contiguous[0] or self._strided[0])

    def run(self) -> None:
        """Copies every source to its destination."""
        for destinations, sources in (self._contiguous, self._strided):
            if destinations:
                torch._foreach_copy_(destinations, sources)


def paired(first: Sequence[Strip], second: Sequence[Strip]) -> Iterator[tuple[Strip, Strip]]:
    """Cuts two lists of strips that hold the same elements in the same order into pairs of one shape."""
    one, other = list(first), list(second)
    while one and other:
        a, b = one[0], other[0]
        rows, width = _common(a, b)
        for strips, strip in ((one, a), (other, b)):
            strips[:1] = _without(strip, rows * width)
        yield _head(a, rows, width), _head(b, rows, width)


def _common(a: Strip, b: Strip) -> tuple[int, int]:
    """(rows, width) of the largest beginning that both strips can be viewed as."""
    if a.rows == 1 and b.rows == 1:
        return 1, min(a.width, b.width)
    if a.rows > 1 and b.rows > 1:
        return (min(a.rows, b.rows), a.width) if a.width == b.width else (1, min(a.width, b.width))
    run, rows = (a, b) if a.rows == 1 else (b, a)
    whole = min(rows.rows, run.width // rows.width)
    return (whole, rows.width) if whole else (1, run.width)


def _head(strip: Strip, rows: int, width: int) -> Strip:
    pitch = strip.pitch if strip.rows > 1 else width
    return Strip(strip.offset, rows, width, pitch)


def _without(strip: Strip, numel: int) -> list[Strip]:
    """What is left of a strip without its first elements: whole rows of several, or a beginning of one row."""
    if numel == strip.numel:
        return []
    if strip.rows == 1:
        return [Strip(strip.offset + numel, 1, strip.width - numel, strip.pitch)]
    whole, partial = divmod(numel, strip.width)
    at, left = strip.offset + whole * strip.pitch, strip.rows - whole
    if not partial:
        return [Strip(at, left, strip.width, strip.pitch)]
    out = [Strip(at + partial, 1, strip.width - partial, strip.pitch)]
    return [*out, Strip(at + strip.pitch, left - 1, strip.width, strip.pitch)] if left > 1 else out
