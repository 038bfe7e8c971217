"""How much of the time that collectives are in flight is hidden behind other work."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]
"""Begin and end, in seconds."""


def hidden_share(in_flight: Iterable[Interval], waiting: Iterable[Interval]) -> float:
    """The share of an exchange's time that its rank spent on other things than waiting for it.

    Args:
        in_flight: For each collective, from its issue to its completion. They may overlap.
        waiting: When the rank stood still until a collective had completed. They may overlap.

    Returns:
        One minus the time in which both hold over the time in which anything is in flight: 1 if no time is lost.

    Raises:
        ValueError: If nothing was in flight.
    """
    flights, waits = union(in_flight), union(waiting)
    total = sum(stop - start for start, stop in flights)
    if total <= 0:
        raise ValueError("hidden_share: got no collective that took time, expected at least one")
    exposed = sum(max(min(a[1], b[1]) - max(a[0], b[0]), 0.0) for a in flights for b in waits)
    return 1.0 - exposed / total


def union(spans: Iterable[Interval]) -> list[Interval]:
    """The same times as spans that do not overlap."""
    out: list[Interval] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out
