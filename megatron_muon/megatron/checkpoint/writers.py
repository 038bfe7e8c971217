"""Megatron's writers of checkpoint files: what they could not write is named, and their death is noticed."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_muon.checkpoints.manifest import named

# How often a rank that waits for its writer looks whether it lives.
_WAIT_S = 1.0


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
    """The seam around the function that writes a rank's file, of whose errors Megatron keeps only the type."""
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
    """The seam around the wait for a rank's persistent writer, which would not end if the writer was killed."""
    while self.process is not None and self.cur_item is None:
        # Before the queue is looked at: what the writer has said before its end still counts.
        alive = self.process.is_alive()
        try:
            self.cur_item = self._persistent_comp_q.get(blocking, _WAIT_S)
        except queue.Empty:
            if not alive:
                raise RuntimeError(
                    f"the process that writes this rank's checkpoints (pid {self.process.pid}) has ended without "
                    "having finished one, killed perhaps for want of memory; the checkpoint it was at is not "
                    "complete and does not count. Start the run again with --load"
                ) from None
            if not blocking:
                break
    return original(self, blocking, no_dist)


def _cause(error: BaseException) -> BaseException:
    """What the system said, if it did: torch.save reports what it made of it."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError):
            return at
        at = at.__cause__ or at.__context__
    return error


def first_line(error: BaseException) -> str:
    """What an error says, in one line of bounded length; its type where it says nothing."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text[:600]
