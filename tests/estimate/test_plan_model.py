"""Plans from shapes alone: the plugin's own matrices, Megatron's own buffers, upstream's published behaviour."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_muon.config import MuonConfig
from megatron_muon.estimate.buffers import default_bucket_size
from megatron_muon.estimate.collectives import all_to_all, exchange_ms, ring
from megatron_muon.estimate.estimates import (
    MOONLIGHT,
    OURS,
    SCHEMES,
    UPSTREAM,
    estimate_model,
    mean,
)
from megatron_muon.estimate.groups import PlanSettings, matrix_groups, stage_plans
from megatron_muon.estimate.huggingface import model_from_config
from megatron_muon.estimate.models import BUILT_IN, Model
from megatron_muon.estimate.schemes import SchemeDemand, distributed_muon, layer_wise
from megatron_muon.estimate.shapes import load_model, model_from_shapes
from megatron_muon.estimate.stages import Layout, grids, split_layers, stage_specs
from megatron_muon.matrices.fused import FusedQkv
from megatron_muon.newton_schulz import newton_schulz_flops
from megatron_muon.plan.build import CostModel
from megatron_muon.plan.links_file import LinkFigures, MeasuredLinks
from megatron_muon.plan.machines import GPU_MODELS, LINK_EFFICIENCY
from megatron_muon.plan.ownership import Transfers
from megatron_muon.plan.wire import Wire
from tests.distributed import run_ranks
from tests.models import Layout as RunLayout

TINY = {
    "other_parameters": 100,
    "layers": [{"matrices": [{"name": "a", "shape": [64, 32]}, {"name": "b", "shape": [32, 16]}]}],
}


def cost_of(rows: int, cols: int) -> int:
    """What the default settings' five steps in bf16 cost."""
    return newton_schulz_flops(rows, cols, 5, dtype="bf16")


def estimate(plan: Any, scheme: str, stage: int = 0) -> SchemeDemand:
    found = plan.stages[stage].schemes[scheme]
    assert found is not None
    return found


# Models


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_models_have_the_published_number_of_parameters(name: str) -> None:
    assert load_model(name).numel == pytest.approx(BUILT_IN[name].published_numel, rel=0.01)


def test_hugging_face_config(tmp_path: Path) -> None:
    config = dict(BUILT_IN["qwen3-30b-a3b"].config, mlp_only_layers=[1], num_hidden_layers=3, tie_word_embeddings=True)
    path = tmp_path / "some-model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    model = load_model(str(path))
    assert model.name == "some-model"
    assert model.expert_counts == (128,)
    names = [[m.name for m in layer] for layer in model.layers]
    attention = ["self_attention.linear_proj", "self_attention.linear_qkv"]
    sparse = [*attention, "mlp.router", "mlp.experts.linear_fc1", "mlp.experts.linear_fc2"]
    assert names == [sparse, [*attention, "mlp.linear_fc1", "mlp.linear_fc2"], sparse]
    # Per layer two norms of 2048, and of 128 for Q and K; a last norm; one matrix for embedding and output.
    assert model.other_numel == 3 * (2 * 2048 + 2 * 128) + 2048 + 151936 * 2048


