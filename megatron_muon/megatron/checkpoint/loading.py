"""Loading: a checkpoint is checked against its manifest before Megatron reads it.

The ranks check the files, each its share, and then, against the manifest's list of tensors, that the checkpoint is one
of this run's model. They agree on the verdict, so that all of them load or all raise the same error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_muon.checkpoints import manifest as files
from megatron_muon.checkpoints.contents import is_optimizer_state
from megatron_muon.checkpoints.manifest import Manifest, TensorEntry
from megatron_muon.checkpoints.reader import dtype_name
from megatron_muon.megatron.entry.active import active_config
from megatron_muon.megatron.entry.agreement import all_or_none, from_first, rank_in, size_of
from megatron_muon.megatron.entry.messages import say

# The directory that has been checked, and its manifest: Megatron opens a checkpoint several times for one load.
_checked: tuple[Path, Manifest | None] | None = None


def get_checkpoint_format(original: Callable[..., Any], checkpoint_name: Any, args: Any) -> Any:
    """The seam around the function with which megatron.training first looks at a checkpoint that it will load."""
    config = active_config()
    if config is None or is_remote():
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
    if config is not None and config.verify_checkpoint and collective and not is_remote():
        directory, group = Path(given["checkpoint_dir"]), given.get("process_group")
        found = _verify_once(directory, group)
        forget_checked()
        if found is None:
            _say_unverified(directory)
        else:
            verify_model(directory, found, given["sharded_state_dict"], group)
    return original(*args, **kw)


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
        checked = all_or_none(
            lambda: [files.file_problem(directory, name, found.files[name], contents=contents) for name in own], group
        )
        problems = sorted(problem for part in checked for problem in part if problem)
        if not problems:
            return found
        what_to_do = from_first(lambda: files.remedy(directory), group)
    except OSError as error:
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
    gathered = all_or_none(lambda: (problem, resumes, asked), group)
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


def forget_checked() -> None:
    global _checked
    _checked = None


def _unfinished(directory: Path, reason: str) -> ValueError:
    return ValueError(
        f"{directory}: got no checkpoint there ({reason}), expected one that was saved to the end; "
        f"{files.remedy(directory)}"
    )


def _say_unverified(directory: Path) -> None:
    say(f"{directory}: has no {files.NAME}, so it is loaded unverified")


def is_remote() -> bool:
    """Whether checkpoints lie where only Megatron's multi-storage client reaches."""
    from megatron.core.msc_utils import MultiStorageClientFeature

    if MultiStorageClientFeature.is_enabled():
        say("with the multi-storage client, checkpoints get no manifest and are not verified")
        return True
    return False


def first_line(error: BaseException) -> str:
    """An error's message as one line of bounded length; its type where the message is empty."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text[:600]
