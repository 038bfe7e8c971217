"""Makes another optimizer's checkpoint of a checkpoint, one chunk in memory at a time.

AdamW's `exp_avg` and the momentum of Megatron's Muon are running means of the gradient. Distributed Muon's buffer, as
Moonlight's, is a sum: mean / (1 - momentum).

A matrix that is converted to AdamW starts with the mean gradient and a second moment made for it (`moments`), or with
zeros for both: AdamW's update then exceeds its usual size by at most `largest_restart_factor`, since the step count,
and so the bias correction, continues.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_muon.checkpoints.contents import FULLY_RESHARDABLE, Parameter, optimizer_kind, parameters, sharding
from megatron_muon.checkpoints.moments import largest_restart_factor, mean_squares, spread, square_factor
from megatron_muon.checkpoints.param_groups import adam_settings, converted_common, source_momentum
from megatron_muon.checkpoints.reader import BACKEND, COMMON, TRACKER, Checkpoint, Progress, no_progress
from megatron_muon.checkpoints.writer import CheckpointWriter, written_whole
from megatron_muon.config import MuonConfig
from megatron_muon.state_keys import (
    FP32_PARAM,
    MEAN,
    MOMENTUM,
    PARAM,
    SQUARE,
    OptimizerKind,
    split_key,
    state_key,
    states_of,
)

Momentum = Literal["exp_avg", "zeros"]
How = Literal["copy", "divide", "zeros", "square"]


@dataclass(frozen=True)
class ConversionOptions:
    """How to convert.

    Attributes:
        source: Optimizer of the source checkpoint.
        target: Optimizer to convert to.
        start: Start of the states that are made: `exp_avg` keeps the mean gradient, `zeros` starts from zero.
        momentum: Momentum of the Muon to convert to; None takes the source's, or 0.95 from AdamW.
        router: Optimizer of routers in the run that will load the target: `muon` or `adam`.
    """

    source: OptimizerKind
    target: OptimizerKind
    start: Momentum = "exp_avg"
    momentum: float | None = None
    router: str = "muon"


@dataclass(frozen=True)
class Entry:
    """A tensor of the target, of the shape of `source`.

    Attributes:
        key: Key of the tensor.
        source: Key of the source's tensor.
        how: Origin of the values: the source's; the source divided by `number`, in fp32; zeros; or `number` times the
            mean square of each matrix of the source, in fp32.
        number: The divisor or factor.
        stacked: Number of leading axes that count matrices.
    """

    key: str
    source: str
    how: How = "copy"
    number: float = 1.0
    stacked: int = 0


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        directory: The new checkpoint's iteration.
        copied: Number of tensors that are bitwise the source's.
        scaled: Number of momenta that were scaled.
        squared: Number of second moments that were made from momentum.
        fresh: Parameters with a state that starts from zero.
        restart_factor: Factor by which AdamW's first updates of those may exceed their usual size.
    """

    directory: Path
    copied: int
    scaled: int
    squared: int
    fresh: tuple[str, ...]
    restart_factor: float | None


def convert(
    source_path: Path, target_path: Path, options: ConversionOptions, progress: Progress = no_progress
) -> Converted:
    """Converts the checkpoint of an iteration; the target is a directory for `--load`, with its tracker file.

    It is written under another name, read back, and renamed, so that `target_path` is a whole checkpoint or not there.

    Args:
        source_path: Directory of a run or of an iteration.
        target_path: New directory.
        options: What to convert to.
        progress: Shows how far the work is.

    Raises:
        ValueError: If an option or the source is bad, or `target_path` exists.
        RuntimeError: If what was written does not read back.
    """
    with written_whole(target_path, "DST") as partial:
        checkpoint = Checkpoint(source_path)
        _check(checkpoint, options)
        entries = list(plan_entries(checkpoint, options))
        momentum = _target_momentum(checkpoint, options)
        common = converted_common(checkpoint.common, options.target, momentum)
        iteration = int(common.get("iteration", 0))
        name = f"iter_{iteration:07d}"
        writer = CheckpointWriter(partial / name)
        for number, entry in enumerate(entries):
            progress(entry.key, number, len(entries))
            _write(checkpoint, entry, writer)
        for key in checkpoint.objects:
            if key != COMMON:
                with checkpoint.open(MetadataIndex(key)) as stream:
                    writer.copy(MetadataIndex(key), stream)
        writer.add_object(COMMON, common)
        writer.finish((checkpoint.directory / BACKEND).read_bytes(), {"optimizer": options.target})
        (partial / TRACKER).write_text(str(iteration), encoding="utf-8")
    progress("done", len(entries), len(entries))
    count = Counter(entry.how for entry in entries)
    betas, _ = adam_settings(checkpoint.common)
    to_adam = any(entry.how == "zeros" and SQUARE in entry.key for entry in entries)
    return Converted(
        target_path / name,
        copied=count["copy"],
        scaled=count["divide"],
        squared=count["square"],
        fresh=tuple(sorted({entry.source for entry in entries if entry.how == "zeros"})),
        restart_factor=largest_restart_factor(*betas) if to_adam else None,
    )


