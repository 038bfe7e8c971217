"""Saving: Megatron's writers digest what they write, and a manifest ends the checkpoint.

A writer may be another process, spawned by Megatron, in which no seam has been installed. So Megatron sends it a
function of this module, and checksums come back with the results that Megatron collects on rank 0.

Rank 0 writes the manifest before `latest_checkpointed_iteration.txt` moves (after it with `--ckpt-format torch`,
because that save cannot be divided). Nothing large is read back unless `--muon-verify-saves` asks for it. A save that
fails says what was not written and which checkpoint is the last good one.
"""

from __future__ import annotations

import functools
import queue
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_muon.checkpoints import manifest as files
from megatron_muon.checkpoints.digest import DigestWriter, FileEntry, checksum
from megatron_muon.checkpoints.manifest import Manifest, named
from megatron_muon.checkpoints.reader import TRACKER
from megatron_muon.config import MuonConfig
from megatron_muon.megatron.checkpoint.loading import first_line, forget_checked, is_remote
from megatron_muon.megatron.entry.active import active_config
from megatron_muon.megatron.entry.agreement import all_or_none, from_first, rank_in, size_of

# How often a rank that waits for its writer checks that the process lives.
_WAIT_S = 1.0
# Attribute of a result of writing an archive: size and checksum of the archive's file up to its end.
_DIGEST = "file_digest"
# On rank 0: the digests of a checkpoint's files by its directory, from `finish` until the manifest is written.
_finished: dict[Path, dict[str, FileEntry]] = {}


def save(original: Callable[..., Any], sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kw: Any) -> Any:
    """The seam around `dist_checkpointing.save`: writes a manifest when everything else has been written."""
    config = active_config()
    if config is None or is_remote():
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
    if config is None or flags.use_dist_ckpt or kw.get("non_persistent_ckpt") or is_remote():
        return original(iteration, *args, **kw)
    directory = Path(get_checkpoint_name(flags.save, iteration, kw.get("release", False), return_base_dir=True))
    _forget_manifest(directory)
    with _explained(directory):
        out = original(iteration, *args, **kw)
    write_manifest(directory, config)
    return out


def write_manifest(directory: Path, config: MuonConfig) -> None:
    """Writes the manifest of a finished checkpoint. Collective over the world.

    Checksums are those that the writers have computed. Files that no writer of ours has digested (the small metadata,
    legacy files) are read, and with `verify_saves` all files are, each rank its share of the bytes.

    Raises:
        RuntimeError: On every rank, if a file cannot be read, is not as it was written, or the manifest cannot be
            written.
    """

    def sizes_and_digests() -> tuple[dict[str, int], dict[str, FileEntry]]:
        sizes, digests = files.file_sizes(directory), _finished.pop(directory, {})
        for name, entry in digests.items():
            if sizes.get(name) != entry.bytes:
                raise ValueError(f"{directory / name}: got {sizes.get(name, 0)} bytes, wrote {entry.bytes}")
        return sizes, digests

    try:
        sizes, digests = from_first(sizes_and_digests)
        unread = {name: size for name, size in sizes.items() if config.verify_saves or name not in digests}
        own = files.split_evenly(unread, size_of())[rank_in()]
        parts = all_or_none(lambda: {name: checksum(directory / name) for name in own})
        read = {name: entry for part in parts for name, entry in part.items()}
        for name in sorted(read.keys() & digests.keys()):
            if read[name] != digests[name]:
                raise OSError(f"{directory / name}: does not read back as it was written; check the disk")
        optimizer = {"optimizer": "distributed-muon", "variant": config.variant}
        from_first(lambda: Manifest.of(directory, {**digests, **read}, optimizer).write(directory))
    except (ValueError, OSError) as error:
        raise RuntimeError(f"{directory / files.NAME}: cannot be written: {error}") from error


def _forget_manifest(directory: Path) -> None:
    """Removes what an earlier save to the same directory has left: it must not vouch for this one."""
    forget_checked()
    _finished.pop(directory, None)
    if rank_in() == 0:
        (directory / files.NAME).unlink(missing_ok=True)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Makes an error during a save say what was lost and what was not."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = first_line(error)
        if isinstance(error, CheckpointException):
            # Raised on all ranks at once, but only the first has the reasons.
            failures = {rank: first_line(failure[0]) for rank, failure in error.failures.items()}
            reason = from_first(lambda: "; ".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        tracker = directory.parent / TRACKER
        last = tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""
        good = f"the last good checkpoint is {last}, as {tracker} says" if last else "there is no checkpoint before it"
        raise RuntimeError(
            f"{directory}: not saved ({reason}); {good}. Repair what is named here, and start the run again"
            + (f" with --load {directory.parent}" if last else "")
        ) from error


def get_save_function_and_args(original: Callable[..., Any], self: Any) -> Any:
    """The seam around the method that names the function that writes a rank's files: it becomes `digested_write`."""
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
    """The operating system's error, if there is one: torch.save raises another one."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError):
            return at
        at = at.__cause__ or at.__context__
    return error
