"""The manifest of a checkpoint: damage, other models and other people's files are refused, by name, on every rank."""

from __future__ import annotations

import ast
import dataclasses
import errno
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import megatron_muon
from megatron_muon.checkpoints import manifest
from megatron_muon.checkpoints.digest import FileEntry, checksum
from megatron_muon.checkpoints.manifest import Manifest, TensorEntry
from megatron_muon.checkpoints.reader import COMMON, Checkpoint
from megatron_muon.checkpoints.writer import CheckpointWriter
from megatron_muon.megatron.checkpoint import saving
from tests.checkpoint_runs import EXACT, Run, build, spoil
from tests.distributed import run_ranks
from tests.models import Layout

KEYS = ["first.weight", "second.weight", "third.weight"]
SHARD = "__0_0.distcp"


def save_synthetic(directory: Path) -> Manifest:
    """Three tensors and common_state in one file, with a manifest."""
    writer = CheckpointWriter(directory)
    for number, key in enumerate(KEYS):
        writer.add(MetadataIndex(key, torch.Size((0, 0))), torch.full((8, 32), float(number)), torch.Size((8, 32)))
    writer.add_object(COMMON, {"iteration": int(directory.name[5:])})
    optimizer = {"optimizer": "distributed-muon", "variant": "muon"}
    writer.finish(b'{"sharded_backend": "torch_dist"}', optimizer)
    # The writer digests what it writes; here everything is read.
    entries = {name: checksum(directory / name) for name in manifest.file_sizes(directory)}
    return Manifest.of(directory, entries, optimizer)


def problems(directory: Path) -> list[str]:
    """Of all files of a checkpoint."""
    found = manifest.read_manifest(directory)
    assert found is not None
    checked = (manifest.file_problem(directory, name, entry) for name, entry in found.files.items())
    return [problem for problem in checked if problem]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "iter_0000004"
    save_synthetic(directory)
    assert problems(directory) == []
    return directory


def flip_bit(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 0x10]))


def extent(directory: Path, key: str) -> tuple[int, int]:
    _, offset, length = Checkpoint(directory).extent(MetadataIndex(key, torch.Size((0, 0))))
    return offset, length


def test_reads_back_what_it_wrote(tmp_path: Path) -> None:
    written = save_synthetic(tmp_path / "iter_0000004")
    assert manifest.read_manifest(tmp_path / "iter_0000004") == written
    assert set(written.files) == {SHARD, ".metadata", "metadata.json"}
    assert written.tensors == {key: TensorEntry((8, 32), "float32") for key in KEYS}
    assert manifest.read_manifest(tmp_path) is None


def test_names_the_damaged_file_and_tensor(saved: Path) -> None:
    """A flipped bit costs the tensor it lies in and no other."""
    for key in KEYS:
        offset, length = extent(saved, key)
        # Wherever in the archive: its checksums cover all but the padding between records.
        values = (saved / SHARD).read_bytes().index(torch.full((8, 32), float(KEYS.index(key))).numpy().tobytes())
        assert offset < values < offset + length
        flip_bit(saved / SHARD, values + 77)
        (problem,) = problems(saved)
        assert problem == (
            f"{saved / SHARD}: its checksum is not the one it was saved with: bits have changed; damaged: {key}"
        )
        flip_bit(saved / SHARD, values + 77)
    assert problems(saved) == []


def test_finds_any_flipped_bit(saved: Path) -> None:
    for name in (SHARD, ".metadata", "metadata.json"):
        for at in range(0, (saved / name).stat().st_size, 97):
            flip_bit(saved / name, at)
            assert [problem.split(": ")[0] for problem in problems(saved)] == [str(saved / name)]
            flip_bit(saved / name, at)


def test_names_what_a_truncated_or_missing_file_costs(saved: Path) -> None:
    size = (saved / SHARD).stat().st_size
    end = sum(extent(saved, "second.weight"))
    os.truncate(saved / SHARD, end)
    assert problems(saved) == [
        f"{saved / SHARD}: got {end} bytes, expected {size}: truncated; lost: third.weight and 1 more"
    ]
    (saved / SHARD).unlink()
    assert problems(saved) == [f"{saved / SHARD}: missing, expected {size} bytes; lost: first.weight and 3 more"]


