"""Runs that load a checkpoint at one layout, train, and save it, with everything a test needs to compare them."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.config import MuonConfig
from tests.models import Layout, Place, initialize, make_chunks, optimizer_config, train_step, wrap
from tests.models import places as places_of

EXACT = MuonConfig(exchange_dtype="fp32", ns_dtype="fp32", batched=False)
LR, WEIGHT_DECAY = 0.01, 0.1
STATES = ("param", "momentum_buffer", "second_moment", "exp_avg", "exp_avg_sq")

# (parameter, state) -> the whole tensor, in the layout-independent names of tests/models.py.
Whole = dict[tuple[str, str], Tensor]


@dataclass
class Run:
    """A rank's model and optimizer under a layout."""

    layout: Layout
    chunks: list[Any]
    optimizer: Any
    step: int = 0

    @property
    def places(self) -> list[Place]:
        return [place for chunk in self.chunks for place in places_of(chunk, self.layout)]

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(train_step(self.chunks, self.optimizer, self.step))
            self.step += 1
        return losses

    def sharded_state_dict(self, sharding: str, *, is_loading: bool, efficient: bool = False) -> dict[str, Any]:
        from megatron.core import parallel_state as ps
        from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

        metadata = {
            "distrib_optim_sharding_type": sharding,
            "distrib_optim_fully_reshardable_mem_efficient": efficient,
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
        }
        models = [chunk.module for chunk in self.chunks]
        names = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
        out: dict[str, Any] = {n: m.sharded_state_dict(metadata=metadata) for n, m in zip(names, models, strict=True)}
        out["optimizer"] = self.optimizer.sharded_state_dict(out, is_loading=is_loading, metadata=metadata)
        # Megatron's writer and reader do so themselves, but only on CUDA devices.
        force_all_tensors_to_non_fp8(out)
        return out

    def save(self, directory: Path, sharding: str = "fully_reshardable", *, efficient: bool = False) -> None:
        from megatron.core import dist_checkpointing

        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                # As Megatron's training loop does it: the gather after the last step has not happened yet.
                chunk.start_param_sync(force_sync=True)
        if dist.get_rank() == 0:
            directory.mkdir(parents=True)
        dist.barrier()
        state = self.sharded_state_dict(sharding, is_loading=False, efficient=efficient)
        with child_processes():
            dist_checkpointing.save({**state, "step": self.step}, str(directory))

    def load(self, directory: Path, sharding: str = "fully_reshardable") -> None:
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(self.sharded_state_dict(sharding, is_loading=True), str(directory))
        for index, chunk in enumerate(self.chunks):
            chunk.module.load_state_dict(state["model" if len(self.chunks) == 1 else f"model{index}"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def pieces(self) -> list[tuple[str, str, tuple[int, ...], Tensor, Tensor]]:
        """What this rank stores: parameter, state, whole shape, flat indices into the whole tensor, values."""
        by_parameter = {place.parameter: place for place in self.places}
        out = []
        for part in self.optimizer.chained_optimizers:
            for parameter in part.model_param_gbuf_map:
                place = by_parameter[parameter]
                span = part._get_model_param_range_map(parameter)["param"]
                numel = torch.Size(place.shape).numel()
                indices = place.shard(torch.arange(numel).view(place.shape)).reshape(-1)[span.start : span.end]
                for state, value in part._get_main_param_and_optimizer_states(parameter).items():
                    if state in STATES:
                        # Compared as fp32 numbers, which also bf16's are.
                        out.append((place.name, state, place.shape, indices, value.detach().float().clone()))
        return out

    def differences(self, whole: Whole) -> list[str]:
        """States of this rank that are not bitwise those of `whole`."""
        out = []
        for name, state, _, indices, value in self.pieces():
            if not torch.equal(value, whole[name, state].reshape(-1)[indices]):
                out.append(f"{state} of {name}")
        for place in (place for place in self.places if place.parameter.requires_grad):
            expected = place.shard(whole[place.name, "param"]).to(place.parameter.dtype)
            if not torch.equal(place.parameter.detach(), expected):
                out.append(f"model parameter {place.name}")
        return out


@contextmanager
def child_processes() -> Iterator[None]:
    """Lets a test rank start processes, as Megatron's writer does, and ends the one that it would keep."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    daemon = config.pop("daemon", None)
    try:
        yield
    finally:
        config["daemon"] = daemon
        # Its manager ends with the last reference to the queue; ranks end without the exit hooks that would do it.
        filesystem_async._results_queue = None
        gc.collect()


def assemble(pieces_by_rank: list[list[tuple[str, str, tuple[int, ...], Tensor, Tensor]]]) -> Whole:
    """Whole tensors of what the ranks of a run returned as `Run.pieces`; every element must be stored somewhere."""
    whole: Whole = {}
    for pieces in pieces_by_rank:
        for name, state, shape, indices, value in pieces:
            tensor = whole.setdefault((name, state), torch.full(shape, torch.nan))
            tensor.view(-1)[indices] = value
    missing = [key for key, tensor in whole.items() if tensor.isnan().any()]
    assert not missing, missing
    return whole


def build(
    model: str,
    layout: Layout,
    *,
    dtype: torch.dtype = torch.float32,
    muon: MuonConfig = EXACT,
    frozen: str | None = None,
    initialized: bool = False,
    **settings: Any,
) -> Run:
    """A run whose weights do not depend on the layout; group settings as Megatron's schedule sets them."""
    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer

    if not initialized:
        initialize(layout)
    chunks = make_chunks(model, layout, dtype)
    for name, parameter in (item for chunk in chunks for item in chunk.named_parameters()):
        parameter.requires_grad_(frozen is None or re.search(frozen, name) is None)
    tag_parameters(chunks, muon)
    wrapped = wrap(chunks, layout)
    config = optimizer_config(layout, dtype, **{"lr": LR, "weight_decay": WEIGHT_DECAY, **settings})
    optimizer = get_megatron_optimizer(config, wrapped, muon=muon)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = config.lr, config.weight_decay * group["wd_mult"]
    return Run(layout, wrapped, optimizer)


def spoil(run: Run) -> None:
    """Gives a run other weights, so that a load that does nothing is seen."""
    with torch.no_grad():
        for place in run.places:
            place.parameter.add_(1.0)
    for part in run.optimizer.chained_optimizers:
        part.reload_model_params()


@dataclass(frozen=True)
class Session:
    """What `play` does.

    Attributes:
        model: Of tests/models.py.
        layout: The ranks' layout.
        load_from: Checkpoint to load; None starts anew.
        save_to: Where to save after `steps` steps.
        expected: File with the whole state that the load must give.
        sharding: Megatron's sharding type of both checkpoints.
        bf16: Whether the model is in bf16.
        efficient: Whether one rank gathers the state that is saved.
        steps: Steps before and after the save.
        frozen: Pattern of the names of parameters that are not trained.
        muon: Muon's settings.
    """

    model: str
    layout: Layout
    load_from: Path | None = None
    save_to: Path | None = None
    expected: Path | None = None
    sharding: str = "fully_reshardable"
    bf16: bool = False
    efficient: bool = False
    steps: int = 3
    frozen: str | None = None
    muon: MuonConfig = EXACT


def play(rank: int, world_size: int, session: Session) -> dict[str, Any]:
    """Loads, trains `steps` steps, saves, trains `steps` more.

    Returns:
        Differences after the load, losses before and after the save, and what the rank stored when it saved.
    """
    dtype = torch.bfloat16 if session.bf16 else torch.float32
    run = build(session.model, session.layout, dtype=dtype, frozen=session.frozen, muon=session.muon)
    differences: list[str] = []
    if session.load_from is not None:
        spoil(run)
        run.load(session.load_from, session.sharding)
    if session.expected is not None:
        differences = run.differences(torch.load(session.expected))
    before = run.train(session.steps)
    if session.save_to is None:
        return dict(differences=differences, before=before)
    run.save(session.save_to, session.sharding, efficient=session.efficient)
    pieces = run.pieces()
    return dict(differences=differences, before=before, after=run.train(session.steps), pieces=pieces)


def with_config(layout: Layout, **config: Any) -> Layout:
    return dataclasses.replace(layout, config={**layout.config, **config})
