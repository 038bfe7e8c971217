"""Megatron's writers of checkpoint files: they digest what they write, name what they could not write, and their death
is noticed.

A writer may be a process of its own, spawned by Megatron, in which no seam has been installed. So the function that it
is sent is one of this module, and checksums come back with the results that Megatron collects on rank 0.
"""

from __future__ import annotations

import functools
import queue
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_muon.checkpoints.digest import DigestWriter, FileEntry
from megatron_muon.checkpoints.manifest import named
from megatron_muon.megatron.entry.active import active_config

# How often a rank that waits for its writer checks that the process lives.
_WAIT_S = 1.0
# Attribute of a result of writing an archive: size and checksum of the archive's file up to its end.
_DIGEST = "file_digest"
# On rank 0: the digests of a checkpoint's files by its directory, from `finish` until `take_digests`.
_finished: dict[Path, dict[str, FileEntry]] = {}


def get_save_function_and_args(original: Callable[..., Any], self: Any) -> Any:
    """The seam around what tells Megatron which function writes a rank's files: it becomes `digested_write`."""
    write, preload, arguments = original(self)
    if write is None or active_config() is None:
        return write, preload, arguments
    return functools.partial(digested_write, write), preload, arguments


def digested_write(write: Callable[..., Any], *arguments: Any) -> Any:
    """Runs Megatron's function that writes a rank's files, in whichever process; its results carry digests."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not hasattr(filesystem_async._write_item, "digests"):
        filesystem_async._write_item = _digesting(filesystem_async._write_item)
    return write(*arguments)


def finish(original: Callable[..., Any], self: Any, metadata: Any, results: Any) -> Any:
    """The seam around a writer's `finish`, which rank 0 calls with the results of all ranks."""
    ends: dict[str, FileEntry] = {}
    for result in (result for of_rank in results for result in of_rank):
        name = result.storage_data.relative_path
        # A file's last archive has the digest of the whole file.
        entry = FileEntry(*getattr(result, _DIGEST, (-1, "")))
        if entry.bytes > ends.get(name, FileEntry(-1, "")).bytes:
            ends[name] = entry
    _finished[Path(self.checkpoint_dir)] = ends
    return original(self, metadata, results)


def take_digests(directory: Path) -> Mapping[str, FileEntry]:
    """Size and checksum of the files that writers have written into a checkpoint, once; empty if none are known."""
    return _finished.pop(directory, {})


def _digesting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)  # Megatron looks at its parameters
    def write_item(*arguments: Any, **named_arguments: Any) -> Any:
        # Transforms, where this version of torch has them, then the file.
        at = next(at for at, argument in enumerate(arguments) if hasattr(argument, "fileno"))
        file = arguments[at]
        if not hasattr(file, "digesting"):
            file.digesting = DigestWriter(file)
        result = original(*arguments[:at], file.digesting, *arguments[at + 1 :], **named_arguments)
        entry = file.digesting.entry()
        # Plain values: results pass through a process that need not have this package. The class is frozen.
        object.__setattr__(result, _DIGEST, (entry.bytes, entry.checksum))
        return result

    write_item.digests = True  # type: ignore[attr-defined]
    return write_item


def write_preloaded_data(
    original: Callable[..., Any],
    transform_list: Any,
    local_proc_idx: int,
    write_bucket: Any,
    results_queue: Any,
    count_queue: Any,
    use_fsync: bool,
    **kwargs: Any,
) -> Any:
    """The seam around the function that writes one file: Megatron keeps only the type of its errors."""
    output = original(transform_list, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, **kwargs)
    # With a queue a thread has written, which may not raise.
    if results_queue is None and isinstance(output[1], Exception):
        name, _, contents = write_bucket
        keys = [item.index.fqn for part in contents for item, _ in part]
        free_bytes = shutil.disk_usage(Path(name).parent).free
        raise OSError(
            f"{name}: cannot be written ({first_line(_cause(output[1]))}), {free_bytes} bytes are free there"
            f"{named(keys, 'lost')}"
        ) from output[1]
    return output


def is_current_async_call_done(
    original: Callable[..., Any], self: Any, blocking: bool = False, no_dist: bool = False
) -> Any:
    """The seam around the wait for a rank's persistent writer: Megatron waits forever for one that was killed."""
    while self.process is not None and self.cur_item is None:
        # Before the queue is read: what the writer has sent before its end still counts.
        alive = self.process.is_alive()
        try:
            self.cur_item = self._persistent_comp_q.get(blocking, _WAIT_S)
        except queue.Empty:
            if not alive:
                raise RuntimeError(
                    f"the process that writes this rank's checkpoints (pid {self.process.pid}) has ended without "
                    "having finished one, perhaps killed for lack of memory; the checkpoint that it was writing is "
                    "not complete and does not count. Start the run again with --load"
                ) from None
            if not blocking:
                break
    return original(self, blocking, no_dist)


def _cause(error: BaseException) -> BaseException:
    """The operating system's error, if there is one: torch.save reports one of its own."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError):
            return at
        at = at.__cause__ or at.__context__
    return error


def first_line(error: BaseException) -> str:
    """An error's message as one line of bounded length; its type where the message is empty."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text[:600]
