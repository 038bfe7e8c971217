"""What the builder of the optimizer makes beside the optimizers: groups, the line at start, refusals on every rank."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.megatron.log.start_line import RankLoad, start_lines
from tests.distributed import RankError, run_ranks
from tests.models import Layout, initialize, make_chunks, optimizer_config, wrap


def load(stage: int = 0, flops: int = 100, parameters: int = 0, **others: Any) -> RankLoad:
    values: dict[str, Any] = dict(matrices=0, numel=0, adam_parameters=0, rounds=3, buffer_bytes=12 << 20)
    return RankLoad(stage=stage, flops=flops, parameters=parameters, **{**values, **others})


def test_one_line_for_a_run_without_pipeline_stages() -> None:
    ranks = [load(parameters=12, matrices=21, numel=900_000, adam_parameters=9, flops=102), load(flops=98)]
    assert start_lines(ranks, {"PP": 1, "DP": 2, "TP": 1, "EP": 1}) == [
        "Distributed Muon: 12 parameters, 21 matrices, 0.9 M elements over 2 ranks (DP2 x TP1); 3 rounds, busiest rank "
        "1.02 of the mean; buffers 12 MiB; AdamW: 9 parameters"
    ]


def test_a_line_for_each_stage_where_they_differ() -> None:
    first = load(parameters=2, matrices=3, numel=10**9, adam_parameters=1, rounds=1)
    same = [first, load(stage=1, parameters=2, matrices=3, numel=10**9, adam_parameters=1, rounds=1)]
    assert len(start_lines(same, {"PP": 2, "DP": 1, "TP": 1})) == 1
    other = load(stage=1, parameters=1, matrices=1, numel=10**6, adam_parameters=4, flops=300, rounds=2)
    assert start_lines([first, other], {"PP": 2, "DP": 1, "TP": 1}) == [
        "Distributed Muon: 3 parameters, 4 matrices, 1.0 G elements over 2 ranks (PP2 x DP1 x TP1); 2 rounds, busiest "
        "rank 1.50 of the mean; buffers 12 MiB; AdamW: 5 parameters",
        "Distributed Muon: pipeline stage 0: 2 parameters, 3 matrices, 1.0 G elements; 1 round, busiest rank 1.00 of "
        "the mean; buffers 12 MiB; AdamW: 1 parameters",
        "Distributed Muon: pipeline stage 1: 1 parameters, 1 matrices, 1.0 M elements; 2 rounds, busiest rank 1.00 of "
        "the mean; buffers 12 MiB; AdamW: 4 parameters",
    ]


# Layout -> counts that the start line must have: of the model, however it is cut.
LAYOUTS = {
    "dp2 tp2": Layout(4, tp=2),
    "ep2": Layout(4, ep=2),
    "ep2 etp2": Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True),
}


def built(rank: int, world_size: int) -> dict[str, tuple[list[str], Any]]:
    """For each layout, what is said at start, and (ranks, description, timeout) of the grids' groups."""
    from megatron.core import parallel_state as ps

    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer import build

    out = {}
    for name, layout in LAYOUTS.items():
        ps.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.expert_tp,
            distributed_timeout_minutes=7,
            create_gloo_process_groups=False,
        )
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        said: list[str] = []
        build.say = said.append  # type: ignore[assignment]
        chunks = make_chunks("moe", layout, torch.float32)
        tag_parameters(chunks, MuonConfig())
        optimizer = build.get_megatron_optimizer(
            optimizer_config(layout, torch.float32),
            wrap(chunks, layout),
            use_gloo_process_groups=False,
            muon=MuonConfig(ns_dtype="fp32"),
        )
        groups = {}
        for part in optimizer.chained_optimizers:
            if hasattr(part, "grid"):
                group = part.grid.group
                timeout = group._get_backend(torch.device("cpu")).options._timeout
                expert = any(g["is_expert_parallel"] for g in part.param_groups)
                groups[expert] = (dist.get_process_group_ranks(group), group.group_desc, timeout)
        out[name] = said, groups
        ps.destroy_model_parallel()
    return out