def test_hugging_face_defaults() -> None:
    """Old llama configs have neither head_dim nor num_key_value_heads; Qwen's attention may have biases."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 10,
        "attention_bias": True,
    }
    model = model_from_config("old", config, "test")
    qkv = model.layers[0][1]
    assert (qkv.rows, qkv.cols, qkv.kind) == (3 * 64, 64, FusedQkv.of_heads(1, 16))
    assert model.other_numel == 2 * 64 + 64 + 2 * 10 * 64 + (3 * 64 + 64)


def test_shapes_from_yaml_equal_the_same_model_from_its_config(tmp_path: Path) -> None:
    path = tmp_path / "llama.yaml"
    path.write_text(
        """
        name: llama3-8b
        other_parameters: 1050939392
        layers:
          - repeat: 32
            matrices:
              - {name: self_attention.linear_proj, shape: [4096, 4096], split: columns, unit: 128}
              - {name: self_attention.linear_qkv, shape: [6144, 4096], split: rows, parts: {q: 512, k: 128, v: 128}}
              - {name: mlp.linear_fc1, shape: [28672, 4096], split: rows, gated: true}
              - {name: mlp.linear_fc2, shape: [4096, 14336], split: columns}
        """
    )
    ours, built_in = load_model(str(path)), load_model("llama3-8b")
    layout, config = Layout(dp=2, tp=4), MuonConfig()
    assert stage_specs(ours.layers, layout, config) == stage_specs(built_in.layers, layout, config)
    assert ours.numel == built_in.numel


# The plugin


HF_MLA = {
    "model_type": "deepseek_v3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 64,
}
HF_ODD = {
    "model_type": "llama",
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 7,
    "intermediate_size": 44,
    "vocab_size": 64,
}
SMALL_BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 700}
# (model of tests/models.py, the same for Hugging Face, sizes, DDP settings)
RUNS: list[tuple[str, dict[str, Any], dict[str, int], dict[str, Any]]] = [
    ("mla", HF_MLA, dict(dp=2, tp=2, ep=2, etp=1), {}),
    ("mla", HF_MLA, dict(dp=2, pp=2, ep=2), SMALL_BUCKETS),
    ("mla", HF_MLA, dict(dp=4), {}),
    ("odd", HF_ODD, dict(dp=4, instances=2), SMALL_BUCKETS),
    ("odd", HF_ODD, dict(dp=1, tp=4), SMALL_BUCKETS),
]


def plans_of_real_runs(rank: int, world_size: int) -> tuple[list[list[tuple[str, tuple[int, ...], int]]], list[int]]:
    """(fingerprint, load, buffers of this rank) of plans, experts' last, for each of RUNS; Megatron's bucket sizes."""
    from types import SimpleNamespace

    from megatron.core import parallel_state
    from megatron.training import training

    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer
    from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer
    from tests.models import initialize, make_chunks, optimizer_config, wrap

    found = []
    muon = MuonConfig()
    for model, _, sizes, ddp in RUNS:
        layout = RunLayout(world_size, ddp=ddp, **{k: v for k, v in sizes.items() if k != "dp"})
        initialize(layout)
        chunks = make_chunks(model, layout, torch.bfloat16)
        tag_parameters(chunks, muon)
        optimizer = get_megatron_optimizer(optimizer_config(layout, torch.bfloat16), wrap(chunks, layout), muon=muon)
        exchanges = [
            part.optimizer.exchange
            for part in optimizer.chained_optimizers
            if isinstance(part, MuonDistributedOptimizer)
        ]
        # A stage without experts has an empty plan for them where another stage has some.
        found.append([(e.plan.fingerprint, e.plan.rank_flops, e.buffer_bytes) for e in exchanges if e.plan.matrices])
        parallel_state.destroy_model_parallel()
    training.get_pg_size = lambda group: group
    unset = SimpleNamespace(num_buckets=None, bucket_size=None)
    return found, [training.resolve_ddp_bucket_size(unset, dp, True, 0) for dp in (1, 40, 41, 512)]


def test_plans_are_the_plugins() -> None:
    """Names, order, shapes, slices, owners, load and bytes of buffers: the fingerprints of real optimizers' plans."""
    results = run_ranks(plans_of_real_runs, 4)
    for index, (_, config, sizes, ddp) in enumerate(RUNS):
        layout = Layout(**sizes)
        # The runs are on CPUs of one host.
        settings = PlanSettings(
            impl="local",
            overlap_grad_reduce=bool(ddp),
            bucket_size=ddp.get("bucket_size"),
            cost=CostModel.for_device("cpu"),
            gpus_per_node=4,
        )
        model = model_from_config("test", config, "test")
        counts = split_layers(len(model.layers), layout)
        ranks_per_stage = 4 // layout.pp
        for stage in range(layout.pp):
            layers = model.layers[sum(counts[:stage]) :][: counts[stage]]
            groups = matrix_groups(layers, layout, settings, settings.bucket_size if stage == 0 else None)
            plans = stage_plans(groups)
            for rank in range(stage * ranks_per_stage, (stage + 1) * ranks_per_stage):
                place = rank - stage * ranks_per_stage
                mine = []
                for group, own in zip(groups, plans, strict=True):
                    grid = group.grid
                    ep_rank = place // grid.tp % grid.ep
                    plan = own[ep_rank]
                    load = distributed_muon(group, plan, ep_rank)
                    at = grid.places(ep_rank).tolist().index(place % layout.stage_ranks)
                    mine.append((plan.fingerprint, plan.rank_flops, int(load.exchange_buffer_bytes[at])))
                assert results[rank][0][index] == mine, (config["model_type"], sizes, rank)
    assert results[0][1] == [default_bucket_size(dp) for dp in (1, 40, 41, 512)]


