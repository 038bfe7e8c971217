"""Saves that processes do not finish: the last good checkpoint goes on, errors name what was lost, no rank hangs."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_muon.checkpoints import manifest
from tests.distributed import RankError, run_ranks
from tests.training_runs import MODEL, MUON, SCRIPT, TRAINING, Trace, differences, launch_ranks, train

FULLY = shlex.split("--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable")
SAVED = "iter_0000004"
TRACKER = "latest_checkpointed_iteration.txt"
# What happens while SAVED is being written: some ranks are killed there, or may not write more than so many bytes.
Fault = Literal["kill rank 1", "kill all", "limit", "none", "kill at manifest", "kill in legacy", "kill writer"]


def faulty(rank: int, world_size: int, port: int, arguments: list[str], fault: Fault) -> Trace:
    """As `train`; the fault strikes inside Megatron's writer, with a part of the rank's file on the disk."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original = filesystem_async._write_item

    @functools.wraps(original)  # Megatron looks at its parameters
    def write_item(transforms: Any, stream: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(transforms, stream, *args, **kwargs)
        if SAVED in stream.name and stream.tell() > 50_000:
            stream.flush()
            # Asynchronous writers are processes of their own.
            if fault == "kill all" or (fault in ("kill rank 1", "kill writer") and rank == 1):
                kill_self()
            if fault == "limit" and rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return out

    filesystem_async._write_item = write_item
    if fault == "kill at manifest" and rank == 0:
        manifest.Manifest.write = _killing(manifest.Manifest.write, before=True)  # type: ignore[method-assign]
    if fault == "kill in legacy" and rank == 1:
        torch.save = _killing(torch.save, before=False)
    try:
        return train(rank, world_size, port, SCRIPT, arguments, None)
    finally:
        kill_children()


def _killing(original: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
    """Ends the process before or after a call that has to do with the faulty save."""

    def call(*args: Any, **kwargs: Any) -> Any:
        strikes = any(SAVED in str(word) for word in args if isinstance(word, str | Path))
        if strikes and before:
            kill_self()
        out = original(*args, **kwargs)
        if strikes:
            kill_self()
        return out

    return call


def kill_children() -> None:
    """Ends what this process has started and what would outlive it: the server of Megatron's queue of results."""
    for child in multiprocessing.active_children():
        child.kill()


def kill_self() -> None:
    """Ends this process as `kill -9` does."""
    kill_children()
    os.kill(os.getpid(), signal.SIGKILL)


def launch_faulty(fault: Fault, *arguments: str, script: Callable[..., Trace] = faulty) -> dict[int, str]:
    """Launches a run whose save fails; what each rank said at its end. Raises TimeoutError if a rank hangs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(RankError) as caught:
        run_ranks(script, 2, port, [*MODEL, *TRAINING, *arguments], fault)
    # A rank that is still there when its peers have failed is not listed: it would hang.
    assert sorted(caught.value.errors) == [0, 1]
    return {rank: message for rank, (_, message, _) in caught.value.errors.items()}


@contextmanager
def small_disk(directory: Path) -> Iterator[Callable[[int | None], None] | None]:
    """Makes a directory a disk of its own; yields what leaves it so many bytes, or None where mounting is forbidden."""
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(directory)], capture_output=True, check=False)
    if mounted.returncode != 0:
        yield None
        return

    def resize(free_bytes: int | None) -> None:
        status = os.statvfs(directory)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        size = used + free_bytes if free_bytes is not None else 1 << 28
        subprocess.run(["mount", "-o", f"remount,size={size}", str(directory)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def check_goes_on(directory: Path, layout: list[str], whole: list[Trace]) -> None:
    """From iteration 2, bitwise, and saves anew over what the faults have left."""
    resumed = launch_ranks(*layout, "--load", str(directory), "--save", str(directory), "--save-interval", "2")
    assert sorted(resumed[0].losses) == [2, 3]
    assert differences(resumed, whole, range(2, 4)) == []
    assert (directory / TRACKER).read_text() == "4"
    check_whole(directory / SAVED)


def check_whole(directory: Path) -> None:
    found = manifest.read_manifest(directory)
    assert found is not None and set(found.files) == set(manifest.file_sizes(directory))
    assert [manifest.file_problem(directory, name, entry) for name, entry in found.files.items()] == [None] * len(
        found.files
    )


def keep_second(source: Path, target: Path) -> None:
    """Copies a run's directory as it was after the save of iteration 2."""
    shutil.copytree(source / "iter_0000002", target / "iter_0000002")
    (target / TRACKER).write_text("2")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Trace]]:
    """A run without faults: its directory, with iterations 2 and 4, and what its ranks saw."""
    directory = tmp_path_factory.mktemp("good")
    traces = launch_ranks(*MUON, *FULLY, "--save", str(directory), "--save-interval", "2")
    for iteration in ("iter_0000002", SAVED):
        check_whole(directory / iteration)
    return directory, traces


