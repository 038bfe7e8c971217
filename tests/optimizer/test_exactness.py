"""Distributed Muon equals `reference.py` on the whole model, whatever the layout."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.config import MuonConfig
from megatron_muon.optimizer.element_states import elementwise
from megatron_muon.rule.reference_adaptive import ReferenceVariants
from tests.distributed import run_ranks
from tests.logical import is_muons, logical_matrices
from tests.models import (
    Layout,
    Place,
    initial_value,
    initialize,
    make_chunks,
    make_config,
    normal,
    optimizer_config,
    wrap,
)
from tests.models import places as places_of

STEPS, LR, WEIGHT_DECAY = 3, 0.02, 0.1
EXACT = MuonConfig(exchange_dtype="fp32", ns_dtype="fp32", batched=False)
OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True)


def whole_second_moment(oracle: ReferenceVariants, place: Place) -> Tensor:
    """The oracle's running mean squares of a parameter, one for each element."""
    out = torch.empty(place.shape)
    for number, where in enumerate(oracle.places(place.name)):
        out[where] = oracle.second_moments[place.name, number].expand(out[where].shape)
    return out


def gradient(place: Place, step: int) -> Tensor:
    """The whole gradient of a step. Expert 3's is zero at step 1: it saw no token."""
    if step == 1 and re.search(r"local_experts\.3\.|experts.*weight3$", place.name):
        return torch.zeros(place.shape)
    return normal(f"gradient {step} {place.name}", place.shape)


@dataclass
class Counters:
    """What really happened, counted around torch's and the product's functions rather than by the product."""

    all_to_alls: dict[tuple[int, ...], int] = field(default_factory=dict)
    bytes_sent: dict[tuple[int, ...], int] = field(default_factory=dict)
    orthogonalized: int = 0


def count_calls() -> Counters:
    """Wraps all_to_all_single and orthogonalize in this process."""
    import megatron_muon.rule.muon as muon_module

    counters = Counters()
    all_to_all, orthogonalize = dist.all_to_all_single, muon_module.orthogonalize

    def counting_all_to_all(
        output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], group: Any, async_op: bool
    ) -> Any:
        ranks = tuple(dist.get_process_group_ranks(group))
        counters.all_to_alls[ranks] = counters.all_to_alls.get(ranks, 0) + 1
        foreign = sum(input_splits) - input_splits[dist.get_rank(group)]
        counters.bytes_sent[ranks] = counters.bytes_sent.get(ranks, 0) + foreign * input.element_size()
        return all_to_all(output, input, output_splits, input_splits, group=group, async_op=async_op)

    def counting_orthogonalize(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        counters.orthogonalized += x[..., 0, 0].numel()
        return orthogonalize(x, *args, **kwargs)

    dist.all_to_all_single = counting_all_to_all
    muon_module.orthogonalize = counting_orthogonalize
    return counters


def check_layout(
    rank: int, world_size: int, model: str, layout: Layout, muon: MuonConfig, bf16: bool
) -> dict[str, Any]:
    """Runs three steps with known gradients; compares every parameter and momentum of this rank with the oracle."""
    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer
    from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer

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
    whole = {p.name: initial_value(p.key, p.shape).to(dtype).float() for p in everything}
    logical = {p.name: m for p in everything if (m := logical_matrices(p, model_config, muon)) is not None}
    matrices = {p.name for p in everything if is_muons(p, muon)}
    oracle = ReferenceVariants({n: w for n, w in whole.items() if n in matrices}, logical, muon)
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
    counters = count_calls()
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

    worst: dict[str, float] = {"muon": 0.0, "momentum": 0.0, "second moment": 0.0, "adam": 0.0}

    def compare(kind: str, got: Tensor, expected: Tensor) -> None:
        scale = expected.abs().max().clamp_min(1e-30)
        difference = ((got - expected).abs().max() / scale).nan_to_num(nan=float("inf"))
        worst[kind] = max(worst[kind], difference.item())

    for place in everything:
        expected = oracle.parameters[place.name] if place.name in matrices else others[place.name].detach()
        kind = "muon" if place.name in matrices else "adam"
        compare(kind, place.parameter.detach().float(), place.shard(expected).to(dtype).float())
    counters.orthogonalized //= STEPS
    place_of = {place.parameter: place for place in everything}
    momentum_bytes = 0
    held = 0
    exchanges: list[dict[str, Any]] = []
    for part in optimizer.chained_optimizers:
        if not isinstance(part, MuonDistributedOptimizer):
            continue
        for parameter, main in part._main_slices().items():
            place = place_of[parameter]
            span = part._get_model_param_range_map(parameter)["param"]
            state = part.optimizer.state[main]
            assert set(state) == {"momentum_buffer"} | ({"second_moment"} if muon.variant != "muon" else set())
            momentum_bytes += state["momentum_buffer"].nbytes
            held += span.size
            expected = place.shard(oracle.momenta[place.name]).reshape(-1)[span.start : span.end]
            compare("momentum", state["momentum_buffer"].float(), expected)
            if muon.variant != "muon":
                expected = place.shard(whole_second_moment(oracle, place)).reshape(-1)[span.start : span.end]
                elements = part.optimizer.elements_of(main)
                got = elementwise(state["second_moment"], "second_moment", elements, muon)
                compare("second moment", got, expected)
            compare("muon", main, place.shard(oracle.parameters[place.name]).reshape(-1)[span.start : span.end])
        exchange = part.optimizer.exchange
        exchanges.append(
            dict(
                group=tuple(dist.get_process_group_ranks(part.grid.group)),
                stats=exchange.stats,
                planned_bytes=exchange.plan.sent_numel()[exchange.rank] * exchange.dtype.itemsize * STEPS,
                collectives=exchange.wire.num_collectives,
                matrices=sum(
                    m.spec.logical_shape(part)[0] for m in exchange.plan.matrices for part in range(len(m.spec.parts))
                ),
            )
        )
    return dict(worst=worst, momentum_bytes=momentum_bytes, held=held, exchanges=exchanges, counters=counters)


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
    "hybrid vpp tp2": ("hybrid dense", Layout(4, tp=2, pp=2, vpp=2)),
    "hybrid ep2 edp2": ("hybrid moe", Layout(4, ep=2)),
}
# Parts of "dp3" and "vpp dp2 overlap", which run in `make test`.
NARROWER = ("dp2", "vpp", "vpp dp2")