def test_tensor_parallel_pieces_under_transformer_engine() -> None:
    """Grouped experts come matrix by matrix; MLA's down projections stay whole on each tensor-parallel rank."""
    model = model_from_config("test", HF_MLA, "test")
    dense, experts = stage_specs(model.layers[1:], Layout(dp=2, tp=2, ep=2, etp=1), MuonConfig())
    names = ["linear_fc1.weight0", "linear_fc1.weight1", "linear_fc2.weight0", "linear_fc2.weight1"]
    assert [s.name for s in experts] == [f"decoder.layers.0.mlp.experts.{name}" for name in names]
    assert {s.tp_size for s in experts} == {1}
    down = next(s for s in dense if "kv_down" in s.name)
    assert (down.shape, down.tp_size, down.partition_dim) == ((16 + 4, 32), 2, None)


@pytest.mark.parametrize("settings", [PlanSettings(), PlanSettings(muon=MuonConfig(exchange_dtype="fp32", ns_steps=3))])
def test_loads_and_bytes_are_the_plans(settings: PlanSettings) -> None:
    model, layout = load_model("moonlight-16b"), Layout(dp=8, tp=2, pp=9, ep=4, etp=1)
    groups = matrix_groups(model.layers[:3], layout, settings)
    element_size = 4 if settings.muon.exchange_dtype == "fp32" else 2
    plans = [
        (group, ep_rank, plan)
        for group, own in zip(groups, stage_plans(groups), strict=True)
        for ep_rank, plan in enumerate(own)
    ]
    assert len(plans) == 1 + 4
    for group, ep_rank, plan in plans:
        load, grid = distributed_muon(group, plan, ep_rank), group.grid
        assert load.flops == plan.rank_flops
        padding = 6 * group.buffer.padding_numel * (grid.dp - 1) / grid.dp
        assert load.sent_bytes == tuple(n * element_size + padding for n in plan.sent_numel())
        assert load.team_bytes == tuple(near + far for near, far in zip(*plan.team_sent_bytes(), strict=True))
        assert sum(c.issued for c in load.collectives) == Wire(plan).num_collectives + (padding > 0 and grid.dp > 1) + (
            sum(map(plan.team_stages, range(len(plan.rounds))))
        )
    # The planner's own count, seen where one rank has everything.
    alone = Layout(tp=1)
    (group,) = matrix_groups(model.layers[:2], alone, settings)
    ((plan,),) = stage_plans([group])
    assert sum(group.flops) == sum(plan.rank_flops)


# Numbers


