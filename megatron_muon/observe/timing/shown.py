"""The phases of a step as people see them: the one table that rows, findings, traces and charts read."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class ShownPhase(NamedTuple):
    """How a phase, or the collectives of one name, appears.

    Attributes:
        label: Name in tables.
        color: Color in tables and charts of a page.
        part: Part of the step's time that findings count it to; empty for collectives, which overlap with phases.
    """

    label: str
    color: str
    part: str = ""


SHOWN: Mapping[str, ShownPhase] = MappingProxyType(
    {
        "momentum": ShownPhase("momentum", "#b8b000", "local"),
        "pack": ShownPhase("pack", "#2aa7b5", "local"),
        "wait": ShownPhase("wait for exchange", "#8a8f98", "exchange"),
        "unpack": ShownPhase("unpack", "#c58ac8", "local"),
        "teams": ShownPhase("teams", "#f58518", "teams"),
        "newton_schulz": ShownPhase("Newton-Schulz", "#d8433f", "compute"),
        "second_moment": ShownPhase("second moment", "#8566b8", "second_moment"),
        "apply": ShownPhase("apply", "#4a9d44", "local"),
        "metrics": ShownPhase("metrics", "#e377a8", "metrics"),
        "param_gather": ShownPhase("param gather", "#96674a", "param_gather"),
        "other": ShownPhase("other", "#c9ced6", "other"),
        "gather": ShownPhase("gather (in flight)", "#4c78a8"),
        "exchange": ShownPhase("exchange (in flight)", "#3565c4"),
        "scatter": ShownPhase("scatter (in flight)", "#1f3f8f"),
    }
)
"""By name, in the order in which rows are shown: `phases.BUSY`, `other` (time in no phase), `phases.FLIGHTS`."""


def part_phases(part: str) -> list[str]:
    """The phases whose time findings add up to a part."""
    return [name for name, phase in SHOWN.items() if phase.part == part]