def check_counts(results: list[dict[str, Any]], layout: Layout) -> None:
    """No redundancy: every logical matrix once, the plan's all-to-alls and bytes, momentum and no more."""
    matrices: dict[tuple[int, ...], int] = {}
    for result in results:
        counters = result["counters"]
        all_to_alls: dict[tuple[int, ...], int] = {}
        planned: dict[tuple[int, ...], int] = {}
        for kind, exchange in enumerate(result["exchanges"]):
            group = exchange["group"]
            matrices[kind, *group] = exchange["matrices"]
            if len(group) == 1:
                assert exchange["stats"].collectives == exchange["stats"].bytes_sent == 0
                continue
            all_to_alls[group] = all_to_alls.get(group, 0) + exchange["collectives"] * STEPS
            planned[group] = planned.get(group, 0) + exchange["planned_bytes"]
        # MoE dispatchers are not at work here, so that all all-to-alls are the exchange's.
        assert counters.all_to_alls == {g: n for g, n in all_to_alls.items() if n}
        assert counters.bytes_sent == {g: planned[g] for g in counters.bytes_sent}
        assert result["momentum_bytes"] == 4 * result["held"]
    assert sum(r["counters"].orthogonalized for r in results) == sum(matrices.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in NARROWER else name for name in LAYOUTS]
)
def test_equals_reference_bitwise(name: str) -> None:
    model, layout = LAYOUTS[name]
    results = run_ranks(check_layout, layout.world_size, model, layout, EXACT, False)
    for rank, result in enumerate(results):
        assert result["worst"]["muon"] == 0.0, (rank, result)
        assert result["worst"]["momentum"] == 0.0, (rank, result)
        # torch.optim.AdamW on slices and on whole tensors: the same operations in other vector lanes.
        assert result["worst"]["adam"] <= 1e-6, (rank, result)
    check_counts(results, layout)


