"""Runs rounds so that communication hides behind computation. Knows no Muon.

While round i is computed, round i+1 is on its way to the owners and round i-1 on its way back. The collectives are
asynchronous and are issued in one order on every rank: gather 0, gather 1, scatter 0, gather 2, scatter 1, ...
On CUDA they run on the process group's stream and `wait` orders the compute stream behind them, so that no stream of
our own is needed.
"""

from __future__ import annotations

from typing import Protocol


class Rounds[Pending](Protocol):
    """What one step does in each round. Each method is called once per round, on every rank."""

    @property
    def num_rounds(self) -> int: ...

    def prepare(self, round_index: int) -> Pending:
        """Starts the gather."""
        ...

    def compute(self, round_index: int, gathered: Pending) -> Pending:
        """Waits for the gather, computes, and starts the scatter."""
        ...

    def finalize(self, round_index: int, scattered: Pending) -> None:
        """Waits for the scatter and applies the result."""
        ...


def run_rounds[Pending](rounds: Rounds[Pending]) -> None:
    """Runs all rounds. Collective over the ranks that share the plan.

    At most two gathers and two scatters are alive at a time, and round i is finalized before round i + 3 is prepared:
    three buffers in turn are enough.
    """
    count = rounds.num_rounds
    gathers: dict[int, Pending] = {}
    scatters: dict[int, Pending] = {}
    for i in range(count + 1):
        if i == 0 and count:
            gathers[0] = rounds.prepare(0)
        if i + 1 < count:
            gathers[i + 1] = rounds.prepare(i + 1)
        if i < count:
            scatters[i] = rounds.compute(i, gathers.pop(i))
        if i - 1 in scatters:
            rounds.finalize(i - 1, scatters.pop(i - 1))
