"""The chain of Distributed Muon and AdamW optimizers that Megatron drives as one optimizer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from megatron_muon.exchange.pipeline import run_together
from megatron_muon.megatron.checkpoint.sharded_states import CheckpointedChain, CheckpointedOptimizer
from megatron_muon.megatron.log.metrics_log import MetricsLog
from megatron_muon.megatron.log.profiling import Profiler
from megatron_muon.megatron.optimizer.attention_clip import QKClip
from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer


class MuonChainedOptimizer(CheckpointedChain):
    """Steps Muon's and AdamW's optimizers, then gathers all parameters once.

    Muon's first gathers, of dense and of expert matrices, are issued before AdamW's step, which hides them. Then both
    kinds are orthogonalized in one pipeline.

    A bucket group can hold buckets of both kinds (it does in virtual pipelines), so a gather that ran as soon as one
    optimizer has stepped would distribute parameters that the other one has not updated yet.

    Args:
        chained_optimizers: Muon's and AdamW's.
        qk_clip: Clips query and key weights after each optimizer's update; None does not.
    """

    def __init__(self, chained_optimizers: list[CheckpointedOptimizer], qk_clip: QKClip | None = None) -> None:
        super().__init__(chained_optimizers)
        for optimizer in chained_optimizers:
            optimizer._defer_param_sync = True
        muon = [optimizer for optimizer in chained_optimizers if isinstance(optimizer, MuonDistributedOptimizer)]
        self.metrics = MetricsLog(muon[0].optimizer.muon, muon) if muon else None
        self.qk_clip = qk_clip
        if qk_clip is not None:
            # After the update of main parameters, before any of Megatron's ways to cast them to model parameters.
            for optimizer in chained_optimizers:
                if not optimizer.is_stub_optimizer:
                    optimizer.optimizer.register_step_post_hook(functools.partial(_clip, qk_clip, optimizer))
            if self.metrics is not None:
                self.metrics.sources.append(qk_clip.maxima)
                self.metrics.counters.append(qk_clip.counts)
        wanted = bool(muon) and muon[0].optimizer.muon.profile > 0
        self.profiler = Profiler(muon[0].optimizer.muon, muon, self.model_chunks) if wanted else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for ChainedOptimizer; what evaluations recorded is no part of the step that begins."""
        if self.qk_clip is not None:
            self.qk_clip.reset()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self) -> Any:
        """As for ChainedOptimizer; attention logits are forgotten, also if the step is skipped."""
        if self.qk_clip is None:
            return super().step()
        self.qk_clip.skipped()
        try:
            return super().step()
        finally:
            self.qk_clip.reset()

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Copies and unscales gradients; returns whether any optimizer of the chain found inf or NaN.

        The chain shares one gradient scaler, which hears of the whole chain's outcome once. With one scaler each, an
        overflow in one optimizer's gradients would leave their loss scales different.
        """
        for optimizer in self.chained_optimizers:
            if not optimizer.is_stub_optimizer:
                optimizer._copy_model_grads_to_main_grads()
        scaler = self.chained_optimizers[0].grad_scaler
        if scaler is None:
            return False
        found = False
        for optimizer in self.chained_optimizers:
            # On the left, so that it always runs: it is a collective.
            found = optimizer._unscale_main_grads_and_check_for_nan() or found
        scaler.update(found)
        return found

    @torch.no_grad()
    def _step(self) -> bool:
        """Megatron's own steps one optimizer after the other. Collective over the world."""
        muon = [o for o in self.chained_optimizers if isinstance(o, MuonDistributedOptimizer)]
        inner = [optimizer.optimizer for optimizer in muon if not optimizer.is_stub_optimizer]
        for each in inner:
            each.begin()
        success = True
        for optimizer in self.chained_optimizers:
            if optimizer not in muon:
                success = bool(optimizer.step_with_ready_grads()) and success
        with self._inner_step_timer():
            run_together([each.running for each in inner])
        for optimizer in muon:
            # What is left of the inner step: its hooks. Then Megatron casts main parameters to model parameters.
            success = bool(optimizer.step_with_ready_grads()) and success
        return success

    @contextmanager
    def _inner_step_timer(self) -> Iterator[None]:
        """Megatron's timer of inner steps, which would otherwise miss what runs before `step_with_ready_grads`."""
        timers = self.config.timers
        if timers is not None:
            timers("optimizer-inner-step", log_level=1).start(barrier=self.config.barrier_with_L1_time)
        yield
        if timers is not None:
            timers("optimizer-inner-step").stop()

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Steps all optimizers, then starts the parameter gather unless it overlaps with the next forward pass."""
        if self.qk_clip is not None:
            self.qk_clip.collect()
        logged = self.metrics if self.metrics is not None and self.metrics.due else None
        profiled = self.profiler if self.profiler is not None and self.profiler.due else None
        if logged is not None:
            logged.begin()
        if profiled is not None:
            profiled.begin()
        success = bool(self._step())
        with profiled.param_gather() if profiled is not None else nullcontext():
            for model_chunk in self.model_chunks:
                if not model_chunk.ddp_config.overlap_param_gather:
                    model_chunk.start_param_sync()
        # First what times the step, since metrics sample weights through the same exchange.
        if profiled is not None:
            profiled.finish()
        if logged is not None:
            logged.finish()
        return success


def _clip(qk_clip: QKClip, optimizer: CheckpointedOptimizer, *_: Any) -> None:
    qk_clip.apply(optimizer)
