"""Distributed Muon equals `reference.py` on the whole model, whatever the layout."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.config import MuonConfig
from megatron_muon.reference import ReferenceMuon
from tests.distributed import run_ranks
from tests.models import Layout, Place, initial_value, initialize, make_chunks, make_config, normal, optimizer_config
from tests.models import places as places_of
from tests.models import wrap

STEPS, LR, WEIGHT_DECAY = 3, 0.02, 0.1
EXACT = MuonConfig(exchange_dtype="fp32", ns_dtype="fp32", batched=False)
OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True)


def logical_rows(place: Place, config: Any) -> list[list[int]] | None:
    """Row numbers of the logical matrices of a whole parameter, written down independently of the product's code."""
    rows = place.shape[0]
    if re.search(r"linear_qkv\.weight$", place.name):
        queries = config.num_attention_heads // config.num_query_groups
        kinds: list[list[int]] = [[], [], []]
        row = 0
        for _ in range(config.num_query_groups):
            for kind, heads in ((0, queries), (1, 1), (2, 1)):
                kinds[kind] += range(row, row + heads * config.kv_channels)
                row += heads * config.kv_channels
        assert row == rows
        return kinds
    if re.search(r"linear_fc1\.weight$", place.name):
        return [list(range(rows // 2)), list(range(rows // 2, rows))]
    return None


def is_muons(place: Place) -> bool:
    return len(place.shape) == 2 and not re.search(r"embedding|output_layer", place.name)


def gradient(place: Place, step: int) -> Tensor:
    """The whole gradient of a step. Expert 3's is zero at step 1: it saw no token."""
    if step == 1 and "local_experts.3." in place.name:
        return torch.zeros(place.shape)
    return normal(f"gradient {step} {place.name}", place.shape)


def check_layout(rank: int, world_size: int, model: str, layout: Layout, muon: MuonConfig, bf16: bool) -> dict[str, Any]:
    """Runs three steps with known gradients; compares every parameter and momentum of this rank with the oracle."""
    from megatron_muon.megatron.build import get_megatron_optimizer
    from megatron_muon.megatron.distributed import MuonDistributedOptimizer
    from megatron_muon.megatron.routing import tag_parameters

    dtype = torch.bfloat16 if bf16 else torch.float32
    initialize(layout)
    chunks = make_chunks(model, layout, dtype)
    tag_parameters(chunks, muon)
    wrapped = wrap(chunks, layout)
    config = optimizer_config(layout, dtype, lr=LR, weight_decay=WEIGHT_DECAY, clip_grad=0.0)
    optimizer = get_megatron_optimizer(config, wrapped, muon=muon)
    for group in optimizer.param_groups:
        # What Megatron's scheduler does at every step.
        group["lr"], group["weight_decay"] = LR, WEIGHT_DECAY * group["wd_mult"]

    everything = [place for chunk in wrapped for place in places_of(chunk, layout)]
    model_config = make_config(model, layout, dtype)
    whole = {p.name: initial_value(p.name, p.shape).to(dtype).float() for p in everything}
    rows = {p.name: r for p in everything if (r := logical_rows(p, model_config)) is not None}
    matrices = {p.name for p in everything if is_muons(p)}
    oracle = ReferenceMuon({n: w for n, w in whole.items() if n in matrices}, rows, muon)
    others = {n: torch.nn.Parameter(w) for n, w in whole.items() if n not in matrices}
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in others.values() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in others.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
    )
    for step in range(STEPS):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        for place in everything:
            place.parameter.main_grad.copy_(place.shard(gradient(place, step)))
        successful, _, _ = optimizer.step()
        assert successful
        for chunk in wrapped:
            if layout.ddp.get("overlap_param_gather"):
                chunk.start_param_sync(force_sync=True)
        by_name = {p.name: gradient(p, step) for p in everything}
        oracle.step({n: by_name[n] for n in matrices}, lr=LR, weight_decay=WEIGHT_DECAY)
        for name, parameter in others.items():
            parameter.grad = by_name[name]
        if others:
            adam.step()

    worst: dict[str, float] = {"muon": 0.0, "momentum": 0.0, "adam": 0.0}

    def compare(kind: str, got: Tensor, expected: Tensor) -> None:
        scale = expected.abs().max().clamp_min(1e-30)
        worst[kind] = max(worst[kind], ((got - expected).abs().max() / scale).item())

    for place in everything:
        expected = oracle.parameters[place.name] if place.name in matrices else others[place.name].detach()
        kind = "muon" if place.name in matrices else "adam"
        compare(kind, place.parameter.detach().float(), place.shard(expected).to(dtype).float())
    place_of = {place.parameter: place for place in everything}
    momentum_bytes = 0
    held = 0
    calls: list[dict[str, Any]] = []
    for part in optimizer.chained_optimizers:
        if not isinstance(part, MuonDistributedOptimizer):
            continue
        for parameter, main in part._main_slices().items():
            place = place_of[parameter]
            span = part._get_model_param_range_map(parameter)["param"]
            state = part.optimizer.state[main]
            assert set(state) == {"momentum_buffer"}
            momentum_bytes += state["momentum_buffer"].nbytes
            held += span.size
            expected = place.shard(oracle.momenta[place.name]).reshape(-1)[span.start : span.end]
            compare("momentum", state["momentum_buffer"], expected)
            compare("muon", main, place.shard(oracle.parameters[place.name]).reshape(-1)[span.start : span.end])
        exchange = part.optimizer.exchange
        calls.append(
            dict(
                group=tuple(dist.get_process_group_ranks(part.grid.group)),
                collectives=exchange.stats.collectives,
                bytes_sent=exchange.stats.bytes_sent,
                planned=exchange.plan.sent_numel()[exchange.rank] * 4 * STEPS,
                rounds=exchange.num_rounds,
                matrices=exchange.plan.num_logical_matrices,
            )
        )
    return dict(worst=worst, momentum_bytes=momentum_bytes, held=held, exchanges=calls)


LAYOUTS: dict[str, tuple[str, Layout]] = {
    "one rank": ("dense", Layout(1)),
    "dp2": ("odd", Layout(2)),
    "dp3": ("odd", Layout(3)),
    "dp4": ("dense", Layout(4)),
    "tp2": ("odd", Layout(2, tp=2)),
    "tp4": ("dense", Layout(4, tp=4, config=dict(num_query_groups=4))),
    "tp2 dp2": ("odd", Layout(4, tp=2)),
    "tp2 dp2 mla": ("mla", Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True)),
    "pp2 dp2": ("dense", Layout(4, pp=2)),
    "vpp": ("dense", Layout(2, pp=2, vpp=2)),
    "vpp dp2": ("dense", Layout(4, pp=2, vpp=2)),
    "vpp dp2 overlap": ("dense", Layout(4, pp=2, vpp=2, ddp=OVERLAP)),
    "ep2": ("moe", Layout(2, ep=2)),
    "ep2 etp2": ("moe", Layout(4, ep=2, tp=2, etp=2, sequence_parallel=True)),
    "ep2 edp2": ("moe", Layout(4, ep=2)),
    "instances": ("moe", Layout(4, ep=2, instances=2)),
    "instances dense": ("odd", Layout(4, instances=2)),
    "small buckets": ("odd", Layout(2, ddp=dict(**OVERLAP, bucket_size=700))),
    "learned positions": ("learned", Layout(2)),
    "more ranks than matrices": ("odd", Layout(8, config=dict(num_layers=1))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_reference_bitwise(name: str) -> None:
    model, layout = LAYOUTS[name]
    for rank, result in enumerate(run_ranks(check_layout, layout.world_size, model, layout, EXACT, False)):
        assert result["worst"]["muon"] == 0.0, (rank, result)
        assert result["worst"]["momentum"] == 0.0, (rank, result)
        # torch.optim.AdamW on slices and on whole tensors: the same operations in other vector lanes.
        assert result["worst"]["adam"] <= 1e-6, (rank, result)
        assert result["momentum_bytes"] == 4 * result["held"]
        for exchange in result["exchanges"]:
            assert exchange["bytes_sent"] == exchange["planned"]
            expected = 2 * exchange["rounds"] * STEPS if len(exchange["group"]) > 1 else 0
            assert exchange["collectives"] == expected
