"""Lets several teams of ranks exchange messages at the same time, through one all-to-all per stage. Knows no Muon.

A member of a team is a generator: it yields its message to the other members and is sent theirs to it. All teams of a
round advance together, so that every rank issues the same collectives in the same order, whichever teams it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Message(NamedTuple):
    """A member's message in one stage.

    Attributes:
        blocks: 1-D and contiguous: the members' blocks one after the other, in the team's order.
        sent: Elements for each member; 0 for a member that gets nothing.
        received: Elements that each member sends to this one, of the data type of `blocks`.
    """

    blocks: Tensor
    sent: Sequence[int]
    received: Sequence[int]


Talk = Generator[Message, Tensor, Tensor]
"""A member's part. It is sent the blocks for it, 1-D, in the team's order, valid until it yields again."""


StartAllToAll = Callable[[Tensor, Tensor, list[int], list[int]], dist.Work | None]
"""Starts to fill its first argument; then the bytes to send, and how many are received from and sent to each rank."""


class _Block(NamedTuple):
    """Where a block lies on the wire, and where among the blocks of its talk, in bytes."""

    talk: int
    on_wire: slice
    in_message: slice


def run_lockstep(
    talks: Sequence[Talk],
    teams: Sequence[tuple[int, ...]],
    num_stages: int,
    world_size: int,
    start: StartAllToAll,
    buffer: Tensor,
) -> Iterator[None]:
    """Runs this rank's talks to their ends, and stops after the start of each stage. Collective.

    What a caller does at these stops is hidden behind the stage's all-to-all. Every rank runs the iterator to its end,
    with the same `num_stages`.

    Args:
        talks: This rank's, in an order that is the same on all members: by team.
        teams: The ranks of each talk's team, in the team's order.
        num_stages: Number of messages of the longest talk on any rank.
        world_size: Number of ranks.
        start: Called `num_stages` times.
        buffer: Where messages are received, 1-D uint8, as many bytes as the largest stage brings.

    Raises:
        RuntimeError: If a talk has not ended after `num_stages`; the other ranks' collectives are complete by then.
    """
    messages: dict[int, Message] = {}

    def advance(index: int, answer: Tensor | None) -> None:
        try:
            messages[index] = talks[index].send(answer) if answer is not None else next(talks[index])
        except StopIteration:
            messages.pop(index, None)

    for index in range(len(talks)):
        advance(index, None)
    for _ in range(num_stages):
        sent, outgoing_blocks = _layout(messages, teams, world_size, incoming=False)
        received, incoming_blocks = _layout(messages, teams, world_size, incoming=True)
        outgoing = _rearranged(
            [(messages[b.talk].blocks.view(torch.uint8), b.in_message) for b in outgoing_blocks], buffer.device
        )
        incoming = buffer[: sum(received)]
        work = start(incoming, outgoing, received, sent)
        yield
        if work is not None and (any(received) or any(sent)):
            # A rank in no team does not wait: transfers that are still under way may precede this all-to-all.
            work.wait()
        for index, message in list(messages.items()):
            own = sorted((b for b in incoming_blocks if b.talk == index), key=lambda b: b.in_message.start)
            answer = _rearranged([(incoming, b.on_wire) for b in own], buffer.device)
            advance(index, answer.view(message.blocks.dtype))
    if messages:
        raise RuntimeError(f"{len(messages)} talks have not ended after {num_stages} stages")


def _layout(
    messages: dict[int, Message], teams: Sequence[tuple[int, ...]], world_size: int, *, incoming: bool
) -> tuple[list[int], list[_Block]]:
    """Bytes for (or from) each rank, and the blocks in wire order: by rank, then by team, the same on both sides."""
    splits = [0] * world_size
    blocks: list[tuple[int, int, slice]] = []
    for index, message in sorted(messages.items()):
        sizes = [n * message.blocks.itemsize for n in (message.received if incoming else message.sent)]
        for rank, size, at in zip(teams[index], sizes, accumulate(sizes, initial=0), strict=False):
            if size:
                splits[rank] += size
                blocks.append((rank, index, slice(at, at + size)))
    out = []
    at = 0
    for _, index, in_message in sorted(blocks, key=lambda block: block[:2]):
        size = in_message.stop - in_message.start
        out.append(_Block(index, slice(at, at + size), in_message))
        at += size
    return splits, out


def _rearranged(pieces: Sequence[tuple[Tensor, slice]], device: torch.device) -> Tensor:
    """Pieces of byte tensors one after the other: a view if they are so already, else by one `cat`."""
    if not pieces:
        return torch.empty(0, dtype=torch.uint8, device=device)
    first = pieces[0][0]
    ends = [where.stop for _, where in pieces]
    adjacent = all(where.start == end for (_, where), end in zip(pieces[1:], ends, strict=False))
    if adjacent and all(tensor.data_ptr() == first.data_ptr() for tensor, _ in pieces):
        return first[pieces[0][1].start : ends[-1]]
    return torch.cat([tensor[where] for tensor, where in pieces])