def test_tiny_model_by_hand() -> None:
    """Two matrices, 2048 and 512 elements, over two ranks.

    Buffers fill backwards: b at 0..512, a at 512..2560, cut at 1280; so rank 0 stores b and 768 elements of a, rank 1
    the other 1280 of a. Rank 1 holds most of a and owns it, rank 0 owns b: 768 elements go to rank 1 and come back.
    Upstream puts a on one rank and b on the other, and pads b's shard to a's size.
    """
    plan = estimate_model(model_from_shapes("tiny", TINY, "test"), Layout(dp=2))
    assert plan.model.numel == 2048 + 512 + 100
    (stage,) = plan.stages
    cost_a, cost_b = cost_of(64, 32), cost_of(32, 16)
    assert (stage.num_logical_matrices, stage.param_numel) == (2, (2560, 0))
    assert stage.ideal_flops == (cost_a + cost_b) / 2
    assert stage.adamw_bytes == 2560 * (4 + 2) / 2

    ours = estimate(plan, OURS)
    assert ours.flops == (cost_b, cost_a)
    assert ours.sent_bytes == (768 * 2, 768 * 2)
    assert ours.momentum_bytes == (1280 * 4, 1280 * 4)
    assert (ours.buffer_bytes, ours.padding) == (2560 * 6, (0.0, None))
    # There and back on one node's NVLink.
    h100, rates = GPU_MODELS[0], CostModel()
    seconds = 1536 / (450e9 * LINK_EFFICIENCY) + rates.node_latency_s
    assert exchange_ms(h100, ours.collectives, rates) == pytest.approx(2 * 1e3 * seconds)
    links = MeasuredLinks("", LinkFigures(100.0, 7.0), None, None)
    measured = exchange_ms(h100, ours.collectives, CostModel.for_device("cuda", links), links)
    assert measured == pytest.approx(2 * 1e3 * (1536 / 100e9 + 7e-6))
    # Momentum, packing and weights of what a rank stores, what it owns, and the bf16 parameters that it gathers.
    assert ours.memory_traffic_bytes == (46 * 1280 + 8 * 512 + 2 * 2560, 46 * 1280 + 8 * 2048 + 2 * 2560)

    upstream = estimate(plan, UPSTREAM)
    assert upstream.flops == (cost_a, cost_b)
    assert upstream.padding == (1536 / 2560, None)
    assert upstream.sent_bytes == (1536 * 6 / 2,) * 2
    assert upstream.momentum_bytes == (2048 * 4, 512 * 4)
    assert upstream.buffer_bytes == 4096 * 6

    moonlight = estimate(plan, MOONLIGHT)
    assert moonlight.flops == (cost_a + cost_b, cost_a)
    assert moonlight.sent_bytes == (2560 * 2 / 2,) * 2
    assert moonlight.momentum_bytes == ours.momentum_bytes


def test_dense_matrices_go_where_experts_left_room() -> None:
    """Two experts on ep 2, dp 4: each is one matrix on two ranks, half on either, so that the first of them owns it.

    Those are the stage's ranks 0 and 1 (expert-parallel rank fastest); the two dense matrices go to 2 and 3.
    """
    expert = {"name": "mlp.experts.linear_fc1", "shape": [64, 64], "experts": 2}
    dense = [{"name": name, "shape": [64, 32]} for name in ("a", "b")]
    shapes = {"layers": [{"matrices": [*dense, expert]}]}
    plan = estimate_model(model_from_shapes("tiny", shapes, "test"), Layout(dp=4, ep=2))
    cost, expert_cost = cost_of(64, 32), cost_of(64, 64)
    assert estimate(plan, OURS).flops == (expert_cost, expert_cost, cost, cost)
    # Upstream packs by size, each kind on its own: its ranks 0 and 1 have both.
    assert estimate(plan, UPSTREAM).flops == (expert_cost + cost, expert_cost + cost, 0, 0)


