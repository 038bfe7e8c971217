"""Lets several teams of ranks talk at the same time through one all-to-all after the other. Knows no Muon.

A member of a team is a generator that yields what it has for the other members and is sent what they had for it. All
teams of a round advance together, so that every rank issues the same collectives in the same order, whichever teams
it is in, and no team needs a communicator of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Message(NamedTuple):
    """What a member says in one stage.

    Attributes:
        blocks: For each member, in the team's order, what it is sent; may be empty. All of one data type.
        shapes: Of what each member sends.
    """

    blocks: Sequence[Tensor]
    shapes: Sequence[tuple[int, ...]]


Talk = Generator[Message, Sequence[Tensor], Tensor]
"""A member's part. What it is sent is valid until it yields again; it returns its result."""


@dataclass
class Scratch:
    """Byte buffers that grow to the largest size asked for and are kept."""

    device: torch.device
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, num_bytes: int) -> Tensor:
        """The first `num_bytes` of the buffer called `name`; whoever took it before loses it."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self.buffers[name] = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return buffer[:num_bytes]


AllToAll = Callable[[Tensor, Tensor, list[int], list[int]], None]
"""Fills its first argument; then the bytes sent, and how many are received from and sent to each rank."""


def run_lockstep(
    talks: Sequence[Talk],
    teams: Sequence[tuple[int, ...]],
    num_stages: int,
    world_size: int,
    all_to_all: AllToAll,
    scratch: Scratch,
) -> list[Tensor]:
    """Runs this rank's talks to their ends. Collective: every rank calls it with the same `num_stages`.

    Args:
        talks: This rank's, in an order that is the same on all members: by team.
        teams: The ranks of each talk's team, in the team's order.
        num_stages: Of the longest talk on any rank.
        world_size: Number of ranks.
        all_to_all: Issued `num_stages` times.
        scratch: Where messages are packed.

    Returns:
        The talks' results.

    Raises:
        RuntimeError: If a talk has not ended after `num_stages`; the other ranks' collectives are complete by then.
    """
    results: dict[int, Tensor] = {}
    messages: dict[int, Message] = {}

    def advance(index: int, answer: Sequence[Tensor] | None) -> None:
        try:
            messages[index] = talks[index].send(answer) if answer is not None else next(talks[index])
        except StopIteration as end:
            messages.pop(index, None)
            results[index] = end.value

    for index in range(len(talks)):
        advance(index, None)
    for _ in range(num_stages):
        # By peer, then by team: both sides of a pair walk through their common teams in the same order.
        pairs = [
            (rank, index, teams[index].index(rank))
            for rank in sorted({rank for index in messages for rank in teams[index]})
            for index in sorted(messages)
            if rank in teams[index]
        ]
        sent, received = [0] * world_size, [0] * world_size
        for rank, index, member in pairs:
            block = messages[index].blocks[member]
            sent[rank] += block.nbytes
            received[rank] += block.itemsize * torch.Size(messages[index].shapes[member]).numel()
        outgoing, incoming = scratch.take("send", sum(sent)), scratch.take("receive", sum(received))
        at = 0
        for _, index, member in pairs:
            block = messages[index].blocks[member]
            outgoing[at : at + block.nbytes].view(block.dtype).view(block.shape).copy_(block)
            at += block.nbytes
        all_to_all(incoming, outgoing, received, sent)
        answers: dict[int, list[Tensor]] = {index: [incoming] * len(teams[index]) for index in messages}
        at = 0
        for _, index, member in pairs:
            shape, dtype = messages[index].shapes[member], messages[index].blocks[member].dtype
            end = at + dtype.itemsize * torch.Size(shape).numel()
            answers[index][member] = incoming[at:end].view(dtype).view(shape)
            at = end
        for index, answer in answers.items():
            advance(index, answer)
    if messages:
        raise RuntimeError(f"{len(messages)} talks have not ended after {num_stages} stages")
    return [results[index] for index in range(len(talks))]