def plan_entries(checkpoint: Checkpoint, options: ConversionOptions) -> Iterator[Entry]:
    """Yields every tensor of the target: the model's as they are, then the states of each parameter.

    Raises:
        ValueError: If the source lacks a state that the target needs.
    """
    for key in checkpoint.tensors:
        if split_key(key) is None:
            yield Entry(key, key)
    for parameter in parameters(checkpoint).values():
        is_muons = parameter.is_muons(options.target, options.router)
        for state in states_of(options.target, is_matrix=is_muons):
            yield _entry(checkpoint, parameter, state, options)


def _entry(checkpoint: Checkpoint, parameter: Parameter, state: str, options: ConversionOptions) -> Entry:
    """A state of the target: copied, or made of what the source has."""
    key = state_key(state, parameter.name)
    if state in (PARAM, FP32_PARAM):
        return Entry(key, _state(checkpoint, parameter, PARAM, FP32_PARAM))
    if state == MOMENTUM:
        return _momentum(checkpoint, parameter, options)
    if MOMENTUM not in parameter.states:
        return Entry(key, _state(checkpoint, parameter, state))
    source = parameter.states[MOMENTUM]
    if options.start == "zeros":
        return Entry(key, source, "zeros")
    factor = _mean_per_momentum(checkpoint, options)
    if state == MEAN:
        return _divided(key, source, 1.0 / factor)
    betas, step = adam_settings(checkpoint.common)
    return Entry(key, source, "square", factor**2 * square_factor(betas, step), parameter.stacked)


def _momentum(checkpoint: Checkpoint, parameter: Parameter, options: ConversionOptions) -> Entry:
    """Muon's momentum, from Muon's or from AdamW's mean gradient."""
    key, source = state_key(MOMENTUM, parameter.name), _state(checkpoint, parameter, MOMENTUM, MEAN)
    if options.start == "zeros":
        return Entry(key, source, "zeros")
    divisor = 1.0 - _target_momentum(checkpoint, options) if options.target == "distributed-muon" else 1.0
    if source == parameter.states.get(MOMENTUM):
        divisor /= _mean_per_momentum(checkpoint, options)
    return _divided(key, source, divisor)


def _divided(key: str, source: str, divisor: float) -> Entry:
    return Entry(key, source, "copy" if divisor == 1.0 else "divide", divisor)


def _mean_per_momentum(checkpoint: Checkpoint, options: ConversionOptions) -> float:
    """The factor that turns Muon's momentum in the source into a mean gradient."""
    return 1.0 - (source_momentum(checkpoint.common) or 0.0) if options.source == "distributed-muon" else 1.0


def _check(checkpoint: Checkpoint, options: ConversionOptions) -> None:
    if options.source == options.target:
        raise ValueError(f"--to: got {options.target}, which --from says too, expected another optimizer")
    found = optimizer_kind(checkpoint)
    if found != options.source:
        raise ValueError(
            f"--from: got {options.source}, expected {found or 'none: there is no optimizer state'}, by which "
            f"{checkpoint.directory} was written; see `python -m megatron_muon inspect`"
        )
    if options.momentum is not None and not 0 <= options.momentum < 1:
        raise ValueError(f"--muon-momentum: got {options.momentum}, expected 0 or more and less than 1")
    format_ = sharding(checkpoint)
    if options.source != "megatron-muon" and format_ != FULLY_RESHARDABLE:
        raise ValueError(
            f"{checkpoint.directory}: its optimizer state is {format_}, which holds flat buckets and not parameters, "
            f"expected {FULLY_RESHARDABLE}; resume it with the layout it was saved with, add "
            "--dist-ckpt-optim-fully-reshardable, and save once"
        )


def _target_momentum(checkpoint: Checkpoint, options: ConversionOptions) -> float:
    if options.momentum is not None:
        return options.momentum
    found = source_momentum(checkpoint.common)
    return MuonConfig.momentum if found is None else found


def _state(checkpoint: Checkpoint, parameter: Parameter, *states: str) -> str:
    """The key of the first of `states` that a parameter has."""
    for state in states:
        if state in parameter.states:
            return parameter.states[state]
    raise ValueError(
        f"{checkpoint.directory}: {parameter.name} has {', '.join(sorted(parameter.states))}, expected "
        f"{' or '.join(states)} too; the checkpoint is damaged, or of an optimizer that is not known here"
    )


def _write(checkpoint: Checkpoint, entry: Entry, writer: CheckpointWriter) -> None:
    stored = checkpoint.tensors[entry.source]
    if entry.how == "square":
        means = mean_squares(checkpoint, entry.source, entry.stacked).mul_(entry.number)
    for chunk in stored.chunks:
        target = MetadataIndex(entry.key, chunk.offsets)
        if entry.how == "divide":
            writer.add(target, checkpoint.chunk(entry.source, chunk).float().div_(entry.number), stored.size)
        elif entry.how == "zeros":
            writer.add(target, torch.zeros(chunk.sizes), stored.size)
        elif entry.how == "square":
            writer.add(target, spread(means, chunk.offsets, chunk.sizes), stored.size)
        else:
            with checkpoint.open(MetadataIndex(entry.source, chunk.offsets)) as stream:
                writer.copy(target, stream, stored)
