"""Whole runs: real forward and backward passes, Megatron's schedules, Muon and AdamW chained."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_muon.config import MuonConfig
from tests.distributed import run_ranks
from tests.models import Layout, initialize, make_chunks, optimizer_config, places, train_step, wrap

STEPS = 5
MUON = MuonConfig(exchange_dtype="fp32", ns_dtype="fp32")
OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True)


def build(model: str, layout: Layout, dtype: torch.dtype, muon: MuonConfig, **settings: Any) -> tuple[list[Any], Any]:
    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer

    initialize(layout)
    chunks = make_chunks(model, layout, dtype)
    tag_parameters(chunks, muon)
    wrapped = wrap(chunks, layout)
    return wrapped, get_megatron_optimizer(optimizer_config(layout, dtype, **settings), wrapped, muon=muon)


def digest(chunks: list[Any], layout: Layout, expert: bool) -> str:
    """A hash of this rank's parameters, dense or expert."""
    content = hashlib.sha256()
    for chunk in chunks:
        for place in places(chunk, layout):
            if (not getattr(place.parameter, "allreduce", True)) == expert:
                content.update(place.parameter.detach().float().numpy().tobytes())
    return content.hexdigest()


def run(
    rank: int, world_size: int, model: str, layout: Layout, dtype: torch.dtype, muon: MuonConfig
) -> tuple[list[float], bool]:
    """Losses of some steps, and whether the ranks of each data-parallel group agreed after every one of them."""
    from megatron.core import parallel_state as ps

    chunks, optimizer = build(model, layout, dtype, muon, lr=0.01)
    losses, agreed = [], True
    for step in range(STEPS):
        losses.append(train_step(chunks, optimizer, step))
        for chunk in chunks:
            if layout.ddp.get("overlap_param_gather"):
                chunk.start_param_sync(force_sync=True)
        for expert, group in (
            (False, ps.get_data_parallel_group(with_context_parallel=True)),
            (True, ps.get_expert_data_parallel_group()),
        ):
            digests: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(digests, digest(chunks, layout, expert), group=group)
            agreed = agreed and len(set(digests)) == 1
    return losses, agreed


RUNS: dict[str, tuple[str, Layout]] = {
    "dp4": ("dense", Layout(4)),
    "tp2 dp2": ("dense", Layout(4, tp=2, sequence_parallel=True)),
    "pp2 dp2": ("dense", Layout(4, pp=2)),
    "tp2 pp2": ("dense", Layout(4, tp=2, pp=2)),
    "ep2 dp2": ("moe", Layout(4, ep=2)),
    "dp2 overlap": ("dense", Layout(2, ddp=dict(**OVERLAP, bucket_size=2000))),
    "vpp": ("dense", Layout(2, pp=2, vpp=2)),
    "vpp overlap": ("dense", Layout(2, pp=2, vpp=2, ddp=OVERLAP)),
    "tp2 ep2 mla": ("mla", Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True)),
    "instances": ("moe", Layout(4, ep=2, instances=2)),
    # HybridModel trains as the GPTModel of the same layers.
    "hybrid one rank": ("hybrid dense", Layout(1)),
    "hybrid tp2 dp2": ("hybrid dense", Layout(4, tp=2, sequence_parallel=True, ddp=OVERLAP)),
    "hybrid pp2": ("hybrid moe", Layout(2, pp=2)),
    "hybrid ep2 dp2": ("hybrid moe", Layout(4, ep=2)),
    "hybrid tp2 ep2 mla": ("hybrid mla", Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True)),
}


@pytest.fixture(scope="module")
def single_rank_losses() -> dict[tuple[str, int], list[float]]:
    """Losses of the same models on one rank, by model and number of layers."""
    out = {}
    for model, layers in (("dense", 2), ("dense", 4), ("moe", 2), ("mla", 2)):
        layout = Layout(1, config=dict(num_layers=layers))
        out[model, layers] = run_ranks(run, 1, model, layout, torch.float32, MUON)[0][0]
    return out


