"""The line that a run prints once its optimizer is built: Muon's matrices and how they are shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer


@dataclass(frozen=True)
class RankLoad:
    """The report of a rank. Parameters are counted by the first of the ranks that share them.

    Attributes:
        stage: The pipeline stage.
        parameters: Muon's parameters that this rank counts, tensor-parallel pieces joined.
        matrices: Logical matrices in them.
        numel: Elements in them.
        adam_parameters: AdamW's parameters that this rank counts.
        flops: Newton-Schulz FLOPs of this rank in one step.
        rounds: Rounds of a step, of all its optimizers.
        buffer_bytes: Size of the exchange's buffers on this rank.
    """

    stage: int
    parameters: int
    matrices: int
    numel: int
    adam_parameters: int
    flops: int
    rounds: int
    buffer_bytes: int

    @classmethod
    def of(
        cls,
        stage: int,
        optimizers: Sequence[MuonDistributedOptimizer],
        described: Sequence[MuonDistributedOptimizer],
        adam_parameters: int,
    ) -> RankLoad:
        """The report of this rank.

        Args:
            stage: The pipeline stage.
            optimizers: Muon's optimizers, bound.
            described: Those of them with parameters that this rank counts.
            adam_parameters: AdamW's parameters that this rank counts.
        """
        exchanges = [optimizer.optimizer.exchange for optimizer in optimizers]
        specs = [matrix.spec for o in described for matrix in o.optimizer.exchange.plan.matrices]
        return cls(
            stage=stage,
            parameters=len(specs),
            matrices=sum(spec.logical_shape(part)[0] for spec in specs for part in range(len(spec.parts))),
            numel=sum(spec.numel for spec in specs),
            adam_parameters=adam_parameters,
            flops=sum(e.plan.rank_flops[dist.get_rank(e.group)] for e in exchanges),
            rounds=sum(e.num_rounds for e in exchanges),
            buffer_bytes=sum(e.buffer_bytes for e in exchanges),
        )


def start_lines(ranks: Sequence[RankLoad], layout: Mapping[str, int]) -> list[str]:
    """The line of the run and, where pipeline stages differ, one for each of them.

    Args:
        ranks: The report of every rank of the world.
        layout: Name of a parallel dimension -> its size; those of size 1 are left out, but for DP and TP.
    """
    sizes = " x ".join(f"{name}{size}" for name, size in layout.items() if size > 1 or name in ("DP", "TP"))
    lines = [f"Distributed Muon: {_counts(ranks)} over {len(ranks)} ranks ({sizes}); {_shares(ranks)}"]
    stages = [[rank for rank in ranks if rank.stage == stage] for stage in sorted({rank.stage for rank in ranks})]
    described = [f"{_counts(stage)}; {_shares(stage)}" for stage in stages]
    if len(set(described)) > 1:
        lines += [f"Distributed Muon: pipeline stage {stage}: {text}" for stage, text in enumerate(described)]
    return lines


def _counts(ranks: Sequence[RankLoad]) -> str:
    parameters, matrices, numel = (sum(getattr(r, n) for r in ranks) for n in ("parameters", "matrices", "numel"))
    elements = f"{numel / 1e9:.1f} G" if numel >= 1e9 else f"{numel / 1e6:.1f} M"
    return f"{parameters} parameters, {matrices} matrices, {elements} elements"


def _shares(ranks: Sequence[RankLoad]) -> str:
    rounds = max(rank.rounds for rank in ranks)
    mean = sum(rank.flops for rank in ranks) / len(ranks)
    busiest = max(rank.flops for rank in ranks) / mean if mean else 1.0
    buffers = max(rank.buffer_bytes for rank in ranks) / 2**20
    adam = sum(rank.adam_parameters for rank in ranks)
    return (
        f"{rounds} round{'s' * (rounds != 1)}, busiest rank {busiest:.2f} of the mean; buffers {buffers:.0f} MiB; "
        f"AdamW: {adam} parameters"
    )
