"""Whether the ranks of a group hold the same plan, slices that fit it, and kernels that can do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.config import MuonConfig
from megatron_muon.newton_schulz import load_backend, shapes_problem
from megatron_muon.plan.ownership import OwnershipPlan
from megatron_muon.rule.muon import orthogonalized_updates


def slices_problem(
    plan: OwnershipPlan, rank: int, slices: Mapping[int, Tensor], parameters: list[Tensor]
) -> str | None:
    """Says what does not fit between the plan and what this rank stores; None if everything fits."""
    expected = {index: s.stop - s.start for index, m in enumerate(plan.matrices) for s in m.slices if s.rank == rank}
    got = {index: p.numel() for index, p in slices.items()}
    for index in sorted(expected.keys() | got.keys()):
        if expected.get(index) != got.get(index):
            name = plan.matrices[index].spec.name if index < len(plan.matrices) else f"parameter {index}"
            return f"{name}: stores {got.get(index)} elements, but the plan says {expected.get(index)}"
    if {id(p) for p in slices.values()} != {id(p) for p in parameters}:
        return f"{len(parameters)} parameters are in the groups, but {len(slices)} slices are in the plan"
    return None


def backend_problem(muon: MuonConfig, plan: OwnershipPlan, rank: int, device: torch.device) -> str | None:
    """Says why this host cannot run the chosen Newton-Schulz back end on the plan's matrices; None if it can.

    On a GPU it runs once on zeros of each shape that this rank owns, so that kernels are compiled, tuned and loaded
    before the first step.
    """
    specs = (matrix.spec for matrix in plan.matrices)
    try:
        load_backend(muon.ns_backend, device.type)
        problem = shapes_problem(muon.ns_backend, {s.tile_shape(part) for s in specs for part in range(len(s.parts))})
        if problem is None and device.type == "cuda":
            items = (item for item in plan.all_items() if plan.owner(item) == rank and plan.team(item) is None)
            for rows, cols in sorted({plan.spec(item).tile_shape(item.part) for item in items}):
                orthogonalized_updates([torch.zeros(rows, cols, dtype=torch.float32, device=device)], muon)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error)
    return problem


def compare_over_ranks(fingerprint: str, problem: str | None, group: dist.ProcessGroup | None) -> None:
    """Raises on every rank of the group if any rank has a problem or another plan."""
    gathered: list[Any] = [(fingerprint, problem)]
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        gathered = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (fingerprint, problem), group=group)
    problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(gathered) if text]
    if problems:
        raise RuntimeError("Distributed Muon cannot start: " + "; ".join(problems))
    prints = [entry[0] for entry in gathered]
    if len(set(prints)) > 1:
        listed = ", ".join(f"rank {rank}: {entry[:12]}" for rank, entry in enumerate(prints))
        raise RuntimeError(
            f"the ranks of a group made different ownership plans ({listed}). They must build the same model with the "
            "same layout flags: compare the ranks' arguments, package versions and parameter names"
        )
