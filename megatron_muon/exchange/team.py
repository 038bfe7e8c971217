"""Newton-Schulz on one matrix by several ranks, each with a band of its long side. No ranks here: members talk.

With X = (X_1 ... X_k), m x n, and member i holding the columns X_i, everything but the sum G = sum_i X_i X_i^T is
local: X_i <- (a I + b G + c G^2) X_i. Each step all-reduces the m x m partial products, as a reduce-scatter of row
blocks and an all-gather, so that every member works with the same bits of G. G is symmetric, so that a block of rows
[a, b) travels as its columns [0, b), and blocks are cut such that these have equal areas. The polynomial is applied in
one of two ways: with Y = G X_i as a X_i + b Y + c G Y, nothing of which is done twice, or *divided*: each member
computes its block of P = b G + c G^2, the blocks are gathered, and X_i <- a X_i + P X_i. The first does 6 m^2 n
operations a step in all, the second 4 m^2 n + m^3 and another all-gather.

A team that spans nodes reduces within each node first and between nodes only what is left, a part of G as small as
the node is large.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from megatron_muon.config import TORCH_DTYPES, MuonConfig, owner_factor
from megatron_muon.exchange.lockstep import Message, Talk
from megatron_muon.newton_schulz import (
    MARGIN,
    Scaling,
    Schedule,
    accumulation_dtype,
    check_schedule,
    coefficients,
    power_of_two_and_norm,
    row_scales,
    scaling_for,
)
from megatron_muon.plan.seats import Seat


def orthogonalize_band(
    x: Tensor,
    seat: Seat,
    schedule: Schedule,
    *,
    divided: bool,
    dtype: torch.dtype,
    scaling: Scaling = "frobenius",
) -> Talk:
    """A member's part of orthogonalizing (X_1 ... X_k); the counterpart of `newton_schulz.orthogonalize`.

    The norm is that of `x` and taken in its data type; sums of 16-bit numbers are in float32. The members' results are
    those of one rank up to the order of sums, and the same in every run.

    Args:
        x: This member's columns (m, n_i), n_i >= 1, of a matrix with m <= sum n_i, in float32 or float64. Not mutated.
        seat: The member's place.
        schedule: Quintics from `coefficients`.
        divided: Whether to divide the polynomial; the same for all members.
        dtype: Data type of the iterations and of what members send.
        scaling: That the schedule needs; see `newton_schulz.scaling_for`.

    Returns:
        The talk, whose result is the member's columns of U p(S) V^T, in `dtype`.

    Raises:
        ValueError: Before anything is said, if the schedule does not orthogonalize under this scaling.
    """
    check_schedule(schedule, scaling)
    return _talk(x, seat, schedule, divided, dtype, scaling)


def _talk(x: Tensor, seat: Seat, schedule: Schedule, divided: bool, dtype: torch.dtype, scaling: Scaling) -> Talk:
    # Normalized before the cast: gradients may lie outside float16's range.
    y = (yield from _normalized(x, seat, max(MARGIN, torch.finfo(dtype).eps))).to(dtype)
    for step, (a, b, c) in enumerate(schedule):
        gram = yield from _all_reduce(y @ y.mT, seat)
        if step == 0 and scaling == "aol":
            # Every member computes the same factors, since it has all of the Gram matrix and all rows of its columns.
            scale = row_scales(gram)
            y.mul_(scale)
            gram.mul_(scale).mul_(scale.mT)
        if divided:
            start, stop = seat.rows(len(gram), seat.member)
            own = torch.addmm(gram[start:stop, :stop], gram[start:stop], gram[:, :stop], beta=b, alpha=c)
            polynomial = yield from _all_gather(own, seat, len(gram))
            y = torch.addmm(y, polynomial, y, beta=a)
        else:
            z = gram @ y
            y = torch.addmm(z, gram, z, beta=b, alpha=c).add_(y, alpha=a)
    return y


def _normalized(x: Tensor, seat: Seat, margin: float) -> Generator[Message, Sequence[Tensor], Tensor]:
    """x over (1 + margin) times the norm of the whole matrix; zero stays zero. See `newton_schulz.normalize`.

    Members divide by different powers of two, so that the power travels with the norm.
    """
    scaled = torch.empty_like(x, memory_format=torch.contiguous_format)
    power, norm = (value.view(()) for value in power_of_two_and_norm(x, scaled))
    received = yield Message([torch.stack([power, norm])] * seat.size, [(2,)] * seat.size)
    powers, norms = torch.stack(list(received)).unbind(dim=1)
    # Dividing by another power of two is exact, except for entries that are negligibly small.
    largest = powers.amax()
    total = torch.linalg.vector_norm(norms * (powers / largest))
    total.mul_(1.0 + margin).clamp_(min=torch.finfo(x.dtype).tiny)
    return torch.div(x, largest, out=scaled).div_(total)


def _sum(blocks: Sequence[Tensor]) -> Tensor:
    """The sum in the order of the members, rounded once."""
    first = blocks[0]
    total = first.to(accumulation_dtype(first.dtype), copy=True)
    for block in blocks[1:]:
        total.add_(block)
    return total.to(first.dtype)


def _among(
    members: Sequence[int], seat: Seat, blocks: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]
) -> Generator[Message, Sequence[Tensor], list[Tensor]]:
    """Exchanges blocks with some members; the others get nothing."""
    nothing = blocks[0][:0]
    to, of = dict(zip(members, blocks, strict=True)), dict(zip(members, shapes, strict=True))
    received = yield Message(
        [to.get(member, nothing) for member in range(seat.size)], [of.get(member, (0,)) for member in range(seat.size)]
    )
    return [received[member] for member in members]


def _all_reduce(partial: Tensor, seat: Seat) -> Generator[Message, Sequence[Tensor], Tensor]:
    """The sum of the members' symmetric matrices, the same bits for all."""
    total = len(partial)
    near = [seat.near_rows(total, member) for member in seat.near]
    start, stop = seat.near_rows(total, seat.member)
    blocks = yield from _among(
        seat.near, seat, [partial[a:b, :b] for a, b in near], [(stop - start, stop)] * seat.group_size
    )
    own = _sum(blocks)
    if seat.groups > 1:
        far = [seat.rows(total, member) for member in seat.far]
        first, last = seat.rows(total, seat.member)
        blocks = yield from _among(
            seat.far, seat, [own[a - start : b - start, :b] for a, b in far], [(last - first, last)] * seat.groups
        )
        own = _sum(blocks)
    return (yield from _all_gather(own, seat, total))


