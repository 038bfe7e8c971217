"""Compares the settings of all ranks before anything is built, and gives work of several ranks one outcome.

Ranks with different settings train with wrong updates and no error, or wait for each other forever: a variant, a logged
or profiled step, and QK-Clip issue further collectives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.megatron.entry.messages import describe_ranks

# Attributes of Megatron's parsed arguments, `OptimizerConfig` and `TransformerConfig` that Muon's update, or a
# collective that belongs to it, depends on. An attribute that a rank's objects lack is not compared.
MEGATRON_SETTINGS = (
    *("optimizer", "lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "weight_decay", "clip_grad"),
    *("lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "lr_warmup_fraction", "lr_warmup_init"),
    *("start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
    *("adam_beta1", "adam_beta2", "adam_eps", "bf16", "fp16", "loss_scale"),
    *("qk_clip", "qk_clip_threshold", "qk_clip_alpha", "log_max_attention_logit"),
)
_OFF, _ABSENT = "off", object()


def settings_of(muon: MuonConfig | None, *owners: Any) -> dict[str, Any]:
    """The settings of this rank that must be equal on all ranks.

    Args:
        muon: Muon's settings: every field, and a hash of the contents of each file that a field names and that exists.
            None where this rank trains without Distributed Muon.
        owners: Megatron's arguments or configs; each setting of `MEGATRON_SETTINGS` is the first one's that has it.

    Returns:
        Name -> a value that can be pickled and compared.
    """
    out: dict[str, Any] = {"distributed_muon": _OFF if muon is None else "on"}
    for setting in fields(muon) if muon is not None else ():
        value = out[setting.name] = getattr(muon, setting.name)
        if setting.metadata.get("is_file") and value and Path(value).is_file():
            contents = hashlib.sha256(Path(value).read_bytes()).hexdigest()
            out[f"contents of the file of {setting.name} (SHA-256)"] = contents[:16]
    for name in MEGATRON_SETTINGS:
        found = next((getattr(owner, name) for owner in owners if hasattr(owner, name)), _ABSENT)
        if found is not _ABSENT:
            out[name] = found
    return out | _versions()


def _versions() -> dict[str, str]:
    from megatron.core.package_info import __version__ as megatron

    try:
        own = version("megatron-muon")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "version of megatron-muon": own,
        "version of torch": torch.__version__,
        "version of megatron-core": megatron,
    }


def agree_on_settings(settings: Mapping[str, Any]) -> None:
    """Checks that all ranks of the world have the same settings. Collective over the world: one `all_gather_object`.

    Args:
        settings: This rank's, from `settings_of`.

    Raises:
        RuntimeError: On every rank, if any setting differs; names each of them, its values and their ranks.
    """
    if not dist.is_initialized():
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(settings))
    found = differences(gathered)
    if found:
        raise RuntimeError(
            f"the ranks have different settings: {'; '.join(found)}. Start all ranks with the same flags, files and "
            "package versions"
        )


def all_or_none[T](work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Calls `work` on every rank, and gathers what it returns. Collective over the group: one `all_gather_object`.

    Args:
        work: What each rank does; it issues no collective.
        group: None: the world. Without process groups this process is the only rank.

    Returns:
        What `work` returned on each rank, by rank.

    Raises:
        Exception: On every rank, if `work` raises one of `_SHARED_ERRORS` on any: that of the first such rank. The
            message names the ranks, unless it is the same on all of them.
    """
    value, own = _attempt(work)
    gathered: list[Any] = [(value, own)]
    if dist.is_initialized():
        gathered = [None] * size_of(group)
        dist.all_gather_object(gathered, (value, own), group=group)
    errors = {rank: error for rank, (_, error) in enumerate(gathered) if error is not None}
    if errors:
        first = next(iter(errors.values()))
        ranks = range(len(gathered)) if group is None else dist.get_process_group_ranks(group)
        alike = [ranks[rank] for rank, error in errors.items() if str(error) == str(first)]
        where = "" if len(alike) == len(gathered) else f" (on global rank{'s' * (len(alike) > 1)} "
        raise type(first)(str(first) + (where and f"{where}{describe_ranks(alike)})")) from own
    return [value for value, _ in gathered]


def from_first[T](work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Calls `work` on the group's first rank alone and returns its result on every rank: one broadcast.

    Otherwise as `all_or_none`, which would gather a value from each rank.
    """
    outcome = _attempt(work) if rank_in(group) == 0 else (None, None)
    own = outcome[1]
    if dist.is_initialized():
        payload = [outcome]
        dist.broadcast_object_list(payload, group=group, group_src=0)
        outcome = payload[0]
    value, error = outcome
    if error is not None:
        raise type(error)(str(error)) from own
    return value  # type: ignore[return-value]


def rank_in(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in the group; 0 without process groups."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def size_of(group: dist.ProcessGroup | None = None) -> int:
    """The group's number of ranks; 1 without process groups."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


_SHARED_ERRORS: tuple[type[Exception], ...] = (ValueError, NotImplementedError, RuntimeError, TypeError, OSError)


def _attempt[T](work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except _SHARED_ERRORS as error:
        # Each rank makes the error again from its message, which not every subclass can be made from.
        kind = next(kind for kind in _SHARED_ERRORS if isinstance(error, kind))
        return None, kind(str(error)).with_traceback(error.__traceback__)


def differences(by_rank: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each setting that ranks give different values, such as `momentum: 0.95 on ranks 0, 2; 0.9 on rank 1`.

    Args:
        by_rank: The settings of each rank. Where a rank lacks a name, only the others are compared.
    """
    lines = []
    for name in dict.fromkeys(name for settings in by_rank for name in settings):
        ranks_of: dict[Any, list[int]] = {}
        for rank, settings in enumerate(by_rank):
            if name in settings:
                ranks_of.setdefault(settings[name], []).append(rank)
        if len(ranks_of) > 1:
            values = (
                f"{_shown(value)} on rank{'s' * (len(ranks) > 1)} {describe_ranks(ranks)}"
                for value, ranks in sorted(ranks_of.items(), key=lambda item: -len(item[1]))
            )
            lines.append(f"{name}: {'; '.join(values)}")
    return lines


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)
