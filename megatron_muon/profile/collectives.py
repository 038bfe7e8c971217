"""The collectives that are measured: how each is called, on what values, and what has to come out.

Values are small whole numbers, which every data type here holds exactly, also in sums over any number of ranks and in
any order, so that results are compared for equality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.profile.busbw import Collective

Placement = Literal["out_of_place", "in_place"]
PLACEMENTS: tuple[Placement, ...] = ("out_of_place", "in_place")

# A prime, so that a shift by any power of two is seen; the numbers below it are exact in bfloat16.
_PERIOD = 251
# At most so many ranks contribute to an element of a sum, each at most 3: sums are exact in bfloat16.
_CONTRIBUTORS = 64


@dataclass(frozen=True)
class Task:
    """One collective of one size on one rank.

    Attributes:
        collective: Which one.
        rank: This rank within the group.
        world_size: Ranks of the group.
        count: Elements, as nccl-tests counts: of the buffer for all_reduce and send_recv, else of a rank's part.
        dtype: Of the elements.
        device: Of the buffers.
        group: The group.
        traffic: For all_to_allv, elements that rank i sends to rank j, as [i][j].
    """

    collective: Collective
    rank: int
    world_size: int
    count: int
    dtype: torch.dtype
    device: torch.device
    group: dist.ProcessGroup | None
    traffic: tuple[tuple[int, ...], ...] = ()

    @property
    def sent_splits(self) -> list[int]:
        """Elements for each rank, in an all-to-all."""
        return list(self.traffic[self.rank]) if self.traffic else [self.count] * self.world_size

    @property
    def received_splits(self) -> list[int]:
        """Elements from each rank, in an all-to-all."""
        return [row[self.rank] for row in self.traffic] if self.traffic else [self.count] * self.world_size


@dataclass(frozen=True)
class Buffers:
    """What a collective reads and writes; in place, one is a part of the other.

    Attributes:
        send: Filled with this rank's values.
        receive: Overwritten.
        rest: What a receive buffer lies in, where that is larger: its other elements are not checked.
    """

    send: Tensor
    receive: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Operation:
    """How a collective is done and checked.

    Attributes:
        run: Issues it once, and returns once it is complete on the host or, on a GPU, in the current stream.
        buffers: Makes buffers with values for a task and a placement; None where that placement does not exist.
        expected: What `receive` has to hold.
        redop: nccl-tests' column: `sum` or `none`.
    """

    run: Callable[[Task, Buffers], object]
    buffers: Callable[[Task, Placement], Buffers | None]
    expected: Callable[[Task], Tensor]
    redop: str


def gathered_values(source: int, target: int, numel: int, task: Task) -> Tensor:
    """What rank `source` sends to rank `target`; in an all_gather, `target` is the same for all."""
    period = (torch.arange(_PERIOD) * 3 + 37 * source + 101 * target) % _PERIOD
    return _tiled(period, 0, numel, task)


def summands(rank: int, start: int, numel: int, task: Task) -> Tensor:
    """Elements [start, start + numel) of what a rank adds to a sum."""
    return _tiled(_summand_period(rank, task.world_size), start, numel, task)


def summed(start: int, numel: int, task: Task) -> Tensor:
    """Elements [start, start + numel) of the sum over the ranks."""
    total = torch.zeros(_PERIOD * _stride(task.world_size), dtype=torch.int64)
    for rank in range(task.world_size):
        total += _summand_period(rank, task.world_size)
    return _tiled(total, start, numel, task)


def _stride(world_size: int) -> int:
    return -(-world_size // _CONTRIBUTORS)


def _summand_period(rank: int, world_size: int) -> Tensor:
    stride = _stride(world_size)
    index = torch.arange(_PERIOD * stride)
    return torch.where(index % stride == rank % stride, (index + 7 * rank) % _PERIOD % 4, 0)


def _tiled(period: Tensor, start: int, numel: int, task: Task) -> Tensor:
    start %= len(period)
    values = period.to(device=task.device, dtype=task.dtype)
    return values.repeat(-(-(start + numel) // len(period)))[start : start + numel].clone()


def count_wrong(got: Tensor, expected: Tensor) -> int:
    """How many elements differ; NaN differs from everything."""
    return int((got != expected).sum().item())


def _unwritten(numel: int, task: Task) -> Tensor:
    return torch.full((numel,), float("nan"), dtype=task.dtype, device=task.device)


def _separate(send: Tensor, numel: int, task: Task) -> Buffers:
    receive = _unwritten(numel, task)
    return Buffers(send, receive, receive)


# torch renamed these two in 2.14, and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _all_reduce_buffers(task: Task, placement: Placement) -> Buffers | None:
    if placement == "out_of_place":
        return None  # torch has none
    values = summands(task.rank, 0, task.count, task)
    return Buffers(values, values, values)


def _all_gather_buffers(task: Task, placement: Placement) -> Buffers | None:
    own = gathered_values(task.rank, 0, task.count, task)
    whole = _unwritten(task.count * task.world_size, task)
    if placement == "out_of_place":
        return Buffers(own, whole, whole)
    part = whole[task.rank * task.count : (task.rank + 1) * task.count]
    part.copy_(own)
    return Buffers(part, whole, whole)


def _reduce_scatter_buffers(task: Task, placement: Placement) -> Buffers | None:
    whole = summands(task.rank, 0, task.count * task.world_size, task)
    if placement == "out_of_place":
        return _separate(whole, task.count, task)
    return Buffers(whole, whole[task.rank * task.count : (task.rank + 1) * task.count], whole)


def _all_to_all_buffers(task: Task, placement: Placement) -> Buffers | None:
    if placement == "in_place":
        return None  # neither NCCL nor Gloo has it
    parts = [gathered_values(task.rank, to, numel, task) for to, numel in enumerate(task.sent_splits)]
    return _separate(torch.cat(parts), sum(task.received_splits), task)


def _send_recv_buffers(task: Task, placement: Placement) -> Buffers | None:
    if placement == "in_place" or task.world_size == 1:
        return None
    to = (task.rank + 1) % task.world_size
    return _separate(gathered_values(task.rank, to, task.count, task), task.count, task)


def _send_recv(task: Task, buffers: Buffers) -> None:
    """To the next rank, from the previous one."""
    after, before = (task.rank + 1) % task.world_size, (task.rank - 1) % task.world_size
    exchange_with(task.group, ((buffers.send, after),), ((buffers.receive, before),))


def exchange_with(
    group: dist.ProcessGroup | None, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
) -> None:
    """Sends and receives at the same time; ranks are the group's."""
    operations = [dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for tensor, peer in sends]
    operations += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for tensor, peer in receives]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _all_to_all(task: Task, buffers: Buffers) -> None:
    received, sent = (task.received_splits, task.sent_splits) if task.traffic else (None, None)
    dist.all_to_all_single(buffers.receive, buffers.send, received, sent, group=task.group)


