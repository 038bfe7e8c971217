"""The table of a run's parameters: whose they are, their logical matrices, owners and cost (`--muon-log-params`)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_muon.config import MuonConfig
from megatron_muon.megatron.model.identity import NamedParameter
from megatron_muon.megatron.model.registry import registry
from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer
from megatron_muon.plan.ownership import Item, OwnershipPlan

_WIDTH = 180


@dataclass(frozen=True)
class Line:
    """A parameter of AdamW's, or a part of one of Muon's.

    Attributes:
        name: Of the parameter in the whole model.
        optimizer: Whose it is.
        row: The row of the registry.
        part: The part's name.
        shape: (rows, cols) of a logical matrix; of AdamW's, what a rank stores.
        count: Logical matrices of the part; 0 if it is AdamW's.
        owners: Global ranks that orthogonalize it; each has a share.
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
    """Of parameters that are AdamW's."""
    rows = registry(muon.splits)
    return [Line(e.whole_name, "AdamW", rows.row(e).name, "", tuple(e.parameter.shape)) for e in entries]


def muon_lines(entries: Iterable[NamedParameter], muon: MuonConfig, optimizer: MuonDistributedOptimizer) -> list[Line]:
    """Of the parameters of an optimizer of Muon's, a line for each part."""
    row_of = {entry.whole_name: registry(muon.splits).row(entry).name for entry in entries}
    plan = optimizer.optimizer.exchange.plan
    ranks = dist.get_process_group_ranks(optimizer.grid.group)
    lines = []
    for index in range(len(plan.matrices)):
        name = optimizer.optimizer.names[index]
        lines += [_part_line(plan, index, part, name, row_of[name], ranks) for part in range(len(plan.owners[index]))]
    return lines


def _part_line(plan: OwnershipPlan, index: int, part: int, name: str, row: str, ranks: Sequence[int]) -> Line:
    owners = plan.owners[index][part]
    spec = plan.matrices[index].spec
    count, *shape = spec.logical_shape(part)
    return Line(
        name,
        "Muon",
        row,
        spec.parts[part].label,
        tuple(shape),
        count,
        tuple(ranks[owner] for owner in owners),
        sum(plan.item_flops(Item(index, part, share)) for share in range(len(owners))),
    )


def log_parameters(own: Sequence[Line]) -> None:
    """Prints the table of all ranks' lines on rank 0. Collective over the world.

    Args:
        own: This rank's; of parameters that several ranks describe, the first one's are shown.
    """
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(list(own), gathered, dst=0)
    if gathered is None:
        return
    # Tied embeddings are on two pipeline stages.
    by_name: dict[str, list[Line]] = {}
    for lines in gathered:
        of_rank: dict[str, list[Line]] = {}
        for line in lines:
            of_rank.setdefault(line.name, []).append(line)
        for name, of_name in of_rank.items():
            by_name.setdefault(name, of_name)
    ordered = [line for name in sorted(by_name, key=_natural) for line in by_name[name]]
    # Into a file or a pipe, rich would fold everything into 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    console.print(parameter_table(ordered))


def parameter_table(lines: Sequence[Line]) -> Table:
    """The table of lines that are in order."""
    total = sum(line.flops for line in lines)
    names = {line.optimizer: len({n.name for n in lines if n.optimizer == line.optimizer}) for line in lines}
    table = Table(
        title=f"Parameters: {names.get('Muon', 0)} of Muon's, {names.get('AdamW', 0)} of AdamW's",
        title_justify="left",
        caption=f"Newton-Schulz in all: {total:.3e} FLOPs a step. Shapes: logical matrices x (rows, columns); of "
        "AdamW's, what a rank stores.",
        caption_justify="left",
    )
    for column in ("parameter", "optimizer", "row", "part", "shape", "owners"):
        table.add_column(column, overflow="fold")
    table.add_column("FLOPs", justify="right", no_wrap=True)
    before = ""
    for line in lines:
        shape = f"({', '.join(map(str, line.shape))})"
        table.add_row(
            line.name if line.name != before else "",
            line.optimizer,
            line.row,
            line.part or "-",
            f"{line.count} x {shape}" if line.count else shape,
            _ranges(line.owners) or "-",
            f"{line.flops:.2e}" if line.flops else "-",
        )
        before = line.name
    return table


def _ranges(ranks: Sequence[int]) -> str:
    """Ranks in ascending order, those that follow each other as a range."""
    out: list[list[int]] = []
    for rank in sorted(ranks):
        if out and out[-1][1] + 1 == rank:
            out[-1][1] = rank
        else:
            out.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by value."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]
