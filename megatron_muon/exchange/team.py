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

import math
from collections.abc import Generator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from megatron_muon.config import TORCH_DTYPES, MuonConfig, owner_factor
from megatron_muon.exchange.lockstep import Message, Talk
from megatron_muon.newton_schulz import (
    MARGIN,
    Scaling,
    Schedule,
    check_schedule,
    coefficients,
    power_of_two_and_norm,
    row_scales,
    scaling_for,
)
from megatron_muon.plan.seats import Seat
from megatron_muon.rule.adaptive import advance_line_moments, line_factors

Rows = tuple[int, int]


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


def _normalized(x: Tensor, seat: Seat, margin: float) -> Generator[Message, Tensor, Tensor]:
    """x over (1 + margin) times the norm of the whole matrix; zero stays zero. See `newton_schulz.normalize`.

    Members divide by different powers of two, so that the power travels with the norm.
    """
    scaled = torch.empty_like(x, memory_format=torch.contiguous_format)
    power, norm = power_of_two_and_norm(x, scaled)
    powers, norms = (yield from _to_all(torch.cat([power.view(1), norm.view(1)]), seat)).unbind(dim=1)
    # Dividing by another power of two is exact, except for entries that are negligibly small.
    largest = powers.amax()
    total = torch.linalg.vector_norm(norms * (powers / largest))
    total.mul_(1.0 + margin).clamp_(min=torch.finfo(x.dtype).tiny)
    return torch.div(x, largest, out=scaled).div_(total)


def _to_all(values: Tensor, seat: Seat) -> Generator[Message, Tensor, Tensor]:
    """Sends a few values to every member; (members, values) is returned, the same on all of them."""
    counts = [values.numel()] * seat.size
    received = yield Message(values.repeat(seat.size), counts, counts)
    return received.view(seat.size, -1)


def _among(
    members: Sequence[int], seat: Seat, blocks: Tensor, sent: Sequence[int], received: Sequence[int]
) -> Generator[Message, Tensor, Tensor]:
    """Exchanges blocks with some members; the others get nothing."""
    to, of = [0] * seat.size, [0] * seat.size
    for member, out, back in zip(members, sent, received, strict=True):
        to[member], of[member] = out, back
    return (yield Message(blocks, to, of))


def _all_reduce(partial: Tensor, seat: Seat) -> Generator[Message, Tensor, Tensor]:
    """The sum of the members' symmetric matrices, the same bits for all."""
    total = len(partial)
    start, stop = seat.near_rows(total, seat.member)
    near = [seat.near_rows(total, member) for member in seat.near]
    own = yield from _reduce_scatter(partial, 0, seat.near, near, (start, stop), seat)
    if seat.groups > 1:
        far = [seat.rows(total, member) for member in seat.far]
        own = yield from _reduce_scatter(own, start, seat.far, far, seat.rows(total, seat.member), seat)
    return (yield from _all_gather(own, seat, total))


def _reduce_scatter(
    matrix: Tensor, first_row: int, members: Sequence[int], rows: Sequence[Rows], own: Rows, seat: Seat
) -> Generator[Message, Tensor, Tensor]:
    """The sum of some members' matrices, `own` rows of it; `matrix` begins at row `first_row`."""
    areas = [(stop - start) * stop for start, stop in rows]
    start, stop = own
    packed = _packed(matrix, first_row, tuple(rows))
    received = yield from _among(members, seat, packed, areas, [(stop - start) * stop] * len(members))
    return _sum(received.view(len(members), stop - start, stop))


def _all_gather(own: Tensor, seat: Seat, total: int) -> Generator[Message, Tensor, Tensor]:
    """The whole symmetric matrix of `total` rows, from each member's `rows`, columns up to the last row's."""
    steps: list[tuple[range, list[Rows]]] = [(seat.near, [seat.near_rows(total, member) for member in seat.near])]
    if seat.groups > 1:
        steps.insert(0, (seat.far, [seat.rows(total, member) for member in seat.far]))
    for members, rows in steps:
        areas = [(stop - start) * stop for start, stop in rows]
        received = yield from _among(
            members, seat, own.repeat(len(members), 1).view(-1), [own.numel()] * len(members), areas
        )
        own = _assembled(received, tuple(rows))
    return own