def test_faults_during_saves(tmp_path: Path, good: tuple[Path, list[Trace]]) -> None:
    """A rank killed, a full disk, all ranks killed, each in a run that resumes from what the one before has left."""
    source, whole = good
    layout = [*MUON, *FULLY]
    with small_disk(tmp_path / "run") as resize:
        directory = tmp_path / "run"
        keep_second(source, directory)
        run = [*layout, "--load", str(directory), "--save", str(directory), "--save-interval", "2"]
        last_good = f"the last good checkpoint is 2, as {directory / TRACKER} says. Repair what is named here"

        said = launch_faulty("kill rank 1", *run)
        assert said[1] == "the process died"
        assert said[0].startswith(f"{directory / SAVED}: not saved (") and last_good in said[0]
        check_left(directory)

        if resize is not None:
            resize(50_000)
        said = launch_faulty("none" if resize is not None else "limit", *run)
        if resize is not None:
            resize(None)
        # Both are told, and the same, though only one has found it out.
        assert said[0] == said[1]
        for part in (f"{directory / SAVED}: not saved (rank ", ".distcp: cannot be written (", "bytes are free there"):
            assert part in said[0]
        assert "; lost: " in said[0] and last_good in said[0]
        check_left(directory)

        said = launch_faulty("kill all", *run)
        assert set(said.values()) == {"the process died"}
        check_left(directory)

        check_goes_on(directory, layout, whole)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "__1_0.distcp: got 3000 bytes, expected * truncated; lost: * write 2 into "),
        pytest.param("unfinished", "got no checkpoint there * write 2 into ", marks=pytest.mark.exhaustive),
    ],
)
def test_training_refuses_on_every_rank(
    tmp_path: Path, good: tuple[Path, list[Trace]], damage: str, message: str
) -> None:
    """Before Megatron reads anything of it, and with the same words."""
    keep_second(good[0], tmp_path)
    shutil.copytree(good[0] / SAVED, tmp_path / SAVED)
    os.truncate(tmp_path / SAVED / "__1_0.distcp", 3000)
    if damage == "unfinished":
        for name in ("metadata.json", manifest.NAME):
            (tmp_path / SAVED / name).unlink()
    said = launch_faulty("none", *MUON, *FULLY, "--load", str(tmp_path), "--ckpt-step", "4")
    assert said[0] == said[1] and said[0].startswith(str(tmp_path / SAVED))
    assert re.search(".*".join(re.escape(part) for part in message.split("*")), said[0]), said[0]


ASYNCHRONOUS = [*FULLY, *shlex.split("--async-save --async-strategy mcore --use-persistent-ckpt-worker")]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("layout", "fault", "said"),
    [
        (FULLY, "limit", "cannot be written ([Errno 27] File too large)"),
        (FULLY, "kill at manifest", "not saved"),
        (ASYNCHRONOUS, "kill writer", "has ended without having finished one"),
        (["--ckpt-format", "torch"], "kill in legacy", "not saved"),
    ],
)
def test_more_faults(
    tmp_path: Path, good: tuple[Path, list[Trace]], layout: list[str], fault: Fault, said: str
) -> None:
    directory, legacy = tmp_path, "torch" in layout
    if legacy:
        launch_ranks(*MUON, *layout, "--save", str(directory), "--save-interval", "2", "--exit-interval", "2")
    else:
        keep_second(good[0], directory)
    run = [*MUON, *layout, "--load", str(directory), "--save", str(directory), "--save-interval", "2"]
    messages = launch_faulty(fault, *run)
    assert any(said in message for message in messages.values()), messages
    assert (directory / TRACKER).read_text() == "2"
    assert not (directory / SAVED / manifest.NAME).exists()
    check_goes_on(directory, [*MUON, *layout], good[1])


def check_left(directory: Path) -> None:
    """An unfinished iteration, which nothing takes for a checkpoint, beside the good one."""
    assert (directory / TRACKER).read_text() == "2"
    left = {path.name for path in (directory / SAVED).iterdir()}
    assert any(name.endswith(".distcp") for name in left)
    assert not left & {"metadata.json", manifest.NAME}
    check_whole(directory / "iter_0000002")
    assert manifest.newest_whole(directory) == 2
