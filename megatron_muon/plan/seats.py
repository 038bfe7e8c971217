"""Places in a team, and the blocks of rows that its members own. Numbers only: no tensors, no communication."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Seat:
    """A member's place in its team.

    Attributes:
        member: Number of the member.
        size: Members of the team.
        groups: Number of nodes the team is made of; members of a node follow each other, and are as many on each.
    """

    member: int
    size: int
    groups: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.member < self.size and self.groups >= 1 and self.size % self.groups == 0):
            raise ValueError(f"got member {self.member} of {self.size} in {self.groups} groups of equal size")

    @property
    def group_size(self) -> int:
        return self.size // self.groups

    @property
    def near(self) -> range:
        """Members of the own group."""
        first = self.member - self.member % self.group_size
        return range(first, first + self.group_size)

    @property
    def far(self) -> range:
        """The member with this place in each group."""
        return range(self.member % self.group_size, self.size, self.group_size)

    def block(self, member: int) -> int:
        """The row block that a member ends up with: those of `far` members follow each other."""
        group, place = divmod(member, self.group_size)
        return place * self.groups + group

    def rows(self, total: int, member: int) -> tuple[int, int]:
        """The rows [start, stop) of `total` that a member ends up with."""
        bounds, block = block_bounds(total, self.size), self.block(member)
        return bounds[block], bounds[block + 1]

    def near_rows(self, total: int, member: int) -> tuple[int, int]:
        """The rows that a member's `far` members end up with together, itself included."""
        bounds, first = block_bounds(total, self.size), member % self.group_size * self.groups
        return bounds[first], bounds[first + self.groups]


@lru_cache(maxsize=1024)
def block_bounds(total: int, count: int) -> tuple[int, ...]:
    """Cuts `total` rows into `count` blocks [a, b) of nearly equal area (b - a) b: what is sent of a symmetric matrix.

    Blocks begin at multiples of 16 rows, so that matrix units get even sizes and a message's segments begin at
    multiples of 16 bytes in any data type. Where 16 rows are more than an eighth of the average block, areas would
    differ too much: then at multiples of 8, 4, 2 or 1 rows, of which 4 and more keep segments aligned too. The last
    block ends at `total`. With fewer rows than blocks, some blocks are empty.

    From b_i (b_i - b_(i-1)) = 1 for all i follows b_i; the scale does not matter.
    """
    ends = [0.0]
    for _ in range(count):
        ends.append((ends[-1] + math.sqrt(ends[-1] ** 2 + 4.0)) / 2.0)
    unit = next((unit for unit in _ROW_UNITS if total >= 8 * unit * count), 1)
    inner = [round(total * end / ends[-1] / unit) * unit for end in ends[:-1]]
    return (*inner, total)


_ROW_UNITS = (16, 8, 4, 2)
