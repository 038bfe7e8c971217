"""Writes a manifest when Megatron has saved a checkpoint, and checks it before Megatron loads one.

Saving: the ranks read what was written, each its share of the bytes, and rank 0 writes the manifest, before
`latest_checkpointed_iteration.txt` moves (after it with `--ckpt-format torch`, whose save cannot be divided). A save
that fails says what was not written and which checkpoint is the last good one.

Loading: before anything is read, the ranks check the files, each its share, and then, against the manifest's list of
tensors, that the checkpoint is one of this run's model. The verdict is agreed, so that all ranks load or all raise the
same error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_muon.checkpoints import manifest as files
from megatron_muon.checkpoints.manifest import Manifest, TensorEntry
from megatron_muon.checkpoints.reader import TRACKER
from megatron_muon.config import MuonConfig
from megatron_muon.megatron.checkpoint.writers import first_line
from megatron_muon.megatron.entry.active import active_config
from megatron_muon.megatron.entry.messages import say

# Megatron opens a checkpoint several times for one load: the directory whose files have been checked, its manifest.
_checked: tuple[Path, Manifest | None] | None = None


def save(original: Callable[..., Any], sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
    """The seam around `dist_checkpointing.save`, which writes a manifest when all else has been written."""
    config = active_config()
    if config is None or _remote():
        return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
    directory = Path(checkpoint_dir)
    _forget_manifest(directory)
    with _explained(directory):
        request = original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        if request is None:
            write_manifest(directory, config)
            return None
    # Asynchronous: Megatron calls these on every rank once all have written, and moves the tracker after them.
    steps = [*request.finalize_fns, lambda: write_manifest(directory, config)]
    request.finalize_fns[:] = [_explained(directory)(step) for step in steps]
    return request


def save_checkpoint(original: Callable[..., Any], iteration: int, *args: Any, **kwargs: Any) -> Any:
    """The seam around megatron.training's `save_checkpoint`, which writes a manifest of legacy files."""
    from megatron.training.checkpointing import get_checkpoint_name
    from megatron.training.global_vars import get_args

    config, flags = active_config(), get_args()
    if config is None or flags.use_dist_ckpt or kwargs.get("non_persistent_ckpt") or _remote():
        return original(iteration, *args, **kwargs)
    release = kwargs.get("release", False)
    directory = Path(get_checkpoint_name(flags.save, iteration, release, return_base_dir=True))
    _forget_manifest(directory)
    with _explained(directory):
        out = original(iteration, *args, **kwargs)
    write_manifest(directory, config)
    return out


def get_checkpoint_format(original: Callable[..., Any], checkpoint_name: Any, args: Any) -> Any:
    """The seam around the function with which megatron.training first looks at a checkpoint it is to load."""
    config = active_config()
    if config is None or _remote():
        return original(checkpoint_name, args)
    directory = Path(checkpoint_name)
    verified = config.verify_checkpoint and _verify_once(directory) is not None
    try:
        out = original(checkpoint_name, args)
    except (NotImplementedError, OSError) as error:
        raise _unfinished(directory, first_line(error)) from error
    # What Megatron takes a torch_dist save for that has not been finished.
    if out == "torch_dcp" and args.ckpt_format != out:
        raise _unfinished(directory, "no metadata.json, which is written last")
    if config.verify_checkpoint and not verified:
        _say_unverified(directory)
    return out