def test_offers_the_newest_iteration_that_is_whole(tmp_path: Path) -> None:
    run = tmp_path
    for iteration in (2, 4, 6, 8):
        save_synthetic(run / f"iter_{iteration:07d}")
    (run / "iter_0000010").mkdir()  # an unfinished save
    (run / "iter_nonsense").mkdir()
    os.truncate(run / "iter_0000008" / SHARD, 5)
    assert manifest.newest_whole(run) == 6
    flip_bit(run / "iter_0000006" / manifest.NAME, 300)
    assert manifest.newest_whole(run) == 4
    text = manifest.remedy(run / "iter_0000008")
    assert f"write 4 into {run / 'latest_checkpointed_iteration.txt'}" in text
    assert manifest.newest_whole(run, besides="iter_0000004") == 2
    shutil.rmtree(run / "iter_0000002")
    assert "load another checkpoint" in manifest.remedy(run / "iter_0000004")


@pytest.mark.parametrize(
    "name", ["../iter_0000002/x", "/etc/passwd", "a/../../x", "link/passwd", "..", "iter/../../..", "a\0b"]
)
def test_refuses_names_that_leave_the_directory(saved: Path, name: str) -> None:
    (saved / "link").symlink_to("/etc")
    Manifest({name: FileEntry(1, "00")}).write(saved)
    with pytest.raises(ValueError, match="expected one inside the checkpoint; do not use a checkpoint from this"):
        manifest.read_manifest(saved)


def test_follows_a_link_to_the_whole_iteration(saved: Path) -> None:
    other = saved.with_name("iter_0000006")
    other.symlink_to(saved)
    assert problems(other) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "got format version 2, expected at most 1: a newer megatron_muon wrote it; install that one"),
        ({"version": "1"}, "got format '.*', version '1', expected"),
        ({"version": 0}, "got format '.*', version 0, expected"),
        ({"format": "other"}, "got format 'other'"),
        ({"files": {}}, "its content does not match its digest"),
        ({"tensors": None}, "its content does not match its digest"),
    ],
)
def test_refuses_a_changed_or_newer_manifest(saved: Path, change: dict[str, Any], message: str) -> None:
    path = saved / manifest.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"{manifest.NAME}: {message}") as caught:
        manifest.read_manifest(saved)
    assert "--muon-no-verify-checkpoint" in str(caught.value)


def test_refuses_a_truncated_manifest(saved: Path) -> None:
    os.truncate(saved / manifest.NAME, 40)
    with pytest.raises(ValueError, match="cannot be read"):
        manifest.read_manifest(saved)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_is_there_whole_or_not_at_all(saved: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (saved / manifest.NAME).read_bytes()
    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space left"):
        Manifest({}).write(saved)
    assert (saved / manifest.NAME).read_bytes() == before
    assert [path.name for path in saved.glob(".muon*")] == []


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_readers_share_every_file_once_and_evenly(count: int) -> None:
    file_sizes = {f"__{rank}_0.distcp": 1000 + 37 * rank % 101 for rank in range(20)} | {".metadata": 10}
    parts = manifest.split_evenly(file_sizes, count)
    assert len(parts) == count and sorted(name for part in parts for name in part) == sorted(file_sizes)
    loads = [sum(file_sizes[name] for name in part) for part in parts]
    # Greedy: no reader is ahead of another by more than one file.
    assert max(loads) - min(loads) <= max(file_sizes.values())
    assert parts == manifest.split_evenly(dict(reversed(file_sizes.items())), count)


WEIGHT, STATE = "decoder.w", "optimizer.state.momentum_buffer.decoder.w"
STORED = {
    WEIGHT: TensorEntry((4, 8), "float32"),
    STATE: TensorEntry((4, 8), "float32"),
    "optimizer.state.param.decoder.w": TensorEntry((4, 8), "float32"),
    "chained_0.optimizer.distributed.dp_group_idx_0.param": TensorEntry((64,), "float32"),
}
OF_MUON = Manifest({}, STORED, {"optimizer": "distributed-muon", "variant": "muon"})


def asked(**changes: Any) -> dict[str, TensorEntry]:
    return {WEIGHT: dataclasses.replace(STORED[WEIGHT], **changes), STATE: STORED[STATE]}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (asked(), None),
        (asked(shape=(4, 16)), r"decoder.w: got shape \(4, 8\), expected \(4, 16\); it is a checkpoint of another mod"),
        (asked(shape=(4, 16), any_shape=True), None),
        (asked(dtype="bfloat16"), "decoder.w: got float32, expected bfloat16; give the run the checkpoint's dtype"),
        ({**asked(), "decoder.v": TensorEntry((2,), "float32")}, r"decoder.v: missing, expected shape \(2,\); it is"),
        ({STATE: TensorEntry((4, 8), "bfloat16")}, None),
        (
            {"optimizer.state.second_moment.decoder.w": TensorEntry((4,), "float32")},
            "second_moment.decoder.w: missing.*optimizer distributed-muon variant muon.*--no-load-optim",
        ),
        ({"chained_0.optimizer.distributed.dp_group_idx_0.param": TensorEntry((32,), "float32")}, None),
    ],
)
def test_tells_a_checkpoint_of_another_model(
    tmp_path: Path, wanted: dict[str, TensorEntry], message: str | None
) -> None:
    problem = manifest.model_problem(tmp_path, OF_MUON, wanted, resumes=True)
    if message is None:
        assert problem is None
    else:
        with pytest.raises(ValueError, match=message):
            raise ValueError(problem)


