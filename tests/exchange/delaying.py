"""A process group that delays: what the exchange would do wrong on a GPU shows here on a CPU.

Gloo may complete a collective at once, so that a missing wait, or a buffer that is used again too early, does no harm
in tests. Here an all-to-all completes at its `wait` and no earlier: the receive buffer is NaN until then, and the send
buffer must be the same at `wait` as it was at the start. Messages travel through the world's store with a header, so
that ranks that issue collectives in different orders raise instead of hanging.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_POISON = 0xFF  # Bytes of all ones are NaN in every floating dtype.


@dataclass
class Delays:
    """What was issued on this rank.

    Attributes:
        issued: For each all-to-all, in the order of issue, the global ranks of its group and its number there.
        unfinished: Those that nobody has waited for.
    """

    issued: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    unfinished: list[_DelayedWork] = field(default_factory=list)


@dataclass
class _DelayedWork:
    delays: Delays
    key: str
    rank: int
    send: Tensor
    receive: Tensor
    receive_splits: Sequence[int]
    sent: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sent = self.send.clone()
        _bytes(self.receive).fill_(_POISON)

    def wait(self) -> None:
        self.delays.unfinished.remove(self)
        if not torch.equal(_bytes(self.send), _bytes(self.sent)):
            raise AssertionError(f"{self.key}: the send buffer was written to before the wait")
        if not (_bytes(self.receive) == _POISON).all():
            raise AssertionError(f"{self.key}: the receive buffer was written to before the wait")
        store = dist.distributed_c10d._get_default_store()
        pieces = self.receive.split(list(self.receive_splits))
        for source, piece in enumerate(pieces):
            dtype, numel, payload = pickle.loads(store.get(f"{self.key} {source} {self.rank}"))
            if (dtype, numel) != (piece.dtype, piece.numel()):
                raise AssertionError(
                    f"{self.key}: rank {source} sends {numel} of {dtype}, but rank {self.rank} expects "
                    f"{piece.numel()} of {piece.dtype}: the ranks issue their collectives in different orders"
                )
            if numel:
                _bytes(piece).copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.uint8)


@contextmanager
def delayed_collectives(timeout_s: float = 30.0) -> Iterator[Delays]:
    """Delays this rank's all-to-alls; every rank of the world must enter this. What is not waited for stays NaN."""
    delays = Delays()
    numbers: dict[tuple[int, ...], int] = {}
    original = dist.all_to_all_single
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=timeout_s))
    # Keys of several uses in one process differ.
    _delays_made.append(delays)

    def all_to_all_single(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        size = dist.get_world_size(group)
        received, sent = (
            list(splits or [len(tensor) // size] * size)
            for splits, tensor in ((output_split_sizes, output), (input_split_sizes, input))
        )
        ranks = tuple(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
        number = numbers[ranks] = numbers.get(ranks, -1) + 1
        rank = dist.get_rank(group)
        key = f"delayed {len(_delays_made)} {ranks} {number}"
        for destination, piece in enumerate(input.split(sent)):
            message = pickle.dumps((piece.dtype, piece.numel(), _bytes(piece).numpy().tobytes()))
            store.set(f"{key} {rank} {destination}", message)
        delays.issued.append((ranks, number))
        work = _DelayedWork(delays, key, rank, input, output, received)
        delays.unfinished.append(work)
        if not async_op:
            work.wait()
            return None
        return work

    dist.all_to_all_single = all_to_all_single
    try:
        yield delays
    finally:
        dist.all_to_all_single = original


_delays_made: list[Delays] = []


def same_order(issued: Sequence[Sequence[tuple[tuple[int, ...], int]]]) -> bool:
    """Whether any two ranks issued the collectives that they share in the same order. Takes each rank's `issued`."""
    for one, first in enumerate(issued):
        for other, second in enumerate(issued[:one]):
            shared = [[entry for entry in of if {one, other} <= set(entry[0])] for of in (first, second)]
            if shared[0] != shared[1]:
                return False
    return True
