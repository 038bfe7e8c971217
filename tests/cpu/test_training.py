"""Stock models, DDP and optimizers train on the CPU backend, and every layout trains as one rank does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import models
from tests.checkpoint_runs import child_processes
from tests.distributed import RankError, run_ranks
from tests.models import Layout

STEPS = 3
# Losses and gradient norms are of order 1 to 5 and computed in fp32, whose spacing is 1.2e-7 relative. A layout changes
# the order of sums only; three spacings of accumulated difference were the largest seen. A gradient that misses one
# rank's part, or is counted twice, moves the norm by 1e-3 or more.
RELATIVE = 1e-6

OVERLAP: dict[str, Any] = dict(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=2000)
FOUR: dict[str, Any] = dict(num_layers=4)
ALL_GATHER: dict[str, Any] = dict(moe_token_dispatcher_type="allgather")
QK_NORM: dict[str, Any] = dict(q_lora_rank=16, qk_layernorm=True)
NO_EXPERTS: dict[str, Any] = dict(
    num_moe_experts=None,
    moe_ffn_hidden_size=None,
    moe_shared_expert_intermediate_size=None,
    moe_router_load_balancing_type="aux_loss",
    moe_aux_loss_coeff=0.0,
    moe_router_score_function="softmax",
    moe_router_enable_expert_bias=False,
    moe_layer_freq=1,
)

LAYOUTS = {
    "dp2-overlap": ("dense", Layout(2, ddp=OVERLAP)),
    "tp2": ("dense", Layout(2, tp=2)),
    "tp2-sp": ("dense", Layout(2, tp=2, sequence_parallel=True)),
    "pp2": ("moe", Layout(2, pp=2)),
    "vpp2": ("moe", Layout(2, pp=2, vpp=2, config=FOUR)),
    "ep2": ("moe", Layout(2, ep=2)),
    "ep2-allgather": ("moe", Layout(2, ep=2, config=ALL_GATHER)),
    "tp2-sp-etp2": ("moe", Layout(2, tp=2, etp=2, sequence_parallel=True)),
    "mla-tp2-sp-ep2": ("mla", Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True)),
    "mla-tp2-sp-ep2-allgather": ("mla", Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True, config=ALL_GATHER)),
    "mla-tp2-sp-norms": ("mla", Layout(2, tp=2, etp=1, sequence_parallel=True, config=QK_NORM)),
    "mla-tp2-norms": ("mla", Layout(2, tp=2, config={**NO_EXPERTS, **QK_NORM})),
    "instances2": ("dense", Layout(4, instances=2)),
    "instances2-overlap": ("moe", Layout(4, instances=2, ddp=dict(overlap_grad_reduce=True, bucket_size=2000))),
    "mla-tp2-sp-ep2-dp2-overlap": ("mla", Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True, ddp=OVERLAP)),
    "vpp2-dp2-overlap": ("dense", Layout(4, pp=2, vpp=2, config=FOUR, ddp={**OVERLAP, "align_param_gather": True})),
}

# Parts of wider layouts above, which run in `make test`.
NARROWER = ("dp2-overlap", "tp2-sp", "vpp2", "ep2", "mla-tp2-sp-ep2", "mla-tp2-sp-ep2-allgather", "instances2")

Result = tuple[list[float], list[float]]


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
    """A wrapped model and its stock optimizer, which reports gradient norms and clips nothing."""
    from megatron.core.optimizer import get_megatron_optimizer

    models.initialize(layout)
    chunks = models.wrap(models.make_chunks(model, layout, dtype), layout)
    return chunks, Recorded(get_megatron_optimizer(models.optimizer_config(layout, dtype, clip_grad=1e6), chunks))


def train(rank: int, world_size: int, model: str, layout: Layout, dtype: torch.dtype = torch.float32) -> Result:
    """Losses and gradient norms of `STEPS` steps on one batch."""
    chunks, optimizer = start(model, layout, dtype)
    losses = [models.train_step(chunks, optimizer, 0) for _ in range(STEPS)]
    return losses, optimizer.grad_norms


@cache
def one_rank(model: str, settings: tuple[tuple[str, Any], ...]) -> Result:
    result: Result = run_ranks(train, 1, model, Layout(1, config=dict(settings)))[0]
    return result


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in NARROWER else name for name in LAYOUTS]
)
def test_a_layout_trains_as_one_rank(name: str) -> None:
    model, layout = LAYOUTS[name]
    # The dispatcher belongs to the layout; the rest is the model.
    settings = tuple((key, value) for key, value in layout.config.items() if key != "moe_token_dispatcher_type")
    losses, norms = one_rank(model, settings)
    assert losses[0] > losses[1] > losses[2]
    for rank_losses, rank_norms in run_ranks(train, layout.world_size, model, layout):
        assert rank_losses == pytest.approx(losses, rel=RELATIVE)
        assert rank_norms == pytest.approx(norms, rel=RELATIVE)


def train_bf16(rank: int, world_size: int) -> tuple[list[float], bool]:
    layout = Layout(world_size, tp=2, ep=2, etp=1, sequence_parallel=True, ddp=OVERLAP)
    chunks, optimizer = start("mla", layout, torch.bfloat16)
    losses = [models.train_step(chunks, optimizer, 0) for _ in range(STEPS)]
    (inner, *_) = optimizer.chained_optimizers
    main = [shard for group in inner.shard_fp32_from_float16_groups for shard in group]
    return losses, all(shard.dtype is torch.float32 for shard in main) and len(main) > 0


def test_bf16_trains_with_fp32_main_parameters() -> None:
    expected, _ = one_rank("mla", ())
    for losses, has_main_parameters in run_ranks(train_bf16, 2):
        assert has_main_parameters
        # A loss near 4.7 averages 64 tokens' losses, each from bf16 activations (spacing 2^-8): 1 % is generous, and
        # half of what a step changes.
        assert losses == pytest.approx(expected, rel=1e-2)
        assert losses[0] > losses[1] > losses[2]


def recompute(rank: int, world_size: int) -> list[Result]:
    dropout = dict(attention_dropout=0.2, hidden_dropout=0.2)
    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    results = []
    for config in ({}, dropout, {**dropout, **full}):
        results.append(train(rank, world_size, "dense", Layout(2, tp=2, sequence_parallel=True, config=config)))
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return results


def test_recomputed_activations_draw_the_same_dropout() -> None:
    for without, plain, recomputed in run_ranks(recompute, 2):
        assert plain == recomputed  # bitwise: random states are restored and the arithmetic is the same
        assert plain != without


def save_and_resume(rank: int, world_size: int, directory: str, sharding: str) -> tuple[list[float], list[float]]:
    """Losses of steps 3 and 4 without a break, and from a checkpoint after step 2."""
    from megatron.core import dist_checkpointing, parallel_state

    layout = Layout(world_size, tp=2, ep=2, etp=1, sequence_parallel=True)

    def sharded_state(chunks: list[Any], optimizer: Recorded, loading: bool) -> dict[str, Any]:
        groups = dict(dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        metadata = {"distrib_optim_sharding_type": sharding, **groups}
        model = chunks[0].module.sharded_state_dict(metadata=metadata)
        state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": state}

    chunks, optimizer = start("mla", layout, torch.float32)
    for _ in range(2):
        models.train_step(chunks, optimizer, 0)
    with child_processes():
        dist_checkpointing.save(sharded_state(chunks, optimizer, False), directory)
    unbroken = [models.train_step(chunks, optimizer, 0) for _ in range(2)]
    parallel_state.destroy_model_parallel()

    chunks, optimizer = start("mla", layout, torch.float32)
    state = dist_checkpointing.load(sharded_state(chunks, optimizer, True), directory)
    chunks[0].module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return unbroken, [models.train_step(chunks, optimizer, 0) for _ in range(2)]


@pytest.mark.parametrize("sharding", ["dp_reshardable", "fully_reshardable"])
def test_a_torch_dist_checkpoint_resumes_bitwise(sharding: str, tmp_path: Path) -> None:
    for unbroken, resumed in run_ranks(save_and_resume, 2, str(tmp_path), sharding):
        assert unbroken == resumed


def context_parallel(rank: int, world_size: int, model: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and main gradients, averaged over context-parallel ranks as DDP does it."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    # Without experts: their auxiliary loss comes scaled from Megatron's schedule, which does not run here.
    layout = Layout(world_size, cp=world_size, config=NO_EXPERTS if model == "mla" else {})
    models.initialize(layout)
    (chunk,) = models.make_chunks(model, layout, torch.float32)
    tokens = torch.randint(0, models.VOCABULARY, (2, models.SEQUENCE + 1), generator=torch.Generator().manual_seed(5))
    batch = dict(tokens=tokens[:, :-1], labels=tokens[:, 1:], position_ids=torch.arange(models.SEQUENCE)[None])
    if world_size > 1:
        group = parallel_state.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    loss = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean()
    loss.backward()
    whole = loss.detach().clone()
    dist.all_reduce(whole, op=dist.ReduceOp.AVG)
    gradients = {}
    for name, parameter in chunk.named_parameters():
        assert parameter.grad is not None, name
        dist.all_reduce(parameter.grad, op=dist.ReduceOp.AVG)
        gradients[name] = parameter.grad
    return whole.item(), gradients


@pytest.mark.parametrize("model", ["dense", "mla"])
def test_context_parallel_ranks_get_the_gradients_of_one(model: str) -> None:
    [(loss, gradients)] = run_ranks(context_parallel, 1, model)
    for rank_loss, rank_gradients in run_ranks(context_parallel, 2, model):
        assert rank_loss == pytest.approx(loss, rel=RELATIVE)
        assert rank_gradients.keys() == gradients.keys()
        for name, expected in gradients.items():
            # Sums of up to 64 terms in another order, relative to the largest element: a few fp32 spacings.
            difference = (rank_gradients[name] - expected).abs().max()
            assert difference <= 3e-6 * expected.abs().max(), name


def test_a_virtual_pipeline_over_two_stages_needs_overlapped_p2p() -> None:
    with pytest.raises(RankError) as raised:
        run_ranks(train, 2, "dense", Layout(2, pp=2, vpp=2, config=dict(overlap_p2p_comm=False, batch_p2p_comm=True)))
    for error, message, _ in raised.value.errors.values():
        assert error == "ValueError"
        assert "overlap_p2p_comm: got False" in message
    assert len(raised.value.errors) == 2


def unsupported_exchange(rank: int, world_size: int) -> None:
    models.initialize(Layout(2, cp=2))
    models.make_chunks("dense", Layout(2, cp=2, config=dict(cp_comm_type="a2a")), torch.float32)


def test_an_unsupported_exchange_of_keys_is_refused() -> None:
    with pytest.raises(RankError) as raised:
        run_ranks(unsupported_exchange, 2)
    assert {error for error, _, _ in raised.value.errors.values()} == {"NotImplementedError"}
    assert "cp_comm_type: got 'a2a'" in str(raised.value)