def test_tensor_parallel_gathers_by_hand() -> None:
    """One 64 x 32 matrix in two row pieces on tp 2, dp 1: nothing to reduce, two pieces of 1024 to bring together."""
    shapes = {"layers": [{"matrices": [{"name": "a", "shape": [64, 32], "split": "rows"}]}]}
    plan = estimate_model(model_from_shapes("tiny", shapes, "test"), Layout(tp=2))
    cost = cost_of(64, 32)
    assert plan.stages[0].adamw_bytes == 0
    # The owner gets 1024 elements and sends as many back.
    assert sorted(estimate(plan, OURS).flops) == [0, cost]
    assert estimate(plan, OURS).sent_bytes == (1024 * 2, 1024 * 2)
    # Upstream's and Moonlight's ranks each gather the other's piece, in fp32 and bf16, and each do the work.
    for scheme, size in ((UPSTREAM, 4), (MOONLIGHT, 2)):
        assert estimate(plan, scheme).flops == (cost, cost)
        assert estimate(plan, scheme).sent_bytes == (1024 * size, 1024 * size)


@pytest.mark.parametrize(
    ("model", "sizes", "stage", "percent"),
    [
        ("moonlight-16b", dict(dp=64, pp=4, ep=8), 1, 238),
        ("moonlight-16b", dict(dp=256, pp=4, ep=8), 1, 1252),
        ("llama3-70b", dict(dp=64, tp=8, pp=16), 1, 603),
        ("llama3-8b", dict(dp=128, pp=4), 1, 762),
        ("deepseek-v3", dict(dp=128, pp=16, ep=64), 1, 1513),
    ],
)
def test_upstreams_padding(model: str, sizes: dict[str, int], stage: int, percent: int) -> None:
    """Dense padding of a middle stage, measured once with upstream's layout function on real parameters."""
    plan = estimate_model(load_model(model), Layout(**sizes))
    padding = estimate(plan, UPSTREAM, stage).padding[0]
    assert padding is not None
    assert 100 * padding == pytest.approx(percent, abs=0.6)
    # Ours pads buckets to a multiple of the ranks: nothing that one could see.
    assert (estimate(plan, OURS, stage).padding[0] or 0.0) < 1e-4


@pytest.mark.parametrize(
    ("model", "sizes", "layers", "bucketed", "expected", "tolerance"),
    [
        ("llama3-405b", dict(dp=128, tp=8, pp=16), slice(8), True, 64.6, 0.001),
        # Measured with another order of a layer's weights, which moves bucket boundaries.
        ("llama3-405b", dict(dp=16, tp=8, pp=16), slice(8), True, 9.95, 0.02),
        ("qwen3-8b", dict(dp=8, tp=8), slice(None), True, 8.3, 0.005),
        ("moonlight-16b", dict(dp=64, pp=4, ep=8), slice(7, 14), False, 3.4, 0.02),
    ],
)
def test_upstreams_slowest_rank(
    model: str, sizes: dict[str, int], layers: slice, bucketed: bool, expected: float, tolerance: float
) -> None:
    """Newton-Schulz of upstream's slowest rank over the ideal: the standard iteration on fused weights, dense alone."""
    layout = Layout(**sizes)
    settings = PlanSettings(muon=MuonConfig(qkv_split="none", split_gated=False))
    bucket_size = default_bucket_size(layout.dp) if bucketed else None
    dense, *_ = matrix_groups(load_model(model).layers[layers], layout, settings, bucket_size)
    assert dense.flops == tuple(newton_schulz_flops(*s.logical_shape(0)[1:], 5, "standard") for s in dense.specs)
    load = layer_wise(dense)
    assert max(load.flops) / (sum(dense.flops) / len(load.flops)) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("llama3-405b", dict(dp=16, tp=8, pp=16)),
        ("moonlight-16b", dict(dp=256, pp=4, ep=8)),
    ],
)
def test_teams_even_out_large_grids(model: str, sizes: dict[str, int]) -> None:
    """Few matrices for many ranks: shared by the ranks of nodes, so that the slowest does little more than its part."""
    plan = estimate_model(load_model(model), Layout(**sizes))
    alone = estimate_model(load_model(model), Layout(**sizes), PlanSettings(muon=MuonConfig(max_team_size=1)))
    assert max(estimate(plan, OURS).team_bytes) > 0 == max(estimate(alone, OURS).team_bytes)
    together, apart = ([stage.imbalance(OURS) or math.inf for stage in p.stages] for p in (plan, alone))
    # Of the slowest stage: where experts can level out whole dense matrices, teams gain nothing.
    assert max(together) <= 1.25 and max(together) < max(apart)