_ALL_TO_ALL = Operation(
    run=_all_to_all,
    buffers=_all_to_all_buffers,
    expected=lambda task: torch.cat(
        [gathered_values(source, task.rank, numel, task) for source, numel in enumerate(task.received_splits)]
    ),
    redop="none",
)

OPERATIONS: Mapping[Collective, Operation] = MappingProxyType(
    {
        "all_to_all": _ALL_TO_ALL,
        "all_to_allv": _ALL_TO_ALL,
        "reduce_scatter": Operation(
            run=lambda task, buffers: _reduce_scatter(buffers.receive, buffers.send, group=task.group),
            buffers=_reduce_scatter_buffers,
            expected=lambda task: summed(task.rank * task.count, task.count, task),
            redop="sum",
        ),
        "all_gather": Operation(
            run=lambda task, buffers: _all_gather(buffers.receive, buffers.send, group=task.group),
            buffers=_all_gather_buffers,
            expected=lambda task: torch.cat(
                [gathered_values(source, 0, task.count, task) for source in range(task.world_size)]
            ),
            redop="none",
        ),
        "all_reduce": Operation(
            run=lambda task, buffers: dist.all_reduce(buffers.receive, group=task.group),
            buffers=_all_reduce_buffers,
            expected=lambda task: summed(0, task.count, task),
            redop="sum",
        ),
        "send_recv": Operation(
            run=_send_recv,
            buffers=_send_recv_buffers,
            expected=lambda task: gathered_values((task.rank - 1) % task.world_size, task.rank, task.count, task),
            redop="none",
        ),
    }
)
"""Those that can be measured. A test may pass others of the same shape to `measure`."""
