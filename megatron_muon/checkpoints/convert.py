"""Makes another optimizer's checkpoint of a checkpoint, one chunk in memory at a time.

Muon's momentum is taken for a running mean of the gradient, which is what AdamW's `exp_avg` and Megatron's Muon hold.
Distributed Muon's buffer, as Moonlight's, is a sum: mean / (1 - momentum).

A matrix that goes back to AdamW starts with the mean gradient and a second moment made for it (`moments`), or with
zeros for both: AdamW's update then exceeds its usual size by at most `largest_restart_factor`, since the step count,
and so the bias correction, goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_muon.checkpoints.contents import FULLY_RESHARDABLE, Parameter, kind_of, parameters, sharding
from megatron_muon.checkpoints.manifest import manifest_of
from megatron_muon.checkpoints.moments import largest_restart_factor, mean_squares, spread, square_factor
from megatron_muon.checkpoints.param_groups import adam_settings, converted_common, source_momentum
from megatron_muon.checkpoints.reader import BACKEND, COMMON, TRACKER, Checkpoint
from megatron_muon.checkpoints.writer import CheckpointWriter
from megatron_muon.state_keys import FP32_PARAM, MEAN, MOMENTUM, PARAM, SQUARE, Kind, split_key, state_key

Momentum = Literal["exp_avg", "zeros"]


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        source: Optimizer of the source checkpoint.
        target: Optimizer to convert to.
        start: `exp_avg` keeps the mean gradient, `zeros` starts anew.
        momentum: Of the Muon converted to; None: the source's if it is a Muon's, else 0.95.
        router: `adam` if the run that is to load leaves routers to AdamW.
    """

    source: Kind
    target: Kind
    start: Momentum = "exp_avg"
    momentum: float | None = None
    router: str = "muon"


@dataclass(frozen=True)
class Entry:
    """A tensor of the target, of the shape of `source`.

    Attributes:
        key: Its key.
        source: The source's tensor; what is neither copied nor scaled is fp32.
        divisor: What it is divided by.
        zeros: Whether it is zeros instead.
        square: The mean square of each matrix of `source` times this instead, if given.
        stacked: How many leading axes count matrices.
    """

    key: str
    source: str
    divisor: float = 1.0
    zeros: bool = False
    square: float | None = None
    stacked: int = 0


@dataclass(frozen=True)
class Result:
    """What a conversion did.

    Attributes:
        directory: The new checkpoint's iteration.
        copied: Tensors that are bitwise the source's.
        scaled: Momentum that was scaled.
        squared: Second moments that were made from momentum.
        fresh: Parameters whose state starts with zeros.
        restart_factor: How far AdamW's update may exceed its usual size where its state starts with zeros.
    """

    directory: Path
    copied: int
    scaled: int
    squared: int
    fresh: tuple[str, ...]
    restart_factor: float | None