def load(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The seam around `dist_checkpointing.load`, which refuses damaged checkpoints and those of another model."""
    config = active_config()
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    # Without this check of Megatron's a load is not collective, and single ranks may read what they like.
    collective = given["validate_access_integrity"]
    if config is not None and config.verify_checkpoint and collective and not _remote():
        directory, group = Path(given["checkpoint_dir"]), given["process_group"]
        found = _verify_once(directory, group)
        _forget_checked()
        if found is None:
            _say_unverified(directory)
        else:
            verify_model(directory, found, given["sharded_state_dict"], group)
    return original(*args, **kwargs)


def write_manifest(directory: Path, config: MuonConfig) -> None:
    """Writes the manifest of a finished checkpoint. Collective over the world; reads every file once.

    Raises:
        RuntimeError: On every rank, if a file cannot be read or the manifest not be written.
    """
    try:
        found = _from_first(lambda: files.sizes(directory))
        own = files.shares(found, _size())[_rank()]
        parts = _together(lambda: {name: files.checksum(directory / name) for name in own})
        _from_first(lambda: _write(directory, config, {k: v for part in parts for k, v in part.items()}))
    except _ProblemError as error:
        raise RuntimeError(f"{directory / files.NAME}: cannot be written: {error}") from error


def _write(directory: Path, config: MuonConfig, entries: dict[str, files.FileEntry]) -> None:
    optimizer = {"optimizer": "distributed-muon", "variant": config.variant}
    Manifest(entries, files.tensors_of(directory), optimizer).write(directory)


def verify_files(directory: Path, group: dist.ProcessGroup | None = None) -> Manifest | None:
    """Checks a checkpoint's files against its manifest. Collective over the group; reads every file once.

    Where there is no process group yet (Megatron reads arguments from a checkpoint), only sizes are checked.

    Returns:
        The manifest; None if there is none.

    Raises:
        ValueError: On every rank, the same, if a file is missing or damaged.
    """
    try:
        found = _from_first(lambda: files.read_manifest(directory), group)
        if found is None:
            return None
        own = files.shares({name: entry.bytes for name, entry in found.files.items()}, _size(group))[_rank(group)]
        alone = not dist.is_initialized()
        checked = _together(
            lambda: [files.file_problem(directory, name, found.files[name], contents=not alone) for name in own], group
        )
        problems = sorted(problem for part in checked for problem in part if problem)
        if not problems:
            return found
        what_to_do = _from_first(lambda: files.remedy(directory), group)
    except _ProblemError as error:
        raise ValueError(str(error)) from error
    more = f" ({len(problems) - 1} more files are damaged)" if problems[1:] else ""
    raise ValueError(f"{problems[0]}{more}. The checkpoint is damaged: {what_to_do}")


def verify_model(
    directory: Path, manifest: Manifest, sharded_state_dict: Any, group: dist.ProcessGroup | None = None
) -> None:
    """Checks that a checkpoint is one of the model that asks for it. Collective over the group.

    Raises:
        ValueError: On every rank, the same, if it is not.
    """
    wanted = wanted_tensors(sharded_state_dict)
    keys = sorted(manifest.tensors or {})
    resumes = any(files.is_optimizer_state(key) for key in wanted)
    problem = files.model_problem(directory, manifest, wanted, resumes=resumes)
    # Which tensors a rank asks for, as one bit each: what travels stays small.
    asked = sum(1 << at for at, key in enumerate(keys) if key in wanted)
    gathered = _together(lambda: (problem, resumes, asked), group)
    problems = [problem for problem, _, _ in gathered if problem]
    if not problems and any(resumes for _, resumes, _ in gathered):
        union = 0
        for _, _, bits in gathered:
            union |= bits
        left = files.unwanted_problem(directory, manifest, (key for at, key in enumerate(keys) if union >> at & 1))
        problems = [left] if left else []
    if problems:
        raise ValueError(problems[0])


def wanted_tensors(sharded_state_dict: Any) -> dict[str, TensorEntry]:
    """Whole shape and dtype of each tensor that a sharded state dict asks for, by its key in the checkpoint."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    out: dict[str, TensorEntry] = {}
    pending = list(nested_values(sharded_state_dict))
    while pending:
        entry = pending.pop()
        if isinstance(entry, ShardedTensorFactory):
            pending += nested_values(entry.build())
        elif isinstance(entry, ShardedTensor):
            dtype = str(entry.dtype).removeprefix("torch.")
            out[entry.key] = TensorEntry(tuple(entry.global_shape), dtype, bool(entry.allow_shape_mismatch))
    return out


def _verify_once(directory: Path, group: dist.ProcessGroup | None = None) -> Manifest | None:
    """`verify_files`, but once for all that Megatron reads of a directory for a load."""
    global _checked
    if _checked is not None and _checked[0] == directory:
        return _checked[1]
    found = verify_files(directory, group)
    # Without a process group only sizes have been looked at.
    _checked = (directory, found) if dist.is_initialized() else None
    return found


def _unfinished(directory: Path, reason: str) -> ValueError:
    return ValueError(
        f"{directory}: got no checkpoint there ({reason}), expected one that was saved to the end; "
        f"{files.remedy(directory)}"
    )


def _say_unverified(directory: Path) -> None:
    say(f"{directory}: has no {files.NAME}, so it is loaded unverified")


def _forget_checked() -> None:
    global _checked
    _checked = None


def _forget_manifest(directory: Path) -> None:
    """Removes what an earlier save to the same directory has left: it must not vouch for this one."""
    _forget_checked()
    if _rank() == 0:
        (directory / files.NAME).unlink(missing_ok=True)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Makes an error during a save say what was lost and what was not."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = first_line(error)
        if isinstance(error, CheckpointException):
            # Raised on all ranks at once, but only the first has been told why.
            failures = {rank: first_line(failure[0]) for rank, failure in error.failures.items()}
            told = [f"rank {rank}: {text}" for rank, text in sorted(failures.items())]
            reason = _from_first(lambda: "; ".join(told))
        tracker = directory.parent / TRACKER
        last = tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""
        good = f"the last good checkpoint is {last}, as {tracker} says" if last else "there is no checkpoint before it"
        raise RuntimeError(
            f"{directory}: not saved ({reason}); {good}. Mend what is named here, and start the run again"
            + (f" with --load {directory.parent}" if last else "")
        ) from error


class _ProblemError(Exception):
    """What went wrong on some rank, known to all."""


def _from_first[T](work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `work` returns on the group's first rank, on every rank; raises _ProblemError everywhere if it fails."""
    outcome = _attempt(work) if _rank(group) == 0 else (None, None)
    if dist.is_initialized():
        payload = [outcome]
        dist.broadcast_object_list(payload, group=group, group_src=0)
        outcome = payload[0]
    value, problem = outcome
    if problem is not None:
        raise _ProblemError(problem)
    return value  # type: ignore[return-value]


def _together[T](work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """What `work` returns on each rank, on every rank; raises _ProblemError everywhere if it fails on any."""
    gathered: list[Any] = [_attempt(work)]
    if dist.is_initialized():
        outcome, gathered = gathered[0], [None] * _size(group)
        dist.all_gather_object(gathered, outcome, group=group)
    problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(gathered) if problem is not None]
    if problems:
        raise _ProblemError(problems[0])
    return [value for value, _ in gathered]


def _attempt[T](work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except (ValueError, OSError) as error:
        return None, str(error)


def _rank(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _size(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _remote() -> bool:
    """Whether checkpoints lie where only Megatron's multi-storage client reaches."""
    from megatron.core.msc_utils import MultiStorageClientFeature

    if MultiStorageClientFeature.is_enabled():
        say("with the multi-storage client, checkpoints get no manifest and are not verified")
        return True
    return False