# "vpp" is a part of "vpp overlap".
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name == "vpp" else name for name in RUNS]
)
def test_losses_do_not_depend_on_the_layout(name: str, single_rank_losses: dict[tuple[str, int], list[float]]) -> None:
    model, layout = RUNS[name]
    if model == "hybrid mla" and not hasattr(Symbols, "MLA"):
        pytest.skip("megatron-core 0.18 has no layers of latent attention in its HybridModel")
    expected = single_rank_losses[model.removeprefix("hybrid "), max(2, layout.pp * (layout.vpp or 1))]
    # Five steps must do something: the first and the last see the same batch.
    assert expected[-1] < expected[0] - 0.1
    for losses, agreed in run_ranks(run, layout.world_size, model, layout, torch.float32, MUON):
        assert losses == (expected if layout.world_size == 1 else pytest.approx(expected, abs=1e-4))
        assert agreed


def test_bf16_training_agrees_over_ranks_and_follows_fp32(
    single_rank_losses: dict[tuple[str, int], list[float]],
) -> None:
    results = run_ranks(run, 4, "mla", RUNS["tp2 ep2 mla"][1], torch.bfloat16, MuonConfig())
    for losses, agreed in results:
        # bf16 weights and activations, relative precision 2^-8, on losses of about 4.
        assert losses == pytest.approx(single_rank_losses["mla", 2], abs=0.05)
        assert agreed


def clipped(rank: int, world_size: int, layout: Layout, clip: float) -> tuple[float, float, float]:
    """The reported gradient norm, the norm of the momentum after one step, and the reported norm of `get_grad_norm`."""
    chunks, optimizer = build("moe", layout, torch.float32, MUON, clip_grad=clip)
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for place in places(chunk, layout):
            place.parameter.main_grad.fill_(0.25)
    _, norm, _ = optimizer.step()
    squares = torch.zeros(1, dtype=torch.float64)
    for part in optimizer.chained_optimizers:
        for parameter, state in part.optimizer.state.items():
            if "momentum_buffer" in state:
                assert torch.equal(state["momentum_buffer"], parameter.grad)
                squares += state["momentum_buffer"].double().square().sum()
    return norm, squares.sqrt().item(), optimizer.get_grad_norm()


def test_clipping_is_by_the_norm_of_everything() -> None:
    """A constant gradient of 0.25 has the norm 0.25*sqrt(parameters); clipping to 1 makes it 1 for Muon's too."""
    layout = Layout(2, ep=2)
    (norm, momentum, after), (other_norm, other_momentum, _) = run_ranks(clipped, 2, layout, 1.0)
    numel = run_ranks(count_parameters, 1)[0]
    assert norm == other_norm == pytest.approx(0.25 * math.sqrt(sum(numel)), rel=1e-6)
    assert after == pytest.approx(1.0, rel=1e-4)
    # The two ranks share the matrices; Megatron's clip coefficient is max_norm/(norm + 1e-6).
    assert math.hypot(momentum, other_momentum) == pytest.approx(math.sqrt(numel[0] / sum(numel)), rel=1e-4)


def count_parameters(rank: int, world_size: int) -> tuple[int, int]:
    """Elements of Muon's and of AdamW's parameters in the MoE model."""
    from megatron_muon.megatron.model.routing import named_parameters, uses_muon

    layout = Layout(1)
    initialize(layout)
    sizes = [0, 0]
    for entry in named_parameters(make_chunks("moe", layout, torch.float32)):
        sizes[0 if uses_muon(entry, MUON) else 1] += entry.parameter.numel()
    return sizes[0], sizes[1]


