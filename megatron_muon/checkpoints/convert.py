"""Makes another optimizer's checkpoint of a checkpoint, one chunk in memory at a time.

Muon's momentum is taken for a running mean of the gradient, which is what AdamW's `exp_avg` and Megatron's Muon hold.
Distributed Muon's buffer, as Moonlight's, is a sum: mean / (1 - momentum).

A matrix that goes back to AdamW starts with zeros: Muon has no second moment, and a mean over a zero second moment
would give updates without bound. With both zero, AdamW's update exceeds its usual size by at most
`largest_restart_factor`, since the step count, and so the bias correction, goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_muon.checkpoints.groups import adam_settings, converted_common, source_momentum
from megatron_muon.checkpoints.kinds import (
    FULLY_RESHARDABLE,
    MAIN,
    MEAN,
    MOMENTUM,
    SQUARE,
    Kind,
    Parameter,
    is_state,
    kind_of,
    parameters,
    sharding,
)
from megatron_muon.checkpoints.reader import BACKEND, COMMON, TRACKER, Checkpoint
from megatron_muon.checkpoints.writer import CheckpointWriter

Momentum = Literal["exp_avg", "zeros"]


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        source: Optimizer of the source checkpoint.
        target: Optimizer to convert to.
        start: `exp_avg` keeps the mean gradient, `zeros` starts anew; None: the first where the target is a Muon.
        momentum: Of the Muon converted to; None: the source's if it is a Muon's, else 0.95.
        router: `adam` if the run that is to load leaves routers to AdamW.
    """

    source: Kind
    target: Kind
    start: Momentum | None = None
    momentum: float | None = None
    router: str = "muon"


@dataclass(frozen=True)
class Entry:
    """A tensor of the target: `source` divided by `divisor`, or zeros of its shape; `zeros` also tells the dtype."""

    key: str
    source: str
    divisor: float = 1.0
    zeros: bool = False


@dataclass(frozen=True)
class Result:
    """What a conversion did.

    Attributes:
        directory: The new checkpoint's iteration.
        copied: Tensors that are bitwise the source's.
        scaled: Momentum that was scaled.
        fresh: Parameters whose state starts with zeros.
        restart_factor: How far AdamW's update may exceed its usual size where its state starts with zeros.
    """

    directory: Path
    copied: int
    scaled: int
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
        copied=sum(not entry.zeros and entry.divisor == 1.0 for entry in entries),
        scaled=sum(entry.divisor != 1.0 for entry in entries),
        fresh=fresh,
        restart_factor=largest_restart_factor(*betas) if to_adam else None,
    )


def plan_entries(checkpoint: Checkpoint, options: Options) -> Iterator[Entry]:
    """Yields every tensor of the target: the model's as they are, then the states of each parameter.

    Raises:
        ValueError: If the source lacks a state that the target needs.
    """
    for key in checkpoint.tensors:
        if not is_state(key):
            yield Entry(key, key)
    from_mean = 1.0
    if options.target == "distributed-muon":
        from_mean = 1.0 - _target_momentum(checkpoint, options)
    to_mean = 1.0
    if options.source == "distributed-muon":
        to_mean = 1.0 - (source_momentum(checkpoint.common) or 0.0)
    for parameter in parameters(checkpoint).values():
        yield Entry(_key(MAIN[options.target], parameter), _state(checkpoint, parameter, MAIN[options.source]))
        if not parameter.is_muons(options.target, options.router):
            kept = MOMENTUM not in parameter.states
            for state in (MEAN, SQUARE):
                source = _state(checkpoint, parameter, state if kept else MOMENTUM)
                yield Entry(_key(state, parameter), source, zeros=not kept)
            continue
        source = _state(checkpoint, parameter, MOMENTUM if MOMENTUM in parameter.states else MEAN)
        # exp_avg is a mean already, whichever optimizer the other parameters have.
        divisor = from_mean / (to_mean if MOMENTUM in parameter.states else 1.0)
        zeros = options.start == "zeros"
        yield Entry(_key(MOMENTUM, parameter), source, divisor=1.0 if zeros else divisor, zeros=zeros)


def largest_restart_factor(beta1: float, beta2: float) -> float:
    """The largest update of an AdamW whose zero moments are not bias-corrected, for a steady gradient, over the usual.

    After k steps it is (1 - beta1^k) / sqrt(1 - beta2^k).
    """
    steps = range(1, 2 + int(5 / (1 - beta1)))
    return float(max((1 - beta1**k) / (1 - beta2**k) ** 0.5 for k in steps))


def _check(checkpoint: Checkpoint, options: Options) -> None:
    if options.source == options.target:
        raise ValueError(f"--to: got {options.target}, which --from says too, expected another optimizer")
    found = kind_of(checkpoint)
    if found != options.source:
        raise ValueError(
            f"--from: got {options.source}, expected {found or 'none: there is no optimizer state'}, by which "
            f"{checkpoint.directory} was written; see `python -m megatron_muon inspect`"
        )
    if options.target == "adamw" and options.start == "exp_avg":
        raise ValueError(
            "--momentum: got exp_avg, expected zeros with --to adamw: Muon has no second moment, and over a zero one "
            "the mean gradient would give updates without bound; omit it"
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


def _key(state: str, parameter: Parameter) -> str:
    return f"optimizer.state.{state}.{parameter.name}"


def _state(checkpoint: Checkpoint, parameter: Parameter, state: str) -> str:
    if state in parameter.states:
        return parameter.states[state]
    raise ValueError(
        f"{checkpoint.directory}: {parameter.name} has {', '.join(sorted(parameter.states))}, expected {state} too; "
        "the checkpoint is damaged, or of an optimizer that is not known here"
    )


def _write(checkpoint: Checkpoint, entry: Entry, writer: CheckpointWriter) -> None:
    stored = checkpoint.tensors[entry.source]
    for chunk in stored.chunks:
        index, target = MetadataIndex(entry.source, chunk.offsets), MetadataIndex(entry.key, chunk.offsets)
        if entry.zeros:
            writer.add(target, torch.zeros(chunk.sizes, dtype=stored.properties.dtype), stored.size)
        elif entry.divisor == 1.0:
            with checkpoint.open(index) as stream:
                writer.copy(target, stream, stored)
    if entry.divisor != 1.0:
        for chunk, tensor in checkpoint.chunks(entry.source):
            writer.add(MetadataIndex(entry.key, chunk.offsets), _divided(tensor, entry.divisor), stored.size)
            # Before the next one is read.
            del tensor


def _divided(tensor: Tensor, divisor: Any) -> Tensor:
    return tensor.div_(divisor)