def test_weights_alone_may_change_their_dtype_and_leave_some_out(tmp_path: Path) -> None:
    weights = {WEIGHT: TensorEntry((4, 8), "bfloat16")}
    assert manifest.model_problem(tmp_path, OF_MUON, weights, resumes=False) is None
    assert manifest.unwanted_problem(tmp_path, OF_MUON, [WEIGHT]) is None
    assert "decoder.w: got a tensor that this run's model does not have" in str(
        manifest.unwanted_problem(tmp_path, OF_MUON, [STATE])
    )


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


def infect_object(directory: Path, key: str, payload: Payload, offsets: Any = None) -> None:
    """Makes the archive of a tensor or object one that holds the payload."""
    data = io.BytesIO()
    torch.save([payload], data)
    (directory / "bad.distcp").write_bytes(data.getvalue())
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.storage_data[MetadataIndex(key, offsets)] = _StorageInfo("bad.distcp", 0, len(data.getvalue()))
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def infect_metadata_entry(directory: Path, payload: Payload) -> None:
    """Makes the payload a value inside otherwise good metadata."""
    chunk = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((8, 32)))
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((8, 32)), [chunk])
    metadata = Metadata({KEYS[0]: entry, "x": BytesStorageMetadata()}, planner_data=payload, storage_data={})
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def first_chunk(directory: Path) -> None:
    next(iter(Checkpoint(directory).chunks(KEYS[0])))


INFECTIONS: dict[str, tuple[Callable[[Path, Payload], Any], Callable[[Path], Any]]] = {
    "metadata": (lambda d, p: (d / ".metadata").write_bytes(pickle.dumps(p)), Checkpoint),
    "metadata entry": (infect_metadata_entry, Checkpoint),
    "metadata, for the manifest": (infect_metadata_entry, lambda d: Manifest.of(d, {}, {})),
    "common_state": (lambda d, p: infect_object(d, COMMON, p), lambda d: Checkpoint(d).common),
    "common.pt": (lambda d, p: torch.save({"a": p}, d / "common.pt"), lambda d: Checkpoint(d).common),
    "common.pt, unzipped": (
        lambda d, p: torch.save({"a": p}, d / "common.pt", _use_new_zipfile_serialization=False),
        lambda d: Checkpoint(d).common,
    ),
    "tensor": (lambda d, p: infect_object(d, KEYS[0], p, torch.Size((0, 0))), first_chunk),
    "manifest": (lambda d, p: (d / manifest.NAME).write_bytes(pickle.dumps(p)), manifest.read_manifest),
    "metadata.json": (lambda d, p: (d / "metadata.json").write_bytes(pickle.dumps(p)), Checkpoint),
}


@pytest.mark.parametrize("kind", INFECTIONS)
def test_runs_no_code_from_a_checkpoint(saved: Path, tmp_path: Path, kind: str) -> None:
    infect, read = INFECTIONS[kind]
    payload = Payload(tmp_path / "marker")
    infect(saved, payload)
    with pytest.raises(ValueError):
        read(saved)
    assert not payload.marker.exists()
    # The same payload does run where pickle is trusted.
    pickle.loads(pickle.dumps(payload))
    assert payload.marker.exists()


