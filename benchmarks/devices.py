"""Where a benchmark's ranks run: on CPU cores over Gloo, or each on a GPU of its own over NCCL."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist

DeviceType = Literal["cpu", "cuda"]


def start_rank(device_type: DeviceType, rank: int, world_size: int, store: str) -> torch.device:
    """Initializes the default process group with a file as its store, and returns this rank's device. Collective."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    return device


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long `run` takes, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most that `run` allocates on the device on top of what was there when it began, by torch's own account."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    total = highest = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest
