"""What this package prints while a run starts: one prefix, on rank 0 alone, each message once per process."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable


@functools.cache
def say(message: str) -> None:
    """Prints a message on global rank 0, once per process: Megatron parses its arguments more than once."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron_muon: {message}", flush=True)


def describe_ranks(ranks: Iterable[int]) -> str:
    """Ranks in ascending order, three and more that follow each other as a range: `0, 2-5, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] + 1 == rank:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
