"""What a step's exchange sends between which ranks: from a plan, from a model under a layout, or from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.config import TORCH_DTYPES, MuonConfig
from megatron_muon.estimate.estimates import distinct_stages, stage_kinds, stage_plans
from megatron_muon.estimate.schemes import PlanSettings
from megatron_muon.estimate.shapes import load_model
from megatron_muon.estimate.stages import Layout, check_experts
from megatron_muon.plan.build import CostModel
from megatron_muon.plan.machines import GPUS_PER_NODE
from megatron_muon.plan.ownership import OwnershipPlan

Matrix = tuple[tuple[int, ...], ...]
"""Elements that rank i of a group sends to rank j, as [i][j]."""

VERSION = 1


@dataclass(frozen=True)
class RoundTraffic:
    """The two all-to-alls of one round; those of its teams are not in it.

    Attributes:
        gather: From where slices are stored to the owners.
        scatter: From the owners back.
    """

    gather: Matrix
    scatter: Matrix


@dataclass(frozen=True)
class Traffic:
    """The exchange of one group.

    Attributes:
        expert: Over `expert_tp_dp`, else `tp_dp`.
        ranks: Global ranks of the group, in its order.
        dtype: Name of the elements' data type, a key of `config.TORCH_DTYPES`.
        rounds: In order.
    """

    expert: bool
    ranks: tuple[int, ...]
    dtype: str
    rounds: tuple[RoundTraffic, ...]

    @property
    def element_bytes(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]  # type: ignore[index]  # checked when made

    def to_json(self) -> dict[str, Any]:
        """As `load_traffic` reads it."""
        return {
            "expert": self.expert,
            "ranks": list(self.ranks),
            "dtype": self.dtype,
            "rounds": [{"gather": [*map(list, r.gather)], "scatter": [*map(list, r.scatter)]} for r in self.rounds],
        }


def plan_traffic(plan: OwnershipPlan, *, expert: bool, ranks: Sequence[int], dtype: str) -> Traffic:
    """What an exchange along a plan sends.

    Args:
        plan: The plan.
        expert: Whether it is about experts.
        ranks: Global ranks of its group, in the plan's order.
        dtype: The exchange's.

    Raises:
        ValueError: If there are not as many ranks as the plan has.
    """
    if len(ranks) != plan.world_size:
        raise ValueError(f"ranks: got {len(ranks)}, expected the plan's {plan.world_size}")

    def matrix(round_index: int, scatter: bool) -> Matrix:
        return tuple(map(tuple, plan.traffic(round_index, scatter=scatter)))

    rounds = tuple(RoundTraffic(matrix(r, False), matrix(r, True)) for r in range(len(plan.rounds)))
    return Traffic(expert, tuple(ranks), dtype, rounds)


def model_traffic(
    model_name: str,
    layout: Layout,
    muon: MuonConfig,
    *,
    device_type: str = "cuda",
    ranks_per_node: int = GPUS_PER_NODE,
) -> list[Traffic]:
    """The exchanges of all groups of a layout, as the plugin plans them for a model.

    Layers are Transformer Engine's on a GPU and Megatron's local ones elsewhere; gradient reduction overlaps.

    Args:
        model_name: As for `planning.shapes.load_model`.
        layout: The layout.
        muon: Muon's settings.
        device_type: Of the ranks, on which it depends whether they share matrices.
        ranks_per_node: Consecutive global ranks that share a node.

    Raises:
        ValueError: If there is no such model, or it does not divide over the layout.
    """
    model = load_model(model_name)
    settings = PlanSettings(
        muon=muon,
        impl="transformer_engine" if device_type == "cuda" else "local",
        cost=CostModel.for_device(device_type),
        gpus_per_node=ranks_per_node,
    )
    check_experts(model, layout)
    per_stage = layout.dp * layout.tp
    out = []
    for (layers, bucket_size), stages in distinct_stages(model, layout, settings).items():
        for grid, _, plans in stage_plans(stage_kinds(layers, layout, settings), settings, bucket_size):
            for ep_rank, plan in enumerate(plans):
                places = [grid.stage_rank(rank, ep_rank) for rank in range(grid.size)]
                for first in (
                    stage * per_stage + instance * layout.stage_ranks
                    for stage in stages
                    for instance in range(layout.instances)
                ):
                    ranks = [first + place for place in places]
                    out.append(plan_traffic(plan, expert=grid.expert, ranks=ranks, dtype=muon.exchange_dtype))
    return sorted(out, key=lambda t: (t.expert, t.ranks))


def run_traffic(optimizer: Any) -> list[Traffic]:
    """The exchanges of a run, for `save_traffic` on one rank. Collective over the world.

    Args:
        optimizer: As `megatron_muon.get_megatron_optimizer` returns it.

    Raises:
        ValueError: If none of its optimizers is Muon's.
    """
    from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer

    parts = [p for p in optimizer.chained_optimizers if isinstance(p, MuonDistributedOptimizer)]
    if not parts:
        raise ValueError("optimizer: got one without Muon, expected that of a run with --distributed-muon")
    own = []
    for part in parts:
        exchange = part.optimizer.exchange
        parameters = [p for buffer in part.buffers for p in buffer.params]
        expert = any(not getattr(p, "allreduce", True) for p in parameters)
        dtype = next(name for name, dtype in TORCH_DTYPES.items() if dtype == exchange.dtype)
        if exchange.plan.matrices:
            ranks = dist.get_process_group_ranks(exchange.group)
            own.append(plan_traffic(exchange.plan, expert=expert, ranks=ranks, dtype=dtype))
    gathered: list[list[Traffic]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return sorted({t for traffic in gathered for t in traffic}, key=lambda t: (t.expert, t.ranks))


def save_traffic(path: Path, traffic: Sequence[Traffic]) -> None:
    """Writes a file for `load_traffic`.

    Raises:
        OSError: If it cannot be written.
    """
    path.write_text(json.dumps(traffic_to_json(traffic)), encoding="utf-8")


def traffic_to_json(traffic: Sequence[Traffic]) -> dict[str, Any]:
    """What `save_traffic` writes."""
    return {"version": VERSION, "exchanges": [t.to_json() for t in traffic]}


def load_traffic(path: Path, layout: Layout) -> list[Traffic]:
    """Reads what `save_traffic` wrote, as recorded by another run at the same layout.

    Args:
        path: The file.
        layout: The layout that it has to be of.

    Raises:
        ValueError: If it cannot be read, or is not of this layout.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--traffic: cannot read {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"--traffic: {path} is no valid JSON: {error}") from error
    exchanges = content.get("exchanges") if isinstance(content, dict) else None
    if not isinstance(exchanges, list) or content.get("version") != VERSION:
        raise ValueError(
            f"--traffic: got {path} without version {VERSION} and exchanges, expected a file that --save-traffic wrote"
        )
    traffic = [_traffic(f"--traffic: {path}: exchanges[{i}]", entry) for i, entry in enumerate(exchanges)]
    for expert in (False, True):
        _check_ranks(path, [t.ranks for t in traffic if t.expert == expert], layout, expert)
    return traffic