def test_the_kind_with_the_larger_matrices_is_planned_first() -> None:
    """Moonlight's dense matrices are larger than its experts', which then go where the dense plan left room."""
    layout, settings = Layout(dp=64, pp=4, ep=8), PlanSettings(muon=MuonConfig(max_team_size=1))
    model = load_model("moonlight-16b")
    groups = matrix_groups(model.layers[:7], layout, settings)
    (dense,), experts = stage_plans(groups)
    assert dense == groups[0].plan()
    grid = groups[1].grid
    assert len(experts) == 8 and len({plan.fingerprint for plan in experts}) > 1
    for ep_rank, plan in enumerate(experts):
        initial = [float(dense.loads[grid.places(ep_rank)[rank]]) for rank in range(grid.size)]
        assert plan == groups[1].plan(ep_rank, initial)
        assert [plan.loads[r] - initial[r] for r in range(grid.size)] == list(plan.rank_flops)
    # Mixtral's experts are larger than its attention's matrices.
    small, large = groups[1].specs, groups[0].specs
    first, second = stage_plans([replace(groups[0], specs=small), replace(groups[1], specs=large)])
    assert len({plan.fingerprint for plan in second}) == 1 and len(first) == 1


@pytest.mark.parametrize(
    ("model", "sizes"), [("moonlight-16b", dict(dp=256, pp=4, ep=8)), ("deepseek-v3", dict(dp=16, pp=16, ep=16))]
)
def test_balanced_by_flops_alone(model: str, sizes: dict[str, int]) -> None:
    """At least four matrices a rank: level within 5 %, at the price of messages, which the default counts."""
    by_flops = PlanSettings(muon=MuonConfig(balance="flops"))
    level, fast = (estimate_model(load_model(model), Layout(**sizes), s) for s in (by_flops, PlanSettings()))
    for stage in level.stages:
        assert stage.num_logical_matrices >= 4 * sizes["dp"]
        imbalance = stage.imbalance(OURS)
        assert imbalance is not None and imbalance <= 1.05
    assert max(stage.imbalance(OURS) or math.inf for stage in fast.stages) > 1.05
    assert max(estimate(level, OURS).team_bytes) > max(estimate(fast, OURS).team_bytes)