def test_the_package_trusts_no_pickle() -> None:
    """Every torch.load is with weights_only; what unpickles is the reader's own class with a closed list."""
    found = []
    for path in Path(megatron_muon.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                *("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "np.load", "numpy.load"),
                *("dill.load", "dill.loads", "joblib.load", "marshal.loads", "shelve.open"),
            ):
                safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
                found.append((path.name, ast.unparse(node.func), safe))
    assert found == [("reader.py", "torch.load", True)] * 3


LAYOUT = Layout(2, tp=2, sequence_parallel=True, etp=1)
Damage = Callable[[Path], None]


def shard_of_rank_1(directory: Path) -> Path:
    return directory / "__1_0.distcp"


def edit_manifest(directory: Path, **changes: Any) -> None:
    path = directory / manifest.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_manifest_version(source: Path, target: Path) -> None:
    shutil.copy(source / manifest.NAME, target)
    edit_manifest(target, version=99)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated shard": (
        lambda d: os.truncate(shard_of_rank_1(d), 30000),
        "__1_0.distcp: got 30000 bytes, expected * truncated; lost: *weight and * more. The checkpoint is damaged: ",
    ),
    "flipped bit": (
        lambda d: flip_bit(shard_of_rank_1(d), 2000),
        "__1_0.distcp: its checksum is not the one * bits have changed; damaged: *. The checkpoint is damaged: ",
    ),
    "missing shard": (lambda d: shard_of_rank_1(d).unlink(), "__1_0.distcp: missing, expected * lost: *weight and "),
    "damaged metadata": (lambda d: flip_bit(d / ".metadata", 1000), ".metadata: its checksum is not the one"),
    "newer version": (lambda d: edit_manifest(d, version=99), "got format version 99, expected at most 1"),
    "path outside": (
        lambda d: Manifest({"../other": FileEntry(1, "00")}).write(d),
        "got the file name '../other', expected one inside",
    ),
}


def enable(verify: bool = True, verify_saves: bool = False) -> None:
    megatron_muon.enable(dataclasses.replace(EXACT, verify_checkpoint=verify, verify_saves=verify_saves))


def attempt(run: Run, directory: Path) -> str:
    spoil(run)
    try:
        run.load(directory)
    except ValueError as error:
        return str(error)
    return ""


@contextmanager
def reading(directory: Path, damage: Damage | None = None) -> Iterator[list[str]]:
    """Lists the files that this rank reads for a manifest; `damage` strikes when all have been written."""
    import torch.distributed as dist

    names: list[str] = []
    original_checksum, original_sizes = saving.checksum, manifest.file_sizes

    def read(path: Path) -> FileEntry:
        names.append(path.name)
        return original_checksum(path)

    def sizes(of: Path) -> dict[str, int]:
        if damage is not None and of == directory and dist.get_rank() == 0:
            damage(directory)
        return original_sizes(of)

    saving.checksum, manifest.file_sizes = read, sizes
    try:
        yield names
    finally:
        saving.checksum, manifest.file_sizes = original_checksum, original_sizes


def attempt_save(run: Run, directory: Path) -> str:
    try:
        run.save(directory)
    except RuntimeError as error:
        return str(error)
    return ""


def save_and_read(run: Run, root: Path) -> dict[str, Any]:
    """What this rank reads of its own saves, and what it says where they are damaged before the manifest is written."""
    flip: Damage = lambda directory: flip_bit(shard_of_rank_1(directory), 2000)  # noqa: E731
    tear: Damage = lambda directory: os.truncate(shard_of_rank_1(directory), 30000)  # noqa: E731
    out: dict[str, Any] = {}
    with reading(root / "iter_0000003") as out["read"]:
        run.save(root / "iter_0000003")
    with reading(root / "iter_0000004", flip):
        out["flipped"] = attempt_save(run, root / "iter_0000004")
    out["flipped, loaded"] = attempt(run, root / "iter_0000004")
    with reading(root / "iter_0000005", tear):
        out["torn"] = attempt_save(run, root / "iter_0000005")
    enable(verify_saves=True)
    with reading(root / "iter_0000006") as out["read and verified"]:
        out["verified"] = attempt_save(run, root / "iter_0000006")
    with reading(root / "iter_0000007", flip):
        out["flipped, verified"] = attempt_save(run, root / "iter_0000007")
    enable()
    return out


