"""The process groups of a layout, made by Megatron-Core itself, so that links are measured between the run's ranks."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_muon.estimate.stages import Layout
from megatron_muon.profile.settings import GROUP_KINDS, GroupKind, LinkSettings


@dataclass(frozen=True)
class Groups:
    """All groups of one kind; they partition the world, and are measured at the same time as in a run.

    Attributes:
        kinds: Names; several if the layout has the same groups more than once.
        ranks: Global ranks of each group, ascending.
        group: The group of this rank.
    """

    kinds: tuple[GroupKind, ...]
    ranks: tuple[tuple[int, ...], ...]
    group: dist.ProcessGroup

    @property
    def name(self) -> str:
        return "=".join(self.kinds)

    @property
    def world_size(self) -> int:
        return len(self.ranks[0])


def layout_for(world_size: int, settings: LinkSettings) -> Layout:
    """The layout of a world; data parallelism takes the ranks that the other dimensions leave.

    Raises:
        ValueError: If a size is not positive or does not divide.
    """
    tp, pp = settings.tp, settings.pp
    for flag, size in (("--tp", tp), ("--pp", pp)):
        if size < 1:
            raise ValueError(f"{flag}: got {size}, expected a positive integer")
    if world_size % (tp * pp):
        raise ValueError(
            f"--tp x --pp: got {tp} x {pp}, expected a divisor of the {world_size} ranks that torchrun started; "
            "change them or --nproc-per-node"
        )
    dp = world_size // (tp * pp)
    return Layout(dp=dp, tp=tp, pp=pp, ep=settings.ep, etp=settings.etp, instances=settings.instances)


def group_sizes(layout: Layout) -> dict[GroupKind, int]:
    """Ranks of a group of each kind."""
    dp, expert_dp = layout.dp // layout.instances, layout.expert_dp // layout.instances
    return {
        "world": layout.num_ranks,
        "tp": layout.tp,
        "dp": dp,
        "tp_dp": layout.tp * dp,
        "pp": layout.pp,
        "ep": layout.ep,
        "expert_tp": layout.expert_tp,
        "expert_dp": expert_dp,
        "expert_tp_dp": layout.expert_tp * expert_dp,
    }


def choose_kinds(layout: Layout, wanted: Sequence[GroupKind] | None) -> list[GroupKind]:
    """The kinds to be measured, in the order of `GROUP_KINDS`.

    Args:
        layout: The layout.
        wanted: Kinds to measure. None takes all of more than one rank, without the world and without the experts'
            where these are the dense ones; the world if nothing is left.

    Raises:
        ValueError: If a wanted kind has only one rank.
    """
    sizes = group_sizes(layout)
    if wanted is None:
        no_experts = not layout.has_expert_groups
        left_out = {"world", *(kind for kind in GROUP_KINDS if no_experts and kind.startswith("expert"))}
        return [kind for kind in GROUP_KINDS if kind not in left_out and sizes[kind] > 1] or ["world"]
    for kind in wanted:
        if kind != "world" and sizes[kind] == 1:
            raise ValueError(f"--groups: got {kind}, which has one rank in this layout; leave it out, or change it")
    return [kind for kind in GROUP_KINDS if kind in wanted]


def make_groups(layout: Layout, kinds: Sequence[GroupKind]) -> list[Groups]:
    """Megatron's groups of the given kinds, each set of ranks once. Collective over the world.

    Groups of a run that exist already are used.

    Args:
        layout: Layout with as many ranks as the world has.
        kinds: As `choose_kinds` returns them.

    Raises:
        RuntimeError: If Megatron's groups do not have the layout's sizes.
    """
    made = _megatron_groups(layout)
    chosen: dict[tuple[tuple[int, ...], ...], list[GroupKind]] = {}
    for kind in kinds:
        gathered: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, dist.get_process_group_ranks(made[kind]))
        ranks = tuple(sorted({tuple(own) for own in gathered}))
        expected = group_sizes(layout)[kind]
        if {len(own) for own in ranks} != {expected}:
            raise RuntimeError(f"Megatron made {kind} groups {ranks}, expected groups of {expected} ranks")
        chosen.setdefault(ranks, []).append(kind)
    return [Groups(tuple(same), ranks, made[same[0]]) for ranks, same in chosen.items()]


def release_groups() -> None:
    """Makes Megatron forget its groups, which end together with the world's."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silences what Megatron and torch print about missing CUDA, Transformer Engine and apex."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _megatron_groups(layout: Layout) -> dict[GroupKind, dist.ProcessGroup]:
    with quiet_imports():
        from megatron.core import parallel_state

        from megatron_muon.megatron.optimizer.process_grid import make_grids
    if not parallel_state.model_parallel_is_initialized():
        _initialize(parallel_state, layout)
    # Any: torch's types include the placeholders of no group, which these are not.
    world: Any = dist.group.WORLD
    made: dict[GroupKind, dist.ProcessGroup] = {
        "world": world,
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "expert_tp": parallel_state.get_expert_tensor_parallel_group(),
        "expert_dp": parallel_state.get_expert_data_parallel_group(partial_expert_data_parallel=True),
    }
    pairs = {"dense": (made["tp"], made["dp"]), "experts": (made["expert_tp"], made["expert_dp"])}
    grids = make_grids(pairs, [parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)])
    return {**made, "tp_dp": grids["dense"].group, "expert_tp_dp": grids["experts"].group}


def _initialize(parallel_state: Any, layout: Layout) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        num_distributed_optimizer_instances=layout.instances,
        create_gloo_process_groups=False,
    )
