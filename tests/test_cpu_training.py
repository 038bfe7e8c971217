"""Stock models, DDP and optimizers train on the CPU backend, and every layout trains as one rank does."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.distributed import run_ranks
from tests.models import Layout

STEPS = 3

OVERLAP: dict[str, Any] = dict(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=2000)
VIRTUAL: dict[str, Any] = dict(num_layers=4, overlap_p2p_comm=True, batch_p2p_comm=False)
ONE_NORM: dict[str, Any] = dict(q_lora_rank=16, qk_layernorm=True)
DROPOUT: dict[str, Any] = dict(attention_dropout=0.2, hidden_dropout=0.2)
RECOMPUTE: dict[str, Any] = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


class Recorded:
    """An optimizer that remembers the gradient norms of its steps."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.grad_norms: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> Any:
        result = self._optimizer.step()
        self.grad_norms.append(float(result[1]))
        return result


def start(model: str, layout: Layout, dtype: torch.dtype) -> tuple[list[Any], Recorded]:
    """A wrapped model and its stock optimizer."""
    from megatron.core.optimizer import get_megatron_optimizer

    models.initialize(layout)
    chunks = models.wrap(models.make_chunks(model, layout, dtype), layout)
    return chunks, Recorded(get_megatron_optimizer(models.optimizer_config(layout, dtype, clip_grad=1e6), chunks))


def train(rank: int, world_size: int, model: str, layout: Layout, dtype: torch.dtype) -> tuple[list[float], ...]:
    """Losses and gradient norms of `STEPS` steps."""
    chunks, optimizer = start(model, layout, dtype)
    losses = [models.train_step(chunks, optimizer, 0) for _ in range(STEPS)]
    return losses, optimizer.grad_norms


@cache
def one_rank(model: str, settings: tuple[tuple[str, Any], ...], dtype: torch.dtype) -> tuple[list[float], ...]:
    return run_ranks(train, 1, model, Layout(1, config=dict(settings)), dtype)[0]


def reference(model: str, layout: Layout, dtype: torch.dtype = torch.float32) -> tuple[list[float], ...]:
    """What one rank gets for the layout's model."""
    of_the_layout = ("overlap_p2p_comm", "batch_p2p_comm", "moe_token_dispatcher_type")
    settings = {key: value for key, value in layout.config.items() if key not in of_the_layout}
    layers = layout.pp * (layout.vpp or 1)
    if layers > 2:
        settings["num_layers"] = layers
    return one_rank(model, tuple(settings.items()), dtype)


ALL_GATHER = dict(moe_token_dispatcher_type="allgather")
LAYOUTS = {
    "dp2": ("dense", Layout(2)),
    "dp2-overlap": ("dense", Layout(2, ddp=OVERLAP)),
    "tp2": ("dense", Layout(2, tp=2)),
    "tp2-sp": ("dense", Layout(2, tp=2, sequence_parallel=True)),
    "pp2": ("moe", Layout(2, pp=2)),
    "vpp2": ("moe", Layout(2, pp=2, vpp=2, config=VIRTUAL)),
    "ep2-alltoall": ("moe", Layout(2, ep=2)),
    "ep2-allgather": ("moe", Layout(2, ep=2, config=ALL_GATHER)),
    "tp2-sp-etp2-alltoall": ("moe", Layout(2, tp=2, etp=2, sequence_parallel=True)),
    "tp2-sp-ep2-alltoall": ("mla", Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True)),
    "tp2-sp-ep2-allgather": ("mla", Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True, config=ALL_GATHER)),
    "tp2-sp-norms": ("mla", Layout(2, tp=2, etp=1, sequence_parallel=True, config=ONE_NORM)),
    "instances2": ("dense", Layout(4, instances=2)),
    "instances2-overlap": ("moe", Layout(4, instances=2, ddp={**OVERLAP, "overlap_param_gather": False})),
    "tp2-sp-ep2-dp2-overlap": ("mla", Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True, ddp=OVERLAP)),
    "vpp2-dp2-overlap": ("dense", Layout(4, pp=2, vpp=2, config=VIRTUAL, ddp={**OVERLAP, "align_param_gather": True})),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_rank(name: str) -> None:
    model, layout = LAYOUTS[name]
    losses, norms = reference(model, layout)
    assert losses[0] > losses[1]
    for rank, (rank_losses, rank_norms) in enumerate(run_ranks(train, layout.world_size, model, layout, torch.float32)):
        print(name, rank, max(abs(a-b)/b for a,b in zip(rank_losses, losses)), max(abs(a-b)/b for a,b in zip(rank_norms, norms)))