def _sum(blocks: Tensor) -> Tensor:
    """The sum over the first dimension; 16-bit numbers are summed in float32 and rounded once."""
    return torch.sum(blocks, dim=0)


# Blocks of small matrices are packed and placed by one look-up each, because starting a copy for every member takes
# longer than the copies do. The tables take 4 bytes an element of the symmetric matrix: 16 MiB at 2048 rows.
_LOOKUP_ROWS = 2048


def _packed(matrix: Tensor, first_row: int, rows: tuple[Rows, ...]) -> Tensor:
    """Row blocks of a matrix that begins at row `first_row`, up to the last row's column, one after the other; 1-D."""
    if len(matrix) <= _LOOKUP_ROWS:
        return torch.index_select(matrix.view(-1), 0, _pack_table(tuple(matrix.shape), first_row, rows, matrix.device))
    return _copy_blocks(matrix, first_row, rows)


def _copy_blocks(matrix: Tensor, first_row: int, rows: tuple[Rows, ...]) -> Tensor:
    return torch.cat([matrix[start - first_row : stop - first_row, :stop].reshape(-1) for start, stop in rows])


def _assembled(blocks: Tensor, rows: tuple[Rows, ...]) -> Tensor:
    """Consecutive row blocks of a symmetric matrix up to the last row's column, what they lack being mirrored."""
    first, last = rows[0][0], rows[-1][1]
    if last <= _LOOKUP_ROWS:
        return torch.index_select(blocks, 0, _place_table(rows, blocks.device)).view(last - first, last)
    return _place_blocks(blocks, rows)


def _place_blocks(blocks: Tensor, rows: tuple[Rows, ...]) -> Tensor:
    first, last = rows[0][0], rows[-1][1]
    out = blocks.new_empty(last - first, last)
    sizes = [(stop - start) * stop for start, stop in rows]
    for flat, (start, stop) in zip(torch.split(blocks, sizes), rows, strict=True):
        block = flat.view(stop - start, stop)
        out[start - first : stop - first, :stop] = block
        out[: start - first, start:stop] = block[:, first:start].mT
    return out


@lru_cache(maxsize=64)
def _pack_table(shape: tuple[int, int], first_row: int, rows: tuple[Rows, ...], device: torch.device) -> Tensor:
    numbers = torch.arange(math.prod(shape), dtype=torch.int32, device=device)
    return _copy_blocks(numbers.view(shape), first_row, rows)


@lru_cache(maxsize=64)
def _place_table(rows: tuple[Rows, ...], device: torch.device) -> Tensor:
    numel = sum((stop - start) * stop for start, stop in rows)
    return _place_blocks(torch.arange(numel, dtype=torch.int32, device=device), rows).view(-1)


def band_update(
    band: Tensor,
    shape: tuple[int, int],
    dim: int,
    seat: Seat,
    config: MuonConfig,
    *,
    divided: bool,
    line_moments: Tensor | None = None,
) -> Talk:
    """A team member's part of what `rule.muon.orthogonalized_updates` does for one matrix.

    Args:
        band: The member's band; becomes its update when the talk ends.
        shape: (rows, cols) of the matrix.
        dim: 0 if the bands are rows, 1 if they are columns.
        seat: The member's place in the team.
        config: Coefficients, steps and scale.
        divided: Whether the team divides the polynomial.
        line_moments: NorMuon's running mean squares of the band's lines, which takes one more message; mutated.

    Returns:
        The talk; its result is `band`.
    """
    wide = band if dim == 1 else band.mT
    update = yield from orthogonalize_band(
        wide.float(),
        seat,
        coefficients(config.coefficients, config.ns_steps),
        divided=divided,
        dtype=TORCH_DTYPES[config.ns_dtype],
        scaling=scaling_for(config.coefficients),
    )
    if line_moments is None:
        wide.copy_(update.float().mul_(owner_factor(*shape, config)))
        return band
    # The band has all of its lines, the long side's, but the matrix's norm takes all members' sums.
    norms = torch.linalg.vector_norm(update, dim=0, dtype=torch.float32)
    means = norms.square_().div_(len(update))
    sums = (yield from _to_all(advance_line_moments(line_moments, means, config).to(torch.float32), seat)).sum(dim=0)
    factors = line_factors(line_moments, sums.double(), shape, config)
    torch.mul(update, factors, out=wide)
    return band