def load_damaged(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    """Saves, then loads damaged copies, and the good one into other models. All in one process group."""
    import torch.distributed as dist

    enable()
    run = build("moe", LAYOUT)
    run.train(1)
    good = root / "iter_0000001"
    run.save(good)
    out: dict[str, Any] = {"files": sorted(path.name for path in good.iterdir())}
    state = run.pieces()
    out |= save_and_read(run, root)
    if rank == 0:
        # Offered as other whole iterations otherwise.
        for directory in root.glob("iter_000000[3-7]"):
            shutil.rmtree(directory)
    dist.barrier()
    run.load(good)
    for name, (damage, _) in DAMAGES.items():
        copy = root / "iter_0000002"
        if rank == 0:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(good, copy)
            damage(copy)
        dist.barrier()
        out[name] = attempt(run, copy)
    # As another program's checkpoint.
    if rank == 0:
        (copy / manifest.NAME).unlink()
    dist.barrier()
    with redirect_stdout(io.StringIO()) as printed:
        out["no manifest"] = attempt(run, copy) + attempt(run, copy)
    out["printed"] = printed.getvalue()
    if rank == 0:
        edit_manifest_version(good, copy)
    dist.barrier()
    # Verification off: the file's bits are Megatron's own business then.
    enable(verify=False)
    out["off"] = attempt(run, copy)
    enable()
    for name, other in {
        "other model": build("dense", LAYOUT, initialized=True),
        "fewer layers": build("moe", dataclasses.replace(LAYOUT, config={"num_layers": 1}), initialized=True),
        "wrong dtype": build("moe", LAYOUT, dtype=torch.bfloat16, initialized=True),
        "other variant": build("moe", LAYOUT, muon=dataclasses.replace(EXACT, variant="normuon"), initialized=True),
        "momentum in bf16": build(
            "moe", LAYOUT, muon=dataclasses.replace(EXACT, momentum_dtype="bf16"), initialized=True
        ),
    }.items():
        out[name] = attempt(other, good)
    out["good"] = attempt(run, good)
    out["same"] = all(torch.equal(a[-1], b[-1]) for a, b in zip(state, run.pieces(), strict=True))
    return out


MODELS = {
    "other model": "missing, expected shape",
    "fewer layers": "decoder.layers.1.* more: got a tensor that this run's model does not have",
    "wrong dtype": "got float32, expected bfloat16; give the run the checkpoint's dtype",
    "other variant": "optimizer.state.second_moment.*: missing, expected",
}


def test_every_rank_refuses_what_is_damaged_or_anothers(tmp_path: Path) -> None:
    """The same error on each, whoever has read the damaged file, and the processes go on: none hangs."""
    results = run_ranks(load_damaged, 2, tmp_path)
    assert results[0]["files"] == [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json", manifest.NAME]
    for name, message in {**{name: text for name, (_, text) in DAMAGES.items()}, **MODELS}.items():
        texts = [result[name] for result in results]
        assert texts[0] == texts[1], name
        at = 0
        for part in message.split("*"):
            assert part in texts[0][at:], f"{name}: {texts[0]}"
            at = texts[0].index(part, at) + len(part)
    assert "write 1 into" in results[0]["truncated shard"]
    check_saves(results)
    line = f"megatron_muon: {tmp_path / 'iter_0000002'}: has no {manifest.NAME}, so it is loaded unverified\n"
    assert [result["printed"].count(line) for result in results] == [1, 0]
    for result in results:
        assert result["no manifest"] == ""
        assert (result["good"], result["off"], result["momentum in bf16"], result["same"]) == ("", "", "", True)


def check_saves(results: list[dict[str, Any]]) -> None:
    """A save reads back nothing but small files, unless it is told to; what is damaged then is found at the load."""
    assert sorted(name for result in results for name in result["read"]) == [".metadata", "metadata.json"]
    everything = [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json"]
    assert sorted(name for result in results for name in result["read and verified"]) == everything
    for result in results:
        assert (result["flipped"], result["verified"]) == ("", "")
        assert "__1_0.distcp: its checksum is not the one it was saved with" in result["flipped, loaded"]
        assert re.search(r"__1_0.distcp: got 30000 bytes, wrote \d+", result["torn"])
        assert "__1_0.distcp: does not read back as it was written" in result["flipped, verified"]
