"""Writes a manifest when Megatron has saved a checkpoint, and checks it before Megatron loads one.

Saving: Megatron's writers digest what they write (`writers`), and rank 0 writes the manifest, before
`latest_checkpointed_iteration.txt` moves (after it with `--ckpt-format torch`, because that save cannot be divided).
Nothing large is read back unless `--muon-verify-saves` asks for it. A save that fails says what was not written and
which checkpoint is the last good one.

Loading: before anything is read, the ranks check the files, each its share, and then, against the manifest's list of
tensors, that the checkpoint is one of this run's model. The ranks agree on the verdict, so that all of them load or all
raise the same error.
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
from megatron_muon.checkpoints.contents import is_optimizer_state
from megatron_muon.checkpoints.digest import FileEntry, checksum
from megatron_muon.checkpoints.manifest import Manifest, TensorEntry
from megatron_muon.checkpoints.reader import TRACKER, dtype_name
from megatron_muon.config import MuonConfig
from megatron_muon.megatron.checkpoint.collective import RankProblem, from_each, from_first, rank_in, size_of
from megatron_muon.megatron.checkpoint.writers import first_line, take_digests
from megatron_muon.megatron.entry.active import active_config
from megatron_muon.megatron.entry.messages import say

# Megatron opens a checkpoint several times for one load: the directory whose files have been checked, its manifest.
_checked: tuple[Path, Manifest | None] | None = None


def save(original: Callable[..., Any], sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kw: Any) -> Any:
    """The seam around `dist_checkpointing.save`: writes a manifest when everything else has been written."""
    config = active_config()
    if config is None or _is_remote():
        return original(sharded_state_dict, checkpoint_dir, *args, **kw)
    directory = Path(checkpoint_dir)
    _forget_manifest(directory)
    with _explained(directory):
        request = original(sharded_state_dict, checkpoint_dir, *args, **kw)
        if request is None:
            write_manifest(directory, config)
            return None
    # Asynchronous: Megatron calls these on every rank once all have written, and moves the tracker after them.
    steps = [*request.finalize_fns, lambda: write_manifest(directory, config)]
    request.finalize_fns[:] = [_explained(directory)(step) for step in steps]
    return request


def save_checkpoint(original: Callable[..., Any], iteration: int, *args: Any, **kw: Any) -> Any:
    """The seam around megatron.training's `save_checkpoint`: writes a manifest of legacy files."""
    from megatron.training.checkpointing import get_checkpoint_name
    from megatron.training.global_vars import get_args

    config, flags = active_config(), get_args()
    if config is None or flags.use_dist_ckpt or kw.get("non_persistent_ckpt") or _is_remote():
        return original(iteration, *args, **kw)
    directory = Path(get_checkpoint_name(flags.save, iteration, kw.get("release", False), return_base_dir=True))
    _forget_manifest(directory)
    with _explained(directory):
        out = original(iteration, *args, **kw)
    write_manifest(directory, config)
    return out


def get_checkpoint_format(original: Callable[..., Any], checkpoint_name: Any, args: Any) -> Any:
    """The seam around the function with which megatron.training first looks at a checkpoint that it will load."""
    config = active_config()
    if config is None or _is_remote():
        return original(checkpoint_name, args)
    directory = Path(checkpoint_name)
    verified = config.verify_checkpoint and _verify_once(directory) is not None
    try:
        out = original(checkpoint_name, args)
    except (NotImplementedError, OSError) as error:
        raise _unfinished(directory, first_line(error)) from error
    # What Megatron takes an unfinished torch_dist save for.
    if out == "torch_dcp" and args.ckpt_format != out:
        raise _unfinished(directory, "no metadata.json, which is written last")
    if config.verify_checkpoint and not verified:
        _say_unverified(directory)
    return out