@pytest.mark.parametrize("name", ["dp3", "tp2 dp2", "tp2 dp2 mla", "ep2 edp2"])
def test_batched_equals_reference(name: str) -> None:
    """Stacked matrices go through other matrix-product kernels than single ones, which sum in another order."""
    model, layout = LAYOUTS[name]
    results = run_ranks(check_layout, layout.world_size, model, layout, replace(EXACT, batched=True), False)
    for result in results:
        # 1e-6 of the largest weight: updates are about lr of the weights, and agree to about 5e-6 of an update.
        assert result["worst"]["muon"] <= 1e-6, result
        assert result["worst"]["momentum"] == 0.0, result
    check_counts(results, layout)


@pytest.mark.parametrize("name", ["one rank", "dp3", "tp2 dp2", "ep2 etp2", "vpp dp2 overlap"])
def test_bf16_on_the_wire_and_in_the_model_does_not_depend_on_the_layout(name: str) -> None:
    """Rounding to bf16 is element-wise and the same everywhere, also on one rank: still bitwise the reference."""
    model, layout = LAYOUTS[name]
    muon = replace(EXACT, exchange_dtype="bf16")
    results = run_ranks(check_layout, layout.world_size, model, layout, muon, True)
    for result in results:
        assert result["worst"]["muon"] == 0.0, result
        assert result["worst"]["momentum"] == 0.0, result
        assert result["worst"]["adam"] <= 2**-8, result  # one bf16 rounding apart at most
    check_counts(results, layout)


def test_moonlight_defaults_in_bf16() -> None:
    """The settings users get: everything in bf16. Newton-Schulz rounds to 2^-8 at each product, in other orders."""
    model, layout = LAYOUTS["tp2 dp2"]
    for result in run_ranks(check_layout, layout.world_size, model, layout, MuonConfig(), True):
        # Update entries are about 0.2*lr = 4e-3 of weights of size 0.3; bf16 iterations agree to a few per cent of it.
        assert result["worst"]["muon"] <= 2**-8, result


@pytest.mark.parametrize("settings", [dict(nesterov=False), dict(scale_mode="spectral"), dict(tp_mode="exact")])
def test_settings_reach_the_update(settings: dict[str, Any]) -> None:
    model, layout = LAYOUTS["tp2 dp2"]
    for result in run_ranks(check_layout, layout.world_size, model, layout, replace(EXACT, **settings), False):
        assert result["worst"]["muon"] == 0.0, result


VARIANTS: dict[str, dict[str, Any]] = {
    "normuon": dict(variant="normuon"),
    "adamuon": dict(variant="adamuon", nesterov=False),
    "cautious ema": dict(momentum_form="ema", cautious_weight_decay=True),
    "bf16 momentum": dict(momentum_dtype="bf16"),
    "all": dict(variant="normuon", momentum_dtype="bf16", cautious_weight_decay=True, exchange_buffer_mb=1),
}


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("normuon", "tp2 dp2"),
        ("normuon", "ep2 etp2"),
        ("adamuon", "dp2"),
        ("adamuon", "tp2 dp2 mla"),
        ("cautious ema", "tp2"),
        ("bf16 momentum", "tp2 dp2"),
        ("bf16 momentum", "ep2 etp2"),
        ("bf16 momentum", "vpp dp2"),
        ("all", "dp3"),
        *(pytest.param(v, n, marks=pytest.mark.exhaustive) for v in VARIANTS for n in LAYOUTS),
    ],
)
def test_variants_equal_reference_bitwise(variant: str, name: str) -> None:
    model, layout = LAYOUTS[name]
    for rank, result in enumerate(
        run_ranks(check_layout, layout.world_size, model, layout, replace(EXACT, **VARIANTS[variant]), False)
    ):
        assert {k: v for k, v in result["worst"].items() if k != "adam"} == {
            "muon": 0.0,
            "momentum": 0.0,
            "second moment": 0.0,
        }, (rank, result)
        assert result["momentum_bytes"] == (2 if "momentum_dtype" in VARIANTS[variant] else 4) * result["held"]