def test_start_line_and_groups() -> None:
    ranks = run_ranks(built, 4)
    for name in LAYOUTS:
        said = ranks[0][name][0]
        # A dense layer and one with 4 experts and a shared one: 2 x (QKV, projection), fc1 and fc2 of 6 MLPs, router.
        assert said[0].startswith("Distributed Muon: 17 parameters, 27 matrices, "), said
        assert all(rank[name][0] == said for rank in ranks)
        assert said[0].endswith("AdamW: 8 parameters") or "AdamW: " in said[0]
        for rank in ranks:
            for _, (members, description, timeout) in rank[name][1].items():
                assert timeout == timedelta(minutes=7), (name, members, description)
                assert description and description != "undefined"
    # The dense grid is Megatron's own group of all ranks; experts over EP2 x TP2 have a group of this package's.
    assert "MUON" not in ranks[0]["dp2 tp2"][1][False][1]
    descriptions = [rank["ep2"][1][True][1] for rank in ranks]
    assert all("MUON" not in description for description in descriptions), descriptions


def gathers(rank: int, world_size: int) -> dict[str, tuple[int, int, int, list[str]]]:
    """With AdamW alone and with Muon: bucket groups, gathers in a step and those not begun ahead, and warnings."""
    import warnings

    from megatron.core import optimizer as stock
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    import megatron_muon
    from tests.models import train_step

    layout = Layout(world_size, ddp=dict(overlap_param_gather=True, overlap_grad_reduce=True, bucket_size=3000))
    initialize(layout)
    begun, late = [], []
    start, finish = Group.start_param_sync, Group.finish_param_sync

    def starting(self: Any, *args: Any, **kwargs: Any) -> None:
        if not self.param_gather_dispatched:
            begun.append(self)
        start(self, *args, **kwargs)

    def finishing(self: Any, *args: Any, **kwargs: Any) -> None:
        if not self.param_gather_dispatched:
            late.append(self)
        finish(self, *args, **kwargs)

    Group.start_param_sync, Group.finish_param_sync = starting, finishing
    out = {}
    for name in ("adamw", "muon"):
        if name == "muon":
            megatron_muon.enable(ns_dtype="fp32")
        chunks = make_chunks("dense", layout, torch.float32)
        wrapped = wrap(chunks, layout)
        optimizer = stock.get_megatron_optimizer(optimizer_config(layout, torch.float32), wrapped)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(wrapped, optimizer, 0)
            begun.clear()
            late.clear()
            train_step(wrapped, optimizer, 1)
        told = [str(w.message) for w in caught if "all-gather" in str(w.message)]
        out[name] = len(wrapped[0].bucket_groups), len(begun), len(late), told
    return out


def test_parameter_gathers_overlap_as_with_adamw_alone() -> None:
    """All but the first are begun while the one before is waited for, and Megatron warns of no order."""
    (adamw, muon), *_ = [list(found.values()) for found in run_ranks(gathers, 2)]
    for groups, begun, late, told in (adamw, muon):
        assert groups > 4 and begun == groups
        assert late == 1
        assert told == []


def mimo(rank: int, world_size: int) -> None:
    from megatron.core.models.mimo.model.base import MimoModel

    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer

    model = MimoModel.__new__(MimoModel)
    torch.nn.Module.__init__(model)
    get_megatron_optimizer(optimizer_config(Layout(1), torch.float32), [model], muon=MuonConfig())


def one_rank_fails(rank: int, world_size: int) -> list[str]:
    from megatron_muon.megatron.entry.agreement import all_or_none, from_first

    def work(problem: Exception | None) -> int:
        if problem is not None:
            raise problem
        return rank

    said = []
    for problem in (None, NotImplementedError("x") if rank == 1 else None, ValueError("y")):
        try:
            said.append(str(all_or_none(lambda problem=problem: work(problem))))
        except (NotImplementedError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    for failing in (0, 1):
        try:
            said.append(str(from_first(lambda at=failing: work(OSError("z") if rank == at else None))))
        except OSError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    expected = ["[0, 1, 2]", "NotImplementedError: x (on global rank 1)", "ValueError: y", "OSError: z", "0"]
    assert run_ranks(one_rank_fails, 3) == [expected] * 3


def test_a_model_of_several_models_is_refused() -> None:
    with pytest.raises(RankError, match=r"NotImplementedError: model: got MimoModel, .* expected one model"):
        run_ranks(mimo, 1)