def overflow(rank: int, world_size: int, layout: Layout) -> list[Any]:
    """Steps with and without an infinite gradient, which one expert on one rank sees, in fp16 with a dynamic scale."""
    chunks, optimizer = build(
        "moe", layout, torch.float16, MUON, initial_loss_scale=2.0**10, hysteresis=1, loss_scale_window=2
    )
    out = []
    for bad in (False, True, False, False):
        for chunk in chunks:
            chunk.zero_grad_buffer()
            for place in places(chunk, layout):
                place.parameter.main_grad.fill_(0.5)
                if bad and "local_experts.3.linear_fc2" in place.name:
                    place.parameter.main_grad[0, 0] = math.inf
        before = digest(chunks, layout, False) + digest(chunks, layout, True)
        momenta = [s["momentum_buffer"].clone() for s in muon_states(optimizer)]
        scale = optimizer.get_loss_scale().item()
        successful, _, _ = optimizer.step()
        changed = before != digest(chunks, layout, False) + digest(chunks, layout, True)
        kept = bool(momenta) and all(
            torch.equal(a, s["momentum_buffer"]) for a, s in zip(momenta, muon_states(optimizer), strict=True)
        )
        out.append((successful, changed, kept, scale))
    return out


def muon_states(optimizer: Any) -> list[dict[str, Any]]:
    return [s for part in optimizer.chained_optimizers for s in part.optimizer.state.values() if "momentum_buffer" in s]


def test_a_step_with_an_infinite_gradient_is_skipped_on_every_rank_and_nothing_changes() -> None:
    for steps in run_ranks(overflow, 2, Layout(2, ep=2)):
        assert [s[0] for s in steps] == [True, False, True, True]
        assert [s[1] for s in steps] == [True, False, True, True]
        assert steps[1][2], "momentum changed in a skipped step"
        # One scaler for the whole chain: halved once, and doubled again only after two good steps.
        assert [s[3] for s in steps] == [1024.0, 1024.0, 512.0, 512.0]


def scheduled(rank: int, world_size: int) -> list[dict[str, float]]:
    """Learning rates and weight decays of the groups that hold parameters, under Megatron's scheduler."""
    from megatron.core.optimizer import ParamKey, get_standard_config_overrides
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer

    layout = Layout(1)
    initialize(layout)
    chunks = make_chunks("dense", layout, torch.float32)
    tag_parameters(chunks, MUON)
    wrapped = wrap(chunks, layout)
    config = optimizer_config(layout, torch.float32, lr=0.01, min_lr=0.001, clip_grad=0.0)
    overrides = get_standard_config_overrides(config)
    overrides[ParamKey(name="*linear_proj.weight")] = {"max_lr": 0.03, "min_lr": 0.003, "wd_mult": 0.5}
    optimizer = get_megatron_optimizer(config, wrapped, config_overrides=overrides, muon=MUON)
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=0.01, min_lr=0.001, lr_warmup_steps=2, lr_decay_steps=10,
        lr_decay_style="linear",
        start_wd=0.1, end_wd=0.1, wd_incr_steps=10, wd_incr_style="constant",
    )  # fmt: skip
    scheduler.step(1)
    before = {p.name: p.parameter.detach().clone() for p in places(wrapped[0], layout)}
    for place in places(wrapped[0], layout):
        place.parameter.main_grad.zero_()
    optimizer.step()
    # Zero gradients leave weight decay alone: w becomes w*(1 - lr*wd).
    decay = {p.name: 1 - (p.parameter.detach() / before[p.name]).median().item() for p in places(wrapped[0], layout)}
    return [
        dict(
            proj=decay["decoder.layers.0.self_attention.linear_proj.weight"],
            fc1=decay["decoder.layers.0.mlp.linear_fc1.weight"],
            embedding=decay["embedding.word_embeddings.weight"],
            norm=decay["decoder.final_layernorm.weight"],
        )
    ]


def test_learning_rate_and_weight_decay_multipliers_reach_muons_groups() -> None:
    # After one of two warm-up steps lr is half of each group's maximum.
    (decay,) = run_ranks(scheduled, 1)[0]
    assert decay["fc1"] == pytest.approx(0.005 * 0.1, rel=1e-3)
    assert decay["proj"] == pytest.approx(0.015 * 0.05, rel=1e-3)
    assert decay["embedding"] == pytest.approx(0.005 * 0.1, rel=1e-3)
    assert decay["norm"] == 0.0