def _check_ranks(path: Path, got: Sequence[tuple[int, ...]], layout: Layout, expert: bool) -> None:
    if not got:
        return
    size = (layout.expert_dp * layout.expert_tp if expert else layout.dp * layout.tp) // layout.instances
    covered = sorted(rank for ranks in got for rank in ranks)
    if covered != list(range(layout.num_ranks)) or {len(ranks) for ranks in got} != {size}:
        kind = "expert" if expert else "dense"
        raise ValueError(
            f"--traffic: {path} has {kind} exchanges over {[list(r) for r in got]}, expected "
            f"groups of {size} that cover {layout.num_ranks} ranks; give the layout of the run that recorded it"
        )


def _traffic(where: str, entry: Any) -> Traffic:
    if not isinstance(entry, Mapping) or set(entry) != {"expert", "ranks", "dtype", "rounds"}:
        raise ValueError(f"{where}: expected expert, ranks, dtype and rounds")
    ranks, dtype, rounds = entry["ranks"], entry["dtype"], entry["rounds"]
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"{where}: dtype: got {dtype!r}, expected one of {', '.join(TORCH_DTYPES)}")
    if not isinstance(entry["expert"], bool) or not _is_counts(ranks) or not isinstance(rounds, list):
        raise ValueError(f"{where}: expected expert to be true or false, ranks to be numbers and rounds to be a list")
    made = []
    for index, content in enumerate(rounds):
        if not isinstance(content, Mapping) or set(content) != {"gather", "scatter"}:
            raise ValueError(f"{where}: rounds[{index}]: expected gather and scatter")
        made.append(
            RoundTraffic(
                *(_matrix(f"{where}: rounds[{index}].{key}", content[key], len(ranks)) for key in ("gather", "scatter"))
            )
        )
    return Traffic(entry["expert"], tuple(ranks), dtype, tuple(made))


def _matrix(where: str, rows: Any, size: int) -> Matrix:
    if not isinstance(rows, list) or len(rows) != size or not all(_is_counts(r) and len(r) == size for r in rows):
        raise ValueError(f"{where}: expected {size} rows of {size} counts of elements")
    return tuple(map(tuple, rows))


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
