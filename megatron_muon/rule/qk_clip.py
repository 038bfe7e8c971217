"""QK-Clip: which rows of query and key weights are scaled, and by how much. Knows neither ranks nor Megatron.

A head whose largest attention logit of a step is above the threshold tau has its logits multiplied by
gamma = tau / largest, by scaling what makes them. Source: Kimi K2 (arXiv 2507.20534), section 2.1 and algorithm 1.

A key that several query heads share (grouped queries) takes only what all of them need: the paper leaves MLA's shared
rotary key alone for the same reason. With c the largest gamma of the group,

    key: c^(1 - alpha)        query of head h: gamma_h / c^(1 - alpha)

so that the logits of each head are multiplied by its own gamma, a head below the threshold keeps its weights and its
logits bit for bit, and nothing is ever scaled up. With one head to a key these are gamma^(1 - alpha) and gamma^alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# rotary_query: of MLA, whose key is shared by all heads and stays as it is.
Role = Literal["query", "rotary_query", "key"]


@dataclass(frozen=True)
class HeadRows:
    """Rows of a weight that make one head's queries, or the keys of a group of heads.

    Attributes:
        start: The first row.
        stop: One past the last.
        role: What they make.
        heads: The query heads that share the key; for queries, of the same group as the head itself.
        head: The query head; for a key, the group's first.
    """

    start: int
    stop: int
    role: Role
    heads: range
    head: int


@dataclass(frozen=True)
class RowFactor:
    """Rows [start, stop) of a weight are multiplied by `factor`."""

    start: int
    stop: int
    factor: float


@dataclass(frozen=True)
class ClipRule:
    """Threshold and balance of QK-Clip.

    Attributes:
        threshold: tau: logits above it are scaled down to it.
        alpha: The share of a head's gamma, as an exponent, that queries take; keys take the rest.

    Raises:
        ValueError: If the threshold is not positive, or alpha not in [0, 1].
    """

    threshold: float
    alpha: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise ValueError(f"--qk-clip-threshold: got {self.threshold}, expected a positive number; correct it")
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"--qk-clip-alpha: got {self.alpha}, expected a number in [0, 1], the queries' share; correct it"
            )

    def gammas(self, largest: Sequence[float]) -> list[float]:
        """What each head's logits are multiplied by; 1 where they are not above the threshold, or not finite.

        Args:
            largest: Each head's largest logit; of any sign, -inf where nothing was attended to.
        """
        return [self.threshold / x if math.isfinite(x) and x > self.threshold else 1.0 for x in largest]

    def row_factors(self, rows: Iterable[HeadRows], gammas: Sequence[float]) -> list[RowFactor]:
        """What `rows` of a weight are multiplied by; rows that stay as they are are left out."""
        out = [RowFactor(r.start, r.stop, self._factor(r, gammas)) for r in rows]
        return [row_factor for row_factor in out if row_factor.factor != 1.0]

    def _factor(self, rows: HeadRows, gammas: Sequence[float]) -> float:
        if rows.role == "rotary_query":
            return gammas[rows.head]
        key = math.pow(max(gammas[head] for head in rows.heads), 1 - self.alpha)
        return key if rows.role == "key" else gammas[rows.head] / key


def grouped_rows(num_heads: int, num_groups: int, width: int, *, gated: bool = False) -> tuple[HeadRows, ...]:
    """Rows of a fused QKV weight: per group its query heads, (their output gates,) one key head, one value head.

    Args:
        num_heads: Query heads in the weight.
        num_groups: Keys in the weight.
        width: Rows of a head.
        gated: Whether there are output gates.
    """
    queries = num_heads // num_groups
    period = (queries * (2 if gated else 1) + 2) * width
    out = []
    for group in range(num_groups):
        heads = range(group * queries, (group + 1) * queries)
        at = group * period
        out += [HeadRows(at + i * width, at + (i + 1) * width, "query", heads, head) for i, head in enumerate(heads)]
        key = (group + 1) * period - 2 * width
        out.append(HeadRows(key, key + width, "key", heads, heads.start))
    return tuple(out)


def mla_query_rows(num_heads: int, width: int, rotary_width: int) -> tuple[HeadRows, ...]:
    """Rows of MLA's (up-)projection of queries: per head `width` rows, then `rotary_width` rotary ones."""
    out = []
    for head in range(num_heads):
        at = head * (width + rotary_width)
        own = range(head, head + 1)
        out.append(HeadRows(at, at + width, "query", own, head))
        out.append(HeadRows(at + width, at + width + rotary_width, "rotary_query", own, head))
    return tuple(out)


def mla_key_rows(num_heads: int, width: int, value_width: int) -> tuple[HeadRows, ...]:
    """Rows of MLA's up-projection of keys and values: per head `width` rows of keys, then `value_width` of values."""
    starts = [head * (width + value_width) for head in range(num_heads)]
    return tuple(HeadRows(at, at + width, "key", range(h, h + 1), h) for h, at in enumerate(starts))


@torch.no_grad()
def scale_rows(values: Tensor, first: int, cols: int, row_factors: Iterable[RowFactor]) -> None:
    """Multiplies the rows of a weight that lie in a slice of it.

    Args:
        values: 1-D: consecutive elements of the weight, flattened. They may begin and end within a row. Mutated.
        first: Where in the weight the first of them is.
        cols: Columns of the weight; 1 for a bias.
        row_factors: What to do, in rows of the weight.
    """
    for row_factor in row_factors:
        # A row range is one flat range, wherever slices cut it.
        start = max(row_factor.start * cols - first, 0)
        stop = min(row_factor.stop * cols - first, values.numel())
        if start < stop:
            values[start:stop].mul_(row_factor.factor)