@pytest.mark.parametrize("layers, best", [(slice(0, 7), 8), (slice(7, 14), 1)])
def test_the_first_kinds_teams_are_as_large_as_levels_the_sum(layers: slice, best: int) -> None:
    """Moonlight on 256 ranks a stage: with no limit the dense matrices' teams leave experts nothing uneven to fill."""
    settings = PlanSettings(cost=CostModel(latency_s=20e-6, node_latency_s=20e-6, launch_s=0))
    groups = matrix_groups(load_model("moonlight-16b").layers[layers], Layout(dp=256, pp=4, ep=8), settings)
    busiest = {}
    for limit in (settings.muon.max_team_size, 8, 1):
        first = groups[0].plan(max_team_size=limit)
        initial = [[float(first.loads[groups[1].grid.places(e)[r]]) for r in range(32)] for e in range(8)]
        experts = [groups[1].plan(e, initial[e]) for e in range(8)]
        busiest[limit] = max(max(plan.loads) for plan in experts)
    assert min(busiest, key=lambda limit: busiest[limit]) == best
    _, chosen = stage_plans(groups)
    assert max(max(plan.loads) for plan in chosen) == busiest[best] < 0.9 * busiest[settings.muon.max_team_size]


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("kimi-k2", dict(dp=64, pp=16, ep=16)),
        ("moonlight-16b", dict(dp=16, tp=2, ep=8, etp=1)),
        ("llama3-70b", dict(dp=8, tp=8, pp=16)),
    ],
)
def test_what_holds_for_every_layout(model: str, sizes: dict[str, int]) -> None:
    layout = Layout(**sizes)
    plan = estimate_model(load_model(model), layout)
    assert sorted(i for s in plan.stages for i in s.stages) == list(range(layout.pp))
    dense_grid, expert_grid = grids(layout)
    for stage in plan.stages:
        ours = stage.schemes[OURS]
        assert ours is not None
        dense, experts = stage.param_numel
        bound = 4 * (dense / dense_grid.dp + experts / expert_grid.dp)
        padding = ours.buffer_bytes - 6 * (dense + experts)
        assert mean(ours.sent_bytes) <= bound + padding
        # Bucket ends are all that pads: to a multiple of the ranks and of 128.
        assert padding <= 6 * (len(plan.model.layers) * 20) * math.lcm(128, layout.dp)
        assert len(ours.flops) == layout.stage_ranks
        for name in SCHEMES:
            found = stage.schemes[name]
            assert found is not None
            # Of one of three products a team that divides it computes half: at squares, 5/6 of the FLOPs are left.
            least = 5 / 6 if name == OURS else 1.0
            assert mean(found.flops) >= stage.ideal_flops * (least - 1e-9)
            assert sum(found.momentum_bytes) == 4 * (
                dense * layout.stage_ranks // dense_grid.dp + experts * layout.stage_ranks // expert_grid.dp
            )


def test_optimizer_instances() -> None:
    """Two instances over dp 16 are two times dp 8, which upstream's optimizer refuses."""
    model, sizes = load_model("moonlight-16b"), dict(pp=4, ep=8)
    two, one = estimate_model(model, Layout(dp=16, instances=2, **sizes)), estimate_model(model, Layout(dp=8, **sizes))
    for scheme in (OURS, MOONLIGHT):
        assert estimate(two, scheme, 1) == estimate(one, scheme, 1)
    assert two.stages[1].schemes[UPSTREAM] is None
    assert any("instances" in note for note in two.notes)


def test_links() -> None:
    # Ranks 0..15, two nodes. Rank 1 receives most within a node, 3 + 4, and rank 8 most from the other node, 5 + 6.
    sources, destinations, numels = map(np.array, zip((0, 0, 9), (0, 1, 3), (2, 1, 4), (0, 8, 5), (3, 8, 6)))
    collective = all_to_all(Transfers(sources, destinations, numels), 2, np.arange(16))
    assert (collective.nvlink_bytes, collective.network_bytes) == (2 * 7, 2 * 11)
    # The other way round ranks 1 and 8 send as much.
    assert all_to_all(Transfers(destinations, sources, numels), 2, np.arange(16)) == collective
    nothing = np.zeros(0, dtype=np.int64)
    assert all_to_all(Transfers(nothing, nothing, nothing), 2, np.arange(16)) == type(collective)(0.0, 0.0)
    # Eight rings leave a node through eight adapters; a group with one rank per node has one.
    assert ring(800.0, 16, 1).network_bytes == 100.0
    assert ring(800.0, 16, 8) == type(collective)(0.0, 800.0)
    assert ring(800.0, 4, 2) == type(collective)(800.0, 0.0)
    assert ring(800.0, 1, 2).issued == all_to_all(Transfers(nothing, nothing, nothing), 2, np.arange(16)).issued == 0


def test_a_stage_without_matrices() -> None:
    shapes = {"layers": [{"matrices": [{"name": "mlp.router", "shape": [4, 8], "router": True}]}]}
    model: Model = model_from_shapes("routers", shapes, "test")
    with pytest.raises(ValueError, match="no matrix for Muon"):
        estimate_model(model, Layout(), PlanSettings(muon=MuonConfig(router="adam")))
