"""Names the phases of a step where they happen, for whoever watches. Knows no Muon and measures nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, get_args

import torch.distributed as dist
from torch.profiler import record_function

Busy = Literal[
    "momentum", "pack", "wait", "unpack", "teams", "newton_schulz", "second_moment", "apply", "metrics", "param_gather"
]
"""What a rank does, one after the other. `wait` is for a collective of the exchange that has not completed yet,
`metrics` measures what a logged step logs."""
Flight = Literal["gather", "exchange", "scatter"]
"""Transfers that are under way while a rank does something; an `exchange` carries a gather and a scatter."""

BUSY: tuple[Busy, ...] = get_args(Busy)
FLIGHTS: tuple[Flight, ...] = get_args(Flight)


class Watch(Protocol):
    """Sees a step's phases begin and end. It may neither change what is computed nor the order of collectives."""

    def phase(self, name: Busy, round_index: int | None = None) -> AbstractContextManager[Any]:
        """Entered when a phase begins and left when the next operation may be another phase's."""
        ...

    def collective(
        self, name: Flight, round_index: int, sent_bytes: int, issue: Callable[[], dist.Work | None]
    ) -> dist.Work | None:
        """Calls `issue`, once, and returns the collective that it started; this rank sends others `sent_bytes`."""
        ...


class Labels:
    """Labels phases for `torch.profiler`; all that happens on a step that nobody profiles."""

    def phase(self, name: Busy, round_index: int | None = None) -> AbstractContextManager[Any]:
        return record_function(label(name, round_index))

    def collective(
        self, name: Flight, round_index: int, sent_bytes: int, issue: Callable[[], dist.Work | None]
    ) -> dist.Work | None:
        with record_function(label(name, round_index)):
            return issue()


LABELS = Labels()


def label(name: str, round_index: int | None = None) -> str:
    """What `torch.profiler` shows: `muon/<phase>/<round>`."""
    return f"muon/{name}" if round_index is None else f"muon/{name}/{round_index}"
