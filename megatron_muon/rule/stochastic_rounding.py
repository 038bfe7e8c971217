"""Stochastic rounding to bf16 whose random bits belong to the element, not to the rank that stores it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
# Multipliers of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit numbers: torch has no unsigned sums.
_GOLDEN, _FIRST, _SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def stream(name: str, step: int) -> int:
    """The signed 64-bit number that selects the random bits of one parameter in one step."""
    digest = hashlib.sha256(f"{step} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def random_bits(numbers: Tensor, stream_id: int) -> Tensor:
    """16 uniformly distributed bits for each number: splitmix64's output function on a counter.

    Args:
        numbers: int64, any shape; not mutated.
        stream_id: From `stream`.

    Returns:
        int64 in [0, 2^16), of the same shape.
    """
    x = numbers * _GOLDEN + stream_id
    # A shift of a signed number brings in its sign; the mask takes that out again.
    x ^= (x >> 30) & (_MASK >> 30)
    x *= _FIRST
    x ^= (x >> 27) & (_MASK >> 27)
    x *= _SECOND
    return (x >> 48) & 0xFFFF


def stochastic_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds to one of the two neighbours in bf16, to each with a probability in proportion to its nearness.

    bf16 is the upper half of fp32: random bits are added to the lower half, which is then cut off. inf and NaN stay.

    Args:
        values: fp32, any shape; not mutated.
        bits: 16 random bits for each, int64.

    Returns:
        bf16, of the same shape.
    """
    rounded = ((values.view(torch.int32) + bits.to(torch.int32)) & -0x10000).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