def _all_gather(own: Tensor, seat: Seat, total: int) -> Generator[Message, Sequence[Tensor], Tensor]:
    """The whole symmetric matrix of `total` rows, from each member's `rows`, columns up to the last row's."""
    if seat.groups > 1:
        far = [seat.rows(total, member) for member in seat.far]
        blocks = yield from _among(seat.far, seat, [own] * seat.groups, [(b - a, b) for a, b in far])
        own = _assembled(blocks, far)
    near = [seat.near_rows(total, member) for member in seat.near]
    blocks = yield from _among(seat.near, seat, [own] * seat.group_size, [(b - a, b) for a, b in near])
    return _assembled(blocks, near)


def _assembled(blocks: Sequence[Tensor], rows: Sequence[tuple[int, int]]) -> Tensor:
    """Consecutive row blocks of a symmetric matrix up to the last row's column, what they lack being mirrored."""
    first, last = rows[0][0], rows[-1][1]
    out = blocks[0].new_empty(last - first, last)
    for block, (start, stop) in zip(blocks, rows, strict=True):
        out[start - first : stop - first, :stop] = block
        out[: start - first, start:stop] = block[:, first:start].mT
    return out


def band_update(
    collected: Tensor, rows: int, cols: int, dim: int, seat: Seat, config: MuonConfig, *, divided: bool
) -> Talk:
    """A team member's part of what `orthogonalized_updates` does for one matrix.

    Args:
        collected: The member's band, in any floating dtype; mutated when the talk ends.
        rows: Of the matrix.
        cols: Of the matrix.
        dim: 0 if the bands are rows, 1 if they are columns.
        seat: The member's place in the team.
        config: Coefficients, steps and scale.
        divided: Whether the team divides the polynomial.

    Returns:
        The talk, whose result is `collected`.
    """
    wide = collected if dim == 1 else collected.mT
    update = yield from orthogonalize_band(
        wide.float(),
        seat,
        coefficients(config.coefficients, config.ns_steps),
        divided=divided,
        dtype=TORCH_DTYPES[config.ns_dtype],
        scaling=scaling_for(config.coefficients),
    )
    wide.copy_(update.float().mul_(owner_factor(rows, cols, config)))
    return collected
