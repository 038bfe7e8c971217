"""The order of a step's rounds, such that communication hides behind computation. Knows no Muon.

A transfer is one all-to-all with the gather of a round and the scatter of the round two before. It is started before
the round between the two is computed, and is complete when the next round is to be computed. With one hardware queue
(`CUDA_DEVICE_MAX_CONNECTIONS=1`) whatever is issued waits for what was issued before it, so that nothing may stand
between a transfer and the computation that hides it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol


class Rounds(Protocol):
    """What one step does, each on every rank. Round numbers run from -2 to `num_rounds` + 1; others than 0 to
    `num_rounds` - 1 are no rounds, and there is nothing to do for them.
    """

    @property
    def num_rounds(self) -> int: ...

    def prepare(self, round_index: int) -> None:
        """Packs what the round gathers."""
        ...

    def start(self, transfer: int) -> None:
        """Starts a transfer."""
        ...

    def finish(self, transfer: int) -> None:
        """Waits for a transfer, packs what round `transfer` - 1 scatters, unpacks what round `transfer` gathered."""
        ...

    def compute(self, round_index: int) -> None:
        """Computes on what was gathered."""
        ...

    def apply(self, round_index: int) -> None:
        """Applies what was scattered."""
        ...


def pipeline(rounds: Rounds) -> Iterator[None]:
    """Runs all rounds, and stops after each start of a transfer. Collective over the ranks that share the plan.

    Ranks of several groups may take turns between pipelines at these stops, in the same order on all of them.
    """
    if not rounds.num_rounds:
        return
    rounds.prepare(0)
    rounds.start(0)
    yield
    for i in range(rounds.num_rounds + 1):
        rounds.finish(i)
        rounds.apply(i - 2)
        rounds.prepare(i + 1)
        rounds.start(i + 1)
        yield
        rounds.compute(i)
    rounds.finish(rounds.num_rounds + 1)
    rounds.apply(rounds.num_rounds - 1)


def run_together(pipelines: Iterable[Iterator[None]]) -> None:
    """Runs several pipelines to their ends in turns: each hides its transfers behind the others' computation too."""
    running = list(pipelines)
    while running:
        running = [each for each in running if next(each, running) is not running]
