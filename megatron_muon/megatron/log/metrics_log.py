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
from megatron_muon.observe.metric_names import FILE_NAME, METRICS, by_layer_kind, orthogonality_range
from megatron_muon.observe.step_metrics import MetricsRecorder, combine, summarize_ranks
from megatron_muon.optimizer.observer import UNOBSERVED

if TYPE_CHECKING:
    from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer


class MetricsLog:
    """Measures every `log_interval`th step of a chain's Muon optimizers.

    Every rank makes one. On a logged step the ranks issue one more all-to-all for each optimizer (a sample of the
    weights) and one gather over the world to the last rank, which has Megatron's writers. Other steps cost nothing.

    Attributes:
        sources: Functions called on every rank after a logged step; they return name -> number, of which the largest
            over the ranks is logged. Other parts add theirs here, such as attention logits. A name with a slash
            (`what/where`) does not appear in the line of text.
        counters: Functions as in `sources`; the sum over the ranks is logged.
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
            inner.observer = MetricsRecorder(self.muon, inner.names, inner.exchange)

    def finish(self) -> None:
        """Collects, writes and forgets what was recorded. Collective over the world."""
        step = self.optimizers[0].optimizer.updates
        turn = step // self.muon.log_interval - 1
        sums: list[Any] = []
        spent: dict[str, float] = {}
        for optimizer in self.optimizers:
            inner = optimizer.optimizer
            recorder, inner.observer = inner.observer, UNOBSERVED
            assert isinstance(recorder, MetricsRecorder)
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

    def _expected(self) -> dict[str, Any]:
        """The values that the settings aim at, for reports: metric -> a value, or the ends of a range."""
        muon = self.muon
        out: dict[str, Any] = {"orthogonality_error": orthogonality_range(muon.coefficients, muon.ns_steps)}
        if muon.scale_mode == "rms":
            out["update_rms"] = muon.update_rms * muon.extra_scale_factor
        return out

    def _write(self, step: int, gathered: list[Any]) -> None:
        matrices = combine(sums for rank in gathered for sums in rank[0])
        run = summarize_ranks([rank[1] for rank in gathered])
        for name in sorted({name for rank in gathered for name in rank[2]}):
            run[name] = max(rank[2][name] for rank in gathered if name in rank[2])
        for name in sorted({name for rank in gathered for name in rank[3]}):
            run[name] = sum(rank[3].get(name, 0) for rank in gathered)
        histograms = {
            f"muon_{metric}/{kind}": values
            for metric in METRICS
            for kind, values in by_layer_kind(matrices, metric).items()
        }
        means = {tag: sum(values) / len(values) for tag, values in histograms.items()}
        write(step, {f"muon/{name}": value for name, value in run.items()} | means, histograms)
        directory = self.muon.metrics_dir or writers()[2]
        if directory:
            Path(directory).mkdir(parents=True, exist_ok=True)
            with (Path(directory) / FILE_NAME).open("a", encoding="utf-8") as file:
                record = {"step": step, "run": run, "matrices": matrices, "expected": self._expected()}
                file.write(json.dumps(record) + "\n")
        print(log_line(step, matrices, run), flush=True)


def writers() -> tuple[Any, Any, str]:
    """Megatron's TensorBoard and W&B writers of this rank, or None, and the TensorBoard directory, or ''."""
    state = sys.modules.get("megatron.training.global_vars")
    if state is None:
        return None, None, ""
    directory = getattr(state._GLOBAL_ARGS, "tensorboard_dir", None) or ""
    return state._GLOBAL_TENSORBOARD_WRITER, state._GLOBAL_WANDB_WRITER, directory


def write(step: int, scalars: Mapping[str, float], histograms: Mapping[str, Sequence[float]] | None = None) -> None:
    """Writes numbers by tag to this rank's TensorBoard and W&B writers, if it has any."""
    tensorboard, wandb, _ = writers()
    distributions = histograms or {}
    if tensorboard is not None:
        for tag, value in scalars.items():
            tensorboard.add_scalar(tag, value, step)
        for tag, values in distributions.items():
            tensorboard.add_histogram(tag, torch.tensor(values), step)
    if wandb is not None:
        wandb.log({**scalars, **{f"{tag}/histogram": wandb.Histogram(v) for tag, v in distributions.items()}}, step)


LINE_WIDTH = 120
# Order of the line, as far as there is room: problems, metrics over all matrices, then what other parts measure.
_IF_NOT_ZERO = ("qk_nonfinite_heads", "qk_clipped_heads")
_IN_LINE = ("update_rms", "orthogonality_error", "max_attention_logit", "update_to_weight", "ns_ms_max")
# First words of the names that `summarize_ranks` gives.
_SPENT = ("ns", "sent")


def log_line(step: int, matrices: Mapping[str, Mapping[str, float]], run: Mapping[str, float]) -> str:
    """The line for the log, at most `LINE_WIDTH` columns; TensorBoard and the file have everything."""
    others = [name for name in run if "/" not in name and name.partition("_")[0] not in _SPENT]
    names = dict.fromkeys((*(name for name in _IF_NOT_ZERO if run.get(name)), *_IN_LINE, *others))
    line = f"megatron_muon: step {step}:"
    for name in names:
        values = [value for of_kind in by_layer_kind(matrices, name).values() for value in of_kind]
        words = name.removesuffix("_error").replace("_", " ")
        if values:
            part = f" {words} {min(values):.3g} to {max(values):.3g},"
        elif name in run and (run[name] or name not in _IF_NOT_ZERO):
            part = f" {words} {run[name]:.4g},"
        else:
            continue
        # The last comma is dropped.
        if len(line) + len(part) - 1 <= LINE_WIDTH:
            line += part
    return line.removesuffix(",")
