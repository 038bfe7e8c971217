"""The table of a run's parameters: optimizer, logical matrices, owners and cost (`--muon-log-params`)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.megatron.entry.messages import describe_ranks
from megatron_muon.megatron.model.identity import NamedParameter
from megatron_muon.megatron.model.registry import registry
from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer
from megatron_muon.observe.console import console, table
from megatron_muon.plan.ownership import Item

# Columns where the output is a file or a pipe: names are long.
_WIDTH = 180


@dataclass(frozen=True)
class Line:
    """A parameter of AdamW's, or a part of one of Muon's.

    Attributes:
        name: Name of the parameter in the whole model.
        optimizer: Optimizer of the parameter.
        row: Name of the row of the registry.
        part: Name of the part.
        shape: (rows, cols) of a logical matrix; for AdamW's, the shape that a rank stores.
        count: Number of logical matrices in the part; 0 for AdamW's.
        owners: Global ranks that orthogonalize the part, a share each.
        flops: Newton-Schulz FLOPs of all owners in one step.
    """

    name: str
    optimizer: str
    row: str
    part: str
    shape: tuple[int, ...]
    count: int = 0
    owners: tuple[int, ...] = ()
    flops: int = 0


def adam_lines(entries: Iterable[NamedParameter], muon: MuonConfig) -> list[Line]:
    """The lines of AdamW's parameters."""
    rows = registry(muon.splits)
    return [Line(e.whole_name, "AdamW", rows.row(e).name, "", tuple(e.parameter.shape)) for e in entries]


def muon_lines(entries: Iterable[NamedParameter], muon: MuonConfig, optimizer: MuonDistributedOptimizer) -> list[Line]:
    """The lines of a Muon optimizer's parameters, one for each part."""
    row_of = {entry.whole_name: registry(muon.splits).row(entry).name for entry in entries}
    plan = optimizer.optimizer.exchange.plan
    ranks = dist.get_process_group_ranks(optimizer.grid.group)
    lines = []
    for index, matrix in enumerate(plan.matrices):
        name = optimizer.optimizer.names[index]
        for part, owners in enumerate(plan.owners[index]):
            count, *shape = matrix.spec.logical_shape(part)
            flops = sum(plan.item_flops(Item(index, part, share)) for share in range(len(owners)))
            label, on = matrix.spec.parts[part].label, tuple(ranks[owner] for owner in owners)
            lines.append(Line(name, "Muon", row_of[name], label, tuple(shape), count, on, flops))
    return lines


def log_parameters(own: Sequence[Line]) -> None:
    """Prints the table of all ranks' lines on rank 0. Collective over the world.

    Args:
        own: Lines of this rank. Where several ranks describe a parameter, the first one's are shown.
    """
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(list(own), gathered, dst=0)
    if gathered is None:
        return
    # Tied embeddings are on two pipeline stages.
    by_name: dict[str, list[Line]] = {}
    for lines in gathered:
        for name, of_name in groupby(sorted(lines, key=lambda line: _natural(line.name)), lambda line: line.name):
            by_name.setdefault(name, list(of_name))
    print_parameters([line for name in sorted(by_name, key=_natural) for line in by_name[name]])


def print_parameters(lines: Sequence[Line]) -> None:
    """Prints the table of lines that are in order."""
    names = {line.optimizer: len({n.name for n in lines if n.optimizer == line.optimizer}) for line in lines}
    rows, before = [], ""
    for line in lines:
        shape = f"({', '.join(map(str, line.shape))})"
        rows.append(
            (
                line.name if line.name != before else "",
                line.optimizer,
                line.row,
                line.part or None,
                f"{line.count} x {shape}" if line.count else shape,
                describe_ranks(line.owners) or None,
                f"{line.flops:.2e}" if line.flops else None,
            )
        )
        before = line.name
    columns = ("parameter", "optimizer", "row", "part", "shape", "owners", "FLOPs")
    title = f"Parameters: {names.get('Muon', 0)} of Muon's, {names.get('AdamW', 0)} of AdamW's"
    out = console(None if sys.stdout.isatty() else _WIDTH)
    out.print(table(columns, rows, title=title, numbers=("FLOPs",)))
    total = sum(line.flops for line in lines)
    out.print(
        f"Newton-Schulz in all: {total:.3e} FLOPs a step. Shapes: logical matrices x (rows, columns); of AdamW's, what "
        "a rank stores."
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key by which numbers in names are ordered by value."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]