def load(original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    """The seam around `dist_checkpointing.load`: refuses damaged checkpoints and those of another model."""
    config = active_config()
    bound = inspect.signature(original).bind(*args, **kw)
    bound.apply_defaults()
    given = bound.arguments
    # Without this check of Megatron's a load is not collective, and single ranks may read what they like.
    collective = given["validate_access_integrity"]
    if config is not None and config.verify_checkpoint and collective and not _is_remote():
        directory, group = Path(given["checkpoint_dir"]), given["process_group"]
        found = _verify_once(directory, group)
        _forget_checked()
        if found is None:
            _say_unverified(directory)
        else:
            verify_model(directory, found, given["sharded_state_dict"], group)
    return original(*args, **kw)


def write_manifest(directory: Path, config: MuonConfig) -> None:
    """Writes the manifest of a finished checkpoint. Collective over the world.

    Checksums are those that the writers have computed. Files that no writer of ours has digested (the small metadata,
    legacy files) are read, and with `verify_saves` all files are, each rank its share of the bytes.

    Raises:
        RuntimeError: On every rank, if a file cannot be read, is not as it was written, or the manifest cannot be
            written.
    """

    def sizes_and_digests() -> tuple[dict[str, int], dict[str, FileEntry]]:
        sizes, digests = files.file_sizes(directory), dict(take_digests(directory))
        for name, entry in digests.items():
            if sizes.get(name) != entry.bytes:
                raise ValueError(f"{directory / name}: got {sizes.get(name, 0)} bytes, wrote {entry.bytes}")
        return sizes, digests

    try:
        sizes, digests = from_first(sizes_and_digests)
        unread = {name: size for name, size in sizes.items() if config.verify_saves or name not in digests}
        own = files.split_evenly(unread, size_of())[rank_in()]
        parts = from_each(lambda: {name: checksum(directory / name) for name in own})
        read = {name: entry for part in parts for name, entry in part.items()}
        for name in sorted(read.keys() & digests.keys()):
            if read[name] != digests[name]:
                raise RankProblem(f"{directory / name}: does not read back as it was written; check the disk")
        optimizer = {"optimizer": "distributed-muon", "variant": config.variant}
        from_first(lambda: Manifest.of(directory, {**digests, **read}, optimizer).write(directory))
    except RankProblem as error:
        raise RuntimeError(f"{directory / files.NAME}: cannot be written: {error}") from error


def verify_files(directory: Path, group: dist.ProcessGroup | None = None) -> Manifest | None:
    """Checks a checkpoint's files against its manifest. Collective over the group; reads every file once.

    Where there is no process group yet (Megatron reads arguments from a checkpoint), only sizes are checked.

    Returns:
        The manifest; None if there is none.

    Raises:
        ValueError: On every rank, the same, if a file is missing or damaged.
    """
    try:
        found = from_first(lambda: files.read_manifest(directory), group)
        if found is None:
            return None
        sizes = {name: entry.bytes for name, entry in found.files.items()}
        own = files.split_evenly(sizes, size_of(group))[rank_in(group)]
        contents = dist.is_initialized()
        checked = from_each(
            lambda: [files.file_problem(directory, name, found.files[name], contents=contents) for name in own], group
        )
        problems = sorted(problem for part in checked for problem in part if problem)
        if not problems:
            return found
        what_to_do = from_first(lambda: files.remedy(directory), group)
    except RankProblem as error:
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
    resumes = any(is_optimizer_state(key) for key in wanted)
    problem = files.model_problem(directory, manifest, wanted, resumes=resumes)
    # Which tensors a rank asks for, as one bit each: the message between ranks stays small.
    asked = sum(1 << at for at, key in enumerate(keys) if key in wanted)
    gathered = from_each(lambda: (problem, resumes, asked), group)
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
            shape, any_shape = tuple(entry.global_shape), bool(entry.allow_shape_mismatch)
            out[entry.key] = TensorEntry(shape, dtype_name(entry.dtype), any_shape)
    return out


def _verify_once(directory: Path, group: dist.ProcessGroup | None = None) -> Manifest | None:
    """`verify_files`, but once for everything that Megatron reads from a directory during a load."""
    global _checked
    if _checked is not None and _checked[0] == directory:
        return _checked[1]
    found = verify_files(directory, group)
    # Without a process group only sizes have been compared.
    _checked = (directory, found) if dist.is_initialized() else None
    return found


def _forget_checked() -> None:
    global _checked
    _checked = None


def _forget_manifest(directory: Path) -> None:
    """Removes what an earlier save to the same directory has left: it must not vouch for this one."""
    _forget_checked()
    take_digests(directory)
    if rank_in() == 0:
        (directory / files.NAME).unlink(missing_ok=True)


def _unfinished(directory: Path, reason: str) -> ValueError:
    return ValueError(
        f"{directory}: got no checkpoint there ({reason}), expected one that was saved to the end; "
        f"{files.remedy(directory)}"
    )


def _say_unverified(directory: Path) -> None:
    say(f"{directory}: has no {files.NAME}, so it is loaded unverified")


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
            reason = from_first(lambda: "; ".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        tracker = directory.parent / TRACKER
        last = tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""
        good = f"the last good checkpoint is {last}, as {tracker} says" if last else "there is no checkpoint before it"
        raise RuntimeError(
            f"{directory}: not saved ({reason}); {good}. Repair what is named here, and start the run again"
            + (f" with --load {directory.parent}" if last else "")
        ) from error


def _is_remote() -> bool:
    """Whether checkpoints lie where only Megatron's multi-storage client reaches."""
    from megatron.core.msc_utils import MultiStorageClientFeature

    if MultiStorageClientFeature.is_enabled():
        say("with the multi-storage client, checkpoints get no manifest and are not verified")
        return True
    return False