def convert(
    source_path: Path, target_path: Path, options: Options, progress: Callable[[str, int, int], None] | None = None
) -> Result:
    """Converts the checkpoint of an iteration; the target is a directory for `--load`, with its tracker file.

    It is written under another name and renamed when everything has been read back, so that `target_path` is either a
    whole checkpoint or not there.

    Args:
        source_path: Directory of a run or of an iteration.
        target_path: New directory.
        options: What to convert to.
        progress: Called with a tensor's key, its number, and how many there are.

    Raises:
        ValueError: If an option or the source is bad, or `target_path` exists.
        RuntimeError: If what was written does not read back.
    """
    partial = target_path.with_name(f".{target_path.name}.partial")
    for path in (target_path, partial):
        if path.exists():
            raise ValueError(f"DST: got {path}, which exists, expected a new directory; remove it, or name another")
    checkpoint = Checkpoint(source_path)
    _check(checkpoint, options)
    entries = list(plan_entries(checkpoint, options))
    momentum = _target_momentum(checkpoint, options)
    common = converted_common(checkpoint.common, options.source, options.target, momentum)
    iteration = int(common.get("iteration", 0))
    name = f"iter_{iteration:07d}"
    try:
        writer = CheckpointWriter(partial / name)
        for number, entry in enumerate(entries):
            if progress is not None:
                progress(entry.key, number, len(entries))
            _write(checkpoint, entry, writer)
        for key in checkpoint.objects:
            if key != COMMON:
                with checkpoint.open(MetadataIndex(key)) as stream:
                    writer.copy(MetadataIndex(key), stream)
        writer.add_object(COMMON, common)
        writer.finish((checkpoint.directory / BACKEND).read_bytes())
        manifest_of(partial / name, options.target).write(partial / name)
        (partial / TRACKER).write_text(str(iteration), encoding="utf-8")
        partial.rename(target_path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if progress is not None:
        progress("done", len(entries), len(entries))
    fresh = tuple(sorted({entry.source for entry in entries if entry.zeros}))
    betas, _ = adam_settings(checkpoint.common, options.source)
    to_adam = any(entry.zeros and SQUARE in entry.key for entry in entries)
    return Result(
        target_path / name,
        copied=sum(not entry.zeros and entry.divisor == 1.0 and entry.square is None for entry in entries),
        scaled=sum(entry.divisor != 1.0 for entry in entries),
        squared=sum(entry.square is not None for entry in entries),
        fresh=fresh,
        restart_factor=largest_restart_factor(*betas) if to_adam else None,
    )


def plan_entries(checkpoint: Checkpoint, options: Options) -> Iterator[Entry]:
    """Yields every tensor of the target: the model's as they are, then the states of each parameter.

    Raises:
        ValueError: If the source lacks a state that the target needs.
    """
    for key in checkpoint.tensors:
        if split_key(key) is None:
            yield Entry(key, key)
    for parameter in parameters(checkpoint).values():
        main = _state(checkpoint, parameter, PARAM, FP32_PARAM)
        is_muons = parameter.is_muons(options.target, options.router)
        for state in _main_states(options.target, is_muons):
            yield Entry(state_key(state, parameter.name), main)
        if is_muons:
            yield _momentum(checkpoint, parameter, options)
        elif MOMENTUM in parameter.states:
            yield from _moments(checkpoint, parameter, options)
        else:
            for state in (MEAN, SQUARE):
                yield Entry(state_key(state, parameter.name), _state(checkpoint, parameter, state))


def _main_states(target: Kind, is_muons: bool) -> tuple[str, ...]:
    """Under which names a main parameter is looked for."""
    if target != "megatron-muon":
        return (PARAM,)
    # Which optimizer Megatron gives the others depends on how the script makes its model: either finds its own.
    return (FP32_PARAM,) if is_muons else (FP32_PARAM, PARAM)


def _momentum(checkpoint: Checkpoint, parameter: Parameter, options: Options) -> Entry:
    """Muon's momentum, from Muon's or from AdamW's mean gradient."""
    source = _state(checkpoint, parameter, MOMENTUM, MEAN)
    divisor = 1.0 - _target_momentum(checkpoint, options) if options.target == "distributed-muon" else 1.0
    if source == parameter.states.get(MOMENTUM):
        divisor /= _mean_per_momentum(checkpoint, options)
    zeros = options.start == "zeros"
    return Entry(state_key(MOMENTUM, parameter.name), source, divisor=1.0 if zeros else divisor, zeros=zeros)


def _moments(checkpoint: Checkpoint, parameter: Parameter, options: Options) -> Iterator[Entry]:
    """AdamW's moments of a parameter that was Muon's."""
    source = parameter.states[MOMENTUM]
    mean, square = (state_key(state, parameter.name) for state in (MEAN, SQUARE))
    if options.start == "zeros":
        yield Entry(mean, source, zeros=True)
        yield Entry(square, source, zeros=True)
        return
    factor = _mean_per_momentum(checkpoint, options)
    betas, step = adam_settings(checkpoint.common, options.source)
    yield Entry(mean, source, divisor=1.0 / factor)
    yield Entry(square, source, square=factor**2 * square_factor(betas, step), stacked=parameter.stacked)


def _mean_per_momentum(checkpoint: Checkpoint, options: Options) -> float:
    """What Muon's momentum in the source is multiplied by to be a mean gradient."""
    return 1.0 - (source_momentum(checkpoint.common) or 0.0) if options.source == "distributed-muon" else 1.0


def _check(checkpoint: Checkpoint, options: Options) -> None:
    if options.source == options.target:
        raise ValueError(f"--to: got {options.target}, which --from says too, expected another optimizer")
    found = kind_of(checkpoint)
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


def _target_momentum(checkpoint: Checkpoint, options: Options) -> float:
    if options.momentum is not None:
        return options.momentum
    found = source_momentum(checkpoint.common)
    return 0.95 if found is None else found


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
    means = None
    if entry.square is not None:
        means = mean_squares(checkpoint, entry.source, entry.stacked).mul_(entry.square)
    if entry.divisor != 1.0:
        for chunk, tensor in checkpoint.chunks(entry.source):
            writer.add(MetadataIndex(entry.key, chunk.offsets), tensor.float().div_(entry.divisor), stored.size)
            # Before the next one is read.
            del tensor
        return
    for chunk in stored.chunks:
        target = MetadataIndex(entry.key, chunk.offsets)
        if entry.zeros:
            writer.add(target, torch.zeros(chunk.sizes), stored.size)
        elif means is not None:
            writer.add(target, spread(means, chunk.offsets, chunk.sizes), stored.size)
        else:
            with checkpoint.open(MetadataIndex(entry.source, chunk.offsets)) as stream:
                writer.copy(target, stream, stored)
