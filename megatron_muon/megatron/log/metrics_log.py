"""Brings the ranks' metrics together and writes them: TensorBoard, W&B, a line of text, and muon_metrics.jsonl."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.observe.metric_names import FILE_NAME, METRICS, by_kind
from megatron_muon.observe.step_metrics import Recorder, combine, summarize_ranks
from megatron_muon.optimizer.observer import UNOBSERVED

if TYPE_CHECKING:
    from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer


class MetricsLog:
    """Measures every `log_interval`th step of a chain's Muon optimizers.

    Every rank makes one. On a step that is logged the ranks issue one more all-to-all for each optimizer (a sample of
    the weights) and one gather over the world, to the rank that has Megatron's writers, the last one. On other steps
    there is nothing.

    Attributes:
        sources: Called on every rank after a step that is logged; what they return (name -> number) is logged with the
            largest value of all ranks. The hook for what other parts measure, such as attention logits. A name with a
            slash (`what/where`) is left out of the line of text.
        counters: As `sources`, of which the sum over all ranks is logged.
    """

    def __init__(self, muon: MuonConfig, optimizers: Sequence[MuonDistributedOptimizer]) -> None:
        self.muon = muon
        self.optimizers = list(optimizers)
        self.sources: list[Callable[[], Mapping[str, float]]] = []
        self.counters: list[Callable[[], Mapping[str, float]]] = []

    @property
    def due(self) -> bool:
        """Whether the step that comes next is logged; the same on all ranks."""
        interval = self.muon.log_interval
        return bool(interval and self.optimizers) and (self.optimizers[0].optimizer.updates + 1) % interval == 0

    def begin(self) -> None:
        """Makes the optimizers record their next step."""
        for optimizer in self.optimizers:
            inner = optimizer.optimizer
            inner.observer = Recorder(self.muon, inner.names, inner.exchange)

    def finish(self) -> None:
        """Collects, writes and forgets what was recorded. Collective over the world."""
        step = self.optimizers[0].optimizer.updates
        turn = step // self.muon.log_interval - 1
        sums: list[Any] = []
        spent: dict[str, float] = {}
        for optimizer in self.optimizers:
            inner = optimizer.optimizer
            recorder, inner.observer = inner.observer, UNOBSERVED
            assert isinstance(recorder, Recorder)
            recorder.weights(inner.slices, turn)
            own_sums, own_spent = recorder.finish()
            # Other instances hold the same matrices once more.
            if optimizer.distributed_optimizer_instance_id == 0:
                sums.append(own_sums)
            spent = {key: spent.get(key, 0) + value for key, value in own_spent.items()}
        extra, counts = (
            {name: value for source in sources for name, value in source().items()}
            for sources in (self.sources, self.counters)
        )
        writer = dist.get_world_size() - 1
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == writer else None
        dist.gather_object((sums, spent, extra, counts), gathered, dst=writer)
        if gathered is not None:
            self._write(step, gathered)

    def _write(self, step: int, gathered: list[Any]) -> None:
        matrices = combine(sums for rank in gathered for sums in rank[0])
        run = summarize_ranks([rank[1] for rank in gathered])
        for name in sorted({name for rank in gathered for name in rank[2]}):
            run[name] = max(rank[2][name] for rank in gathered if name in rank[2])
        for name in sorted({name for rank in gathered for name in rank[3]}):
            run[name] = sum(rank[3].get(name, 0) for rank in gathered)
        tensorboard, wandb, directory = writers()
        if tensorboard is not None:
            _to_tensorboard(tensorboard, step, matrices, run)
        if wandb is not None:
            _to_wandb(wandb, step, matrices, run)
        directory = self.muon.metrics_dir or directory
        if directory:
            Path(directory).mkdir(parents=True, exist_ok=True)
            with (Path(directory) / FILE_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "run": run, "matrices": matrices}) + "\n")
        print(_line(step, matrices, run), flush=True)


def writers() -> tuple[Any, Any, str]:
    """Megatron's TensorBoard and W&B writers of this rank, and the TensorBoard directory; what is missing is empty."""
    state = sys.modules.get("megatron.training.global_vars")
    if state is None:
        return None, None, ""
    directory = getattr(state._GLOBAL_ARGS, "tensorboard_dir", None) or ""
    return state._GLOBAL_TENSORBOARD_WRITER, state._GLOBAL_WANDB_WRITER, directory


def write_scalars(prefix: str, step: int, values: Mapping[str, float]) -> None:
    """Writes numbers as `<prefix>/<name>` to this rank's TensorBoard and W&B writers, if it has any."""
    tensorboard, wandb, _ = writers()
    if tensorboard is not None:
        for name, value in values.items():
            tensorboard.add_scalar(f"{prefix}/{name}", value, step)
    if wandb is not None:
        wandb.log({f"{prefix}/{name}": value for name, value in values.items()}, step)


def _to_tensorboard(
    writer: Any, step: int, matrices: Mapping[str, Mapping[str, float]], run: Mapping[str, float]
) -> None:
    for name, value in run.items():
        writer.add_scalar(f"muon/{name}", value, step)
    for metric in METRICS:
        for kind, values in by_kind(matrices, metric).items():
            writer.add_scalar(f"muon_{metric}/{kind}", sum(values) / len(values), step)
            writer.add_histogram(f"muon_{metric}/{kind}", torch.tensor(values), step)


def _to_wandb(wandb: Any, step: int, matrices: Mapping[str, Mapping[str, float]], run: Mapping[str, float]) -> None:
    content: dict[str, Any] = {f"muon/{name}": value for name, value in run.items()}
    for metric in METRICS:
        for kind, values in by_kind(matrices, metric).items():
            content[f"muon_{metric}/{kind}"] = sum(values) / len(values)
            content[f"muon_{metric}/{kind}/histogram"] = wandb.Histogram(values)
    wandb.log(content, step)


def _line(step: int, matrices: Mapping[str, Mapping[str, float]], run: Mapping[str, float]) -> str:
    """For the log: for each metric the range over all matrices, then what the ranks spent."""
    parts = []
    for metric in METRICS:
        values = [value for of_kind in by_kind(matrices, metric).values() for value in of_kind]
        if values:
            parts.append(f"{metric.replace('_', ' ')} {min(values):.3g} to {max(values):.3g}")
    parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in run.items() if "/" not in name]
    return f"megatron_muon: step {step}: " + ", ".join(parts)
