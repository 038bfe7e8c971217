"""Runs a function on several Gloo ranks, from a fork server that has torch, Megatron and the tests loaded already.

How to write a cheap test of several ranks. A group of 4 rank processes costs about 0.2 s before it does anything, one
of 1 rank 0.05 s, and each step of a small model about 0.1 s, mostly the latency of collectives. So:
  - Put all cases of one world size into one `run_ranks` call: pass a list, return a list, and compare in the parent,
    where `pytest`'s `subtests` or one table of expected and got names the case that failed.
  - Compute what ranks are compared with once, in the parent, in a fixture of module scope.
  - Use as few ranks, steps and saves as the statement needs. Tests without ranks are collected by `make test-fast`.
  - Every call has processes of its own, so a rank may patch, kill or fill whatever it likes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

RANK_TIMEOUT_S = 120.0
PRELOADED = "MEGATRON_MUON_TESTS_PRELOADED"


class RankError(AssertionError):
    """A rank raised. `errors` maps ranks, in the order in which they failed, to (type name, message, traceback)."""

    def __init__(self, errors: dict[int, tuple[str, str, str]]) -> None:
        self.errors = errors
        # The first to fail is the cause; the others mostly miss it in a collective.
        rank = next(iter(errors))
        super().__init__(f"ranks {sorted(errors)} failed; rank {rank}: {errors[rank][0]}\n{errors[rank][2]}")


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # Importing torch and Megatron costs seconds; the server does it once and every rank is forked from it.
    context.set_forkserver_preload(["tests.preload"])
    return context


def preload(modules: list[str]) -> None:
    """Names test modules that the fork server imports before it starts the first rank; for tests/conftest.py."""
    os.environ[PRELOADED] = " ".join(modules)


def _rank_main(
    fn: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...], pipe: Connection
) -> None:
    import torch

    torch.set_num_threads(1)
    # Errors are what tests look at: the launcher shall raise them, not end the process.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MEGATRON_MUON_TRACEBACK="1")
    try:
        dist.init_process_group(
            "gloo",
            store=dist.TCPStore("127.0.0.1", port, is_master=False),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=RANK_TIMEOUT_S),
        )
        # Pickled here, so that tensors travel as bytes: shared-memory handles would die with the rank.
        payload = pickle.dumps(fn(rank, world_size, *args))
        pipe.send_bytes(b"R" + payload)
        # A rank that leaves early takes its Gloo connections with it, under a peer's last collective.
        dist.barrier()
    except BaseException as error:
        pipe.send_bytes(b"E" + pickle.dumps((type(error).__name__, str(error), traceback.format_exc())))
    finally:
        pipe.close()
        # Gloo's threads may still hold sockets; a test rank has nothing to flush.
        os._exit(0)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = RANK_TIMEOUT_S) -> list[Any]:
    """Runs `fn(rank, world_size, *args)` on `world_size` processes in one Gloo world.

    Args:
        fn: A module-level function (it is pickled by name). What it returns must be picklable.
        world_size: Number of ranks.
        *args: Passed to every rank.
        timeout_s: Wall-clock limit in seconds for the slowest rank.

    Returns:
        The ranks' return values, by rank.

    Raises:
        RankError: If a rank raised or died. Ranks that only waited for it are listed when they fail in time.
        TimeoutError: If a rank neither returned nor raised in time: it hangs.
    """
    context = _context()
    # In the parent, so that it outlives every rank. Ranks find each other several times faster than through a file.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes: dict[Connection, int] = {}
    processes = []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (fn, rank, world_size, store.port, args, sender)
        process = context.Process(target=_rank_main, args=arguments, daemon=True)
        process.start()
        sender.close()
        pipes[receiver] = rank
        processes.append(process)
    results: dict[int, Any] = {}
    errors: dict[int, tuple[str, str, str]] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while pipes:
            ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                if errors:
                    break
                raise TimeoutError(f"ranks {sorted(pipes.values())} of {world_size} hang after {timeout_s} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pipes.pop(connection)
                try:
                    message = connection.recv_bytes()
                except EOFError:
                    errors[rank] = ("EOFError", "the process died", "the process died without a word")
                else:
                    body = pickle.loads(message[1:])
                    if message[:1] == b"R":
                        results[rank] = body
                    else:
                        errors[rank] = body
                if errors:
                    # Peers of a failed rank are given a moment to fail too, so that a test can see all of them.
                    deadline = min(deadline, time.monotonic() + 5.0)
    finally:
        for process in processes:
            if process.is_alive() and (errors or pipes):
                process.kill()
            process.join(timeout=10)
    if errors:
        raise RankError(errors)
    return [results[rank] for rank in range(world_size)]
