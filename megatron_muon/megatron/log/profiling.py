"""`--muon-profile`: records steps of a run and writes the ranks' numbers to the log, TensorBoard and trace files."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import time
import uuid
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_muon.config import TORCH_DTYPES, MuonConfig
from megatron_muon.exchange.phases import LABELS
from megatron_muon.megatron.log.metrics_log import write, writers
from megatron_muon.observe.nvml import Sample, between, open_current_device
from megatron_muon.observe.timing.peaks import RunFacts, arithmetic_ceiling, link_ceiling
from megatron_muon.observe.timing.recording import Recording, clock_for
from megatron_muon.observe.timing.steps import (
    RankStep,
    StepSummary,
    counted_bytes,
    median_step,
    planned_work,
    rank_step,
    scalars,
    summarize_step,
)
from megatron_muon.observe.timing.table import log_width, problem_line, run_summary, step_table
from megatron_muon.observe.timing.trace import TraceFile, file_name
from megatron_muon.plan.links_file import MeasuredLinks, load_links

if TYPE_CHECKING:
    from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer

DIRECTORY = "muon_profile"
# For the summary at the end; a longer run is summarized by its last steps.
_KEPT_STEPS = 1000


class Profiler:
    """Times every `profile`th step of a chain's optimizers.

    The construction is collective over the world, and so is `finish`, with one all-gather of a few hundred bytes a
    rank. Steps that are not due cost nothing. A file that cannot be written is given up with one warning, and training
    continues.

    Args:
        muon: Muon's settings.
        optimizers: Muon optimizers of the chain, of the same kinds on every rank.
        chunks: Model chunks; their parameters are gathered after the step.

    Raises:
        ValueError: On every rank, if the file of `muon.links` cannot be read on rank 0.
    """

    def __init__(self, muon: MuonConfig, optimizers: Sequence[MuonDistributedOptimizer], chunks: Sequence[Any]) -> None:
        self.muon = muon
        self.optimizers = list(optimizers)
        self.rank = dist.get_rank()
        self.summaries: deque[StepSummary] = deque(maxlen=_KEPT_STEPS)
        self._exchanges = [optimizer.optimizer.exchange for optimizer in optimizers]
        self._recording: Recording | None = None
        self._has_writer = True
        self._counted = (0, 0)
        self._gpu, self._no_gpu = open_current_device()
        self._sample: Sample | None = None
        kinds = [dense_or_experts(optimizer) for optimizer in optimizers]
        firsts = [dist.get_process_group_ranks(optimizer.grid.group)[0] for optimizer in optimizers]
        self._groups = dict(zip(kinds, firsts, strict=True))
        self._planned = planned_work(self._exchanges)
        self._kinds = kinds
        device = self._exchanges[0].device
        self._clock = clock_for(device)
        overlaps = all(chunk.ddp_config.overlap_param_gather for chunk in chunks)
        self._param_gather_bytes = 0 if overlaps else param_gather_bytes(chunks)
        self._start(device, overlaps)

    def _start(self, device: torch.device, overlaps: bool) -> None:
        """Agrees on the rates that the run is compared with, and makes the trace files. Collective over the world."""
        on_gpu = device.type == "cuda"
        device_name = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()
        nodes = self.optimizers[0].grid.node_of
        # Not all ranks need to see the file, nor the directory of rank 0's TensorBoard.
        links, problem = _links(self.muon.links) if self.rank == 0 else (None, "")
        own = (arithmetic_ceiling(device, TORCH_DTYPES[self.muon.ns_dtype]), links, problem, uuid.uuid4().hex)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (*own, writers()[2]))
        if gathered[0][2]:
            raise ValueError(gathered[0][2])
        one_node = nodes is None or len(set(nodes)) == 1
        self.facts = RunFacts(
            device_type=device.type,
            device_name=device_name,
            world_size=dist.get_world_size(),
            rounds=max(exchange.num_rounds for exchange in self._exchanges),
            overlap_param_gather=overlaps,
            link=link_ceiling(device_name, device.type, one_node=one_node, links=gathered[0][1]),
            flops=max((flops for flops, *_ in gathered), key=lambda ceiling: ceiling.per_s),
            settings=dataclasses.asdict(self.muon),
        )
        board = gathered[0][4] or gathered[-1][4]
        directory = self.muon.profile_dir or (os.path.join(board, DIRECTORY) if board else "")
        self.trace: TraceFile | None = None
        if directory:
            info = {
                "run": gathered[0][3],
                "rank": self.rank,
                "host": platform.node(),
                "clock": _clock_id(),
                "facts": self.facts.to_json(),
            }
            self.trace = TraceFile(Path(directory) / file_name(self.rank), self.rank, info)
            self.trace.create()
        problems: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, self.trace.problem if self.trace is not None else "")
        if self.rank == 0:
            _warn(problem_line([problem for problem in problems if problem]))
            if self._no_gpu:
                print(f"megatron_muon: {self._no_gpu}", flush=True)
            # At the run's end, however it ends, unless the optimizer is gone before.
            self._finalizer = weakref.finalize(self, _print_summary, self.summaries, self.facts)

    @property
    def due(self) -> bool:
        """Whether the next step is profiled; the same on all ranks."""
        return (self.optimizers[0].optimizer.updates + 1) % self.muon.profile == 0

    def begin(self) -> None:
        """Begins to record. Issues nothing, and waits for a few calls of the driver only."""
        self._sample = self._gpu.sample() if self._gpu is not None else None
        self._counted = counted_bytes(self._exchanges)
        self._recording = Recording(self._clock)
        for kind, exchange in zip(self._kinds, self._exchanges, strict=True):
            exchange.watch = self._recording.watch(kind)

    @contextmanager
    def param_gather(self) -> Iterator[None]:
        """Around the parameter gather, if the step has one."""
        if self._recording is None or not self._param_gather_bytes:
            yield
            return
        with self._recording.phase("param_gather"):
            yield

    def finish(self) -> None:
        """Ends the recording, and collects and writes its numbers. Collective over the world."""
        assert self._recording is not None
        recorded = self._recording.finish()
        self._recording = None
        for exchange in self._exchanges:
            exchange.watch = LABELS
        # The device has been waited for, so that what it did is counted.
        sampled, throttled = between(self._sample, self._gpu.sample()) if self._gpu and self._sample else ({}, ())
        before, now = self._counted, counted_bytes(self._exchanges)
        counted = {"sent_bytes": now[0] - before[0], "team_bytes": now[1] - before[1]}
        known = {**self._planned, **counted, **sampled, "param_gather_bytes": self._param_gather_bytes}
        step = self.optimizers[0].optimizer.updates
        record = rank_step(recorded, known, self._groups, step=step, rank=self.rank, throttled=throttled)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, record)
        # All ranks leave the all-gather at about the same time: clocks of different hosts are aligned by it.
        sync_ns = time.perf_counter_ns()
        if self.trace is not None and not self.trace.problem:
            self.trace.append(recorded, record, sync_ns)
            _warn(problem_line([self.trace.problem] if self.trace.problem else []))
        self._report(gathered)

    def _report(self, records: Sequence[RankStep]) -> None:
        is_writer = self.rank == dist.get_world_size() - 1
        if self.rank != 0 and not is_writer:
            return
        summary = summarize_step(records)
        if is_writer and self._has_writer:
            try:
                write(summary.step, {f"muon_profile/{name}": value for name, value in scalars(summary).items()})
            except OSError as error:
                self._has_writer = False
                _warn(f"megatron_muon: rank {self.rank} cannot log its profile: {error}; training continues without it")
        if self.rank == 0:
            self.summaries.append(summary)
            print(step_table(summary, self.facts, log_width()), end="", flush=True)

    def close(self) -> None:
        """Prints the run's summary on rank 0, once; otherwise the process does on its way out. Issues no collective."""
        if self.rank == 0:
            self._finalizer()


def _print_summary(summaries: Sequence[StepSummary], facts: RunFacts) -> None:
    if summaries:
        print(run_summary(median_step(summaries), facts, log_width()), end="", flush=True)


def dense_or_experts(optimizer: MuonDistributedOptimizer) -> str:
    """Whether an optimizer's matrices are `dense` or `experts`."""
    return "experts" if any(g.get("is_expert_parallel") for g in optimizer.optimizer.param_groups) else "dense"


def param_gather_bytes(chunks: Sequence[Any]) -> int:
    """The bytes that this rank sends in the gather of all parameters: its shard to each other rank, by any route."""
    total = 0
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            size = buffer.data_parallel_group.size()
            if buffer.param_data is not None:
                total += buffer.param_data.nbytes * (size - 1) // size
    return total


def _links(path: str) -> tuple[MeasuredLinks | None, str]:
    """(measured links, the problem with the file)."""
    try:
        return (load_links(path) if path else None), ""
    except ValueError as error:
        return None, str(error)


def _clock_id() -> str:
    """An id that is the same for processes that share a monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _warn(line: str) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)
