"""Messages and errors of a run, with one prefix and from one process of each node."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

PREFIX = "megatron_muon: "
# Set to 1, errors keep their tracebacks.
TRACEBACK_VARIABLE = "MEGATRON_MUON_TRACEBACK"

# Under another launcher than torchrun, how long the other processes of a node wait before they print an error: by then
# the launcher has ended them, if the first one has failed as well.
_OTHERS_WAIT_S = 3.0


@functools.cache
def say(message: str) -> None:
    """Prints a message on global rank 0, once per process: Megatron parses its arguments more than once."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{PREFIX}{message}", flush=True)


def warn(message: str) -> None:
    """Prints a warning, as `say` does."""
    say(f"warning: {message}")


def is_own(error: BaseException) -> bool:
    """Whether an error was raised by this package's own code, so that its message is all that a user needs."""
    at: TracebackType | None = error.__traceback__
    module = ""
    while at is not None:
        module = at.tb_frame.f_globals.get("__name__", "")
        at = at.tb_next
    return module.partition(".")[0] == "megatron_muon"


def stop(error: BaseException) -> None:
    """Ends the process as argparse does: one line on standard error, once per node, and exit code 2.

    Does nothing if `MEGATRON_MUON_TRACEBACK` is 1, so that the caller raises the error.

    Raises:
        SystemExit: Always, without the variable.
    """
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        return
    text = " ".join(str(error).split("\n"))
    if _is_first(text):
        print(f"{PREFIX}error: {text} ({TRACEBACK_VARIABLE}=1 shows where)", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _is_first(text: str) -> bool:
    """Whether no other process of this node has an error of this text."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:
        if int(os.environ.get("LOCAL_RANK", "0")) != 0:
            time.sleep(_OTHERS_WAIT_S)
        return True
    # torchrun keeps a directory for the processes of a node, and below it one for each of them.
    marker = Path(error_file).parents[1] / f"megatron_muon.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def describe_ranks(ranks: Iterable[int]) -> str:
    """Ranks in ascending order, three and more that follow each other as a range: `0, 2-5, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] + 1 == rank:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
