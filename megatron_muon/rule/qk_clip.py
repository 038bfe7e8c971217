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

    def gammas(self, largest: Tensor) -> Tensor:
        """What each head's logits are multiplied by; 1 where they are not above the threshold, or not finite.

        Args:
            largest: (heads,): each head's largest logit; of any sign, -inf where nothing was attended to.

        Returns:
            (heads,) fp64.
        """
        return gammas(largest, torch.full_like(largest, self.threshold, dtype=torch.float64))

    def factors(self, rows: Sequence[HeadRows], gammas: Tensor) -> Tensor:
        """What each of `rows` is multiplied by, (rows,) fp64; `gammas` are those of all heads that they name."""
        return FactorTable.of([(rows, 0, self.alpha)], gammas.device).factors(gammas)


def gammas(largest: Tensor, thresholds: Tensor) -> Tensor:
    """As `ClipRule.gammas`, with a threshold for each head. Waits for no device."""
    values = largest.double()
    above = values.isfinite() & (values > thresholds)
    return torch.where(above, thresholds / values, 1.0)


@dataclass(frozen=True)
class FactorTable:
    """From gammas of many heads to the factors of many row ranges, in a few operations on the device.

    Attributes:
        group: (ranges, most heads of a group): the heads that share each range's key; a shorter group repeats its last.
        head: (ranges,): the range's own head.
        is_key: (ranges,).
        is_rotary: (ranges,).
        key_power: (ranges,) fp64: 1 - alpha.
    """

    group: Tensor
    head: Tensor
    is_key: Tensor
    is_rotary: Tensor
    key_power: Tensor

    @classmethod
    def of(cls, parts: Iterable[tuple[Sequence[HeadRows], int, float]], device: torch.device) -> FactorTable:
        """The table of rows of several weights.

        Args:
            parts: For each weight: its rows, the position of its head 0 among all heads, and alpha.
            device: Where the gammas are.
        """
        ranges = [(row, first, alpha) for rows, first, alpha in parts for row in rows]
        most = max((len(row.heads) for row, _, _ in ranges), default=1)
        groups = [[first + row.heads[min(i, len(row.heads) - 1)] for i in range(most)] for row, first, _ in ranges]
        return cls(
            torch.tensor(groups, dtype=torch.long, device=device).view(len(ranges), most),
            torch.tensor([first + row.head for row, first, _ in ranges], dtype=torch.long, device=device),
            torch.tensor([row.role == "key" for row, _, _ in ranges], dtype=torch.bool, device=device),
            torch.tensor([row.role == "rotary_query" for row, _, _ in ranges], dtype=torch.bool, device=device),
            torch.tensor([1 - alpha for _, _, alpha in ranges], dtype=torch.float64, device=device),
        )

    def factors(self, gammas: Tensor) -> Tensor:
        """(ranges,) fp64, from the gammas of all heads."""
        own = gammas[self.head]
        key = gammas[self.group].amax(1) ** self.key_power
        return torch.where(self.is_rotary, own, torch.where(self.is_key, key, own / key))


def range_of_row(rows: Sequence[HeadRows], num_rows: int) -> list[int]:
    """For each row of a weight, which of `rows` it lies in; `len(rows)` for a row that lies in none."""
    out = [len(rows)] * num_rows
    for index, row in enumerate(rows):
        out[row.start : row.stop] = [index] * (row.stop - row.start)
    return out


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
def scale_rows(values: Tensor, first: int, cols: int, factors: Tensor) -> None:
    """Multiplies the rows of a weight that lie in a slice of it; a factor of 1 leaves every bit.

    Args:
        values: 1-D: consecutive elements of the weight, flattened. They may begin and end within a row. Mutated.
        first: Where in the weight the first of them is.
        cols: Columns of the weight; 1 for a bias.
        factors: The factor of each row of the weight, in the dtype of `values`.
    """
    row, offset = divmod(first, cols)
    # The rest of a row, whole rows, the beginning of a row.
    head = min(cols - offset, values.numel()) if offset else 0
    if head:
        values[:head].mul_(factors[row])
        row += 1
    whole = (values.numel() - head) // cols
    if whole:
        values[head : head + whole * cols].view(whole, cols).mul_(factors[row : row + whole, None])
    tail = head + whole * cols
    if tail < values.numel():
        values[tail:].mul_(factors[row + whole])
