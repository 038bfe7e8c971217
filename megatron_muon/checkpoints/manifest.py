"""The manifest of a checkpoint: what a finished iteration consists of, so that damage is found before it is loaded.

A JSON file beside the others in the iteration's directory, written last, under another name and renamed. It holds size
and checksum of every file, and shape and dtype of every tensor. It finds accidents; it is not signed, and protects
against nobody who can write to the checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_muon.checkpoints.contents import model_keys
from megatron_muon.checkpoints.reader import METADATA, TRACKER, Checkpoint

NAME = "muon_manifest.json"
FORMAT = "megatron_muon checkpoint manifest"
VERSION = 1
SKIP = "--muon-no-verify-checkpoint to load it unverified"
_READ_BYTES = 1 << 20
# As long as MD5's: accidents are to be found, not adversaries.
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes, and BLAKE2b checksum of 16 bytes in hexadecimal."""

    bytes: int
    checksum: str


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's whole shape, and its dtype without `torch.`; `any_shape` where a load may cut or pad it."""

    shape: tuple[int, ...]
    dtype: str
    any_shape: bool = False


@dataclass(frozen=True)
class Manifest:
    """What a finished iteration consists of.

    Attributes:
        files: By path relative to the iteration's directory, with slashes.
        tensors: By key; None where the format does not list them (legacy files).
        optimizer: Which optimizer wrote it, and with which variant, for messages.
    """

    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry] | None = None
    optimizer: Mapping[str, str] | None = None

    def write(self, directory: Path) -> None:
        """Writes it into the iteration's directory: it is there whole or not at all.

        Raises:
            OSError: If the disk is full or fails. Nothing is left behind then.
        """
        tensors = self.tensors
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "optimizer": dict(self.optimizer or {}),
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
            "tensors": None if tensors is None else {k: [list(t.shape), t.dtype] for k, t in sorted(tensors.items())},
        }
        partial = directory / f".{NAME}.partial"
        try:
            with partial.open("w", encoding="utf-8") as stream:
                json.dump({**body, "digest": _digest(body)}, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(directory / NAME)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_directory(directory)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of an iteration; None if it has none, as those of other programs.

    Raises:
        ValueError: If it is damaged, names a file outside the directory, or is of a newer format.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_bytes())
        form, version = body["format"], body["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}), {_DAMAGED_MANIFEST}") from error
    if form != FORMAT or not isinstance(version, int) or version < 1:
        raise ValueError(f"{path}: got format {form!r}, version {version!r}, expected {FORMAT!r}; {_DAMAGED_MANIFEST}")
    if version > VERSION:
        raise ValueError(
            f"{path}: got format version {version}, expected at most {VERSION}: a newer megatron_muon wrote it; "
            f"install that one, or add {SKIP}"
        )
    if body.pop("digest", None) != _digest(body):
        raise ValueError(f"{path}: its content does not fit its digest, {_DAMAGED_MANIFEST}")
    for name in body["files"]:
        _check_inside(directory, name)
    tensors = body["tensors"]
    return Manifest(
        files={name: FileEntry(**entry) for name, entry in body["files"].items()},
        tensors=None if tensors is None else {k: TensorEntry(tuple(shape), d) for k, (shape, d) in tensors.items()},
        optimizer=body["optimizer"],
    )


_DAMAGED_MANIFEST = f"expected a manifest as it was written; it is damaged. Load another iteration, or add {SKIP}"


def sizes(directory: Path) -> dict[str, int]:
    """Size in bytes of each file of an iteration but the manifest, by relative path with slashes. Raises OSError."""
    found = {path for path in directory.rglob("*") if path.is_file()}
    # Listings of a network file system may lag behind; what the metadata names must be there.
    found |= {directory / name for name, _, _, _ in _chunks(directory)}
    found -= {directory / NAME, directory / f".{NAME}.partial"}
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in found}


def checksum(path: Path) -> FileEntry:
    """Reads a file once, in pieces. Raises OSError."""
    digest, size = hashlib.blake2b(digest_size=_DIGEST_BYTES), 0
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def shares(file_sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Splits files over `count` readers of about equally many bytes; the same everywhere."""
    out: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(file_sizes, key=lambda name: (-file_sizes[name], name)):
        at = loads.index(min(loads))
        out[at].append(name)
        loads[at] += file_sizes[name]
    return out


def tensors_of(directory: Path) -> dict[str, TensorEntry] | None:
    """Shape and dtype of each tensor of a `torch_dist` checkpoint; None where it is of another format.

    Raises:
        ValueError: If its metadata is damaged or names anything but torch's own classes.
    """
    if not (directory / METADATA).is_file():
        return None
    return {
        key: TensorEntry(tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for key, entry in Checkpoint(directory).tensors.items()
    }


def manifest_of(directory: Path, optimizer: str) -> Manifest:
    """The manifest of a finished iteration, every file of which is read. Raises OSError, and as `tensors_of`."""
    entries = {name: checksum(directory / name) for name in sizes(directory)}
    return Manifest(entries, tensors_of(directory), {"optimizer": optimizer})


def file_problem(directory: Path, name: str, entry: FileEntry, *, contents: bool = True) -> str | None:
    """What is wrong with a file, and which tensors it costs; None if nothing.

    Args:
        directory: The iteration's.
        name: Of the file.
        entry: What the manifest says of it.
        contents: Whether to read it; if not, only its presence and size are looked at.
    """
    path = directory / name
    try:
        size = path.stat().st_size
        if size == entry.bytes and (not contents or checksum(path) == entry):
            return None
    except FileNotFoundError:
        return f"{path}: missing, expected {entry.bytes} bytes{_lost(directory, name, 0)}"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror}), expected {entry.bytes} bytes"
    if size != entry.bytes:
        what = "truncated" if size < entry.bytes else "written to by something else"
        return f"{path}: got {size} bytes, expected {entry.bytes}: {what}{_lost(directory, name, size)}"
    return f"{path}: its checksum is not the one it was saved with: bits have changed{_damaged(directory, name)}"


def remedy(directory: Path) -> str:
    """What to do about a damaged iteration: names another that is whole, as far as sizes tell."""
    other = newest_whole(directory.parent, besides=directory.name)
    if other is None:
        return f"restore the file from a copy, or load another checkpoint; {SKIP} is for what must be rescued"
    return (
        f"restore the file from a copy, or go on from iteration {other}, the newest other one that has all its files: "
        f"write {other} into {directory.parent / TRACKER}"
    )


def newest_whole(run: Path, besides: str = "") -> int | None:
    """The newest iteration of a run's directory whose manifest's files are there in their sizes; None if there is none.

    Args:
        run: The directory that holds the iterations.
        besides: Name of a directory to leave out.
    """
    found = sorted((path for path in run.glob("iter_*") if path.name != besides), reverse=True)
    for directory in found:
        number = directory.name.removeprefix("iter_")
        if not number.isdecimal():
            continue
        try:
            manifest = read_manifest(directory)
        except ValueError:
            continue
        if manifest is not None and not any(
            file_problem(directory, name, entry, contents=False) for name, entry in manifest.files.items()
        ):
            return int(number)
    return None


def model_problem(
    directory: Path, manifest: Manifest, wanted: Mapping[str, TensorEntry], *, resumes: bool
) -> str | None:
    """Says why a checkpoint is not one of this run's model; None if it is.

    Flat buckets, which only their own layout can read, are not looked at, and of optimizer state no dtype: the dtype of
    momentum is a setting.

    Args:
        directory: The iteration's, for messages.
        manifest: Its manifest.
        wanted: What the run asks for, by key; a rank's part of it is enough.
        resumes: Whether optimizer state is asked for. Weights alone may change their dtype.
    """
    stored = manifest.tensors
    if stored is None:
        return None
    of_model = (
        "it is a checkpoint of another model; give the run the model's flags it was saved with, or another --load"
    )
    for key in sorted(wanted):
        want, got = wanted[key], stored.get(key)
        state = is_optimizer_state(key)
        if state and not key.startswith("optimizer.state."):
            continue
        if got is None:
            if state and key.split(".", 3)[3] in stored:
                wrote = " ".join(f"{k} {v}" for k, v in (manifest.optimizer or {}).items())
                return (
                    f"{directory}: {key}: missing, expected shape {want.shape}; the checkpoint's optimizer has no such "
                    f"state ({wrote}). Choose the flags it was saved with, or add --no-load-optim"
                )
            return f"{directory}: {key}: missing, expected shape {want.shape}; {of_model}"
        if got.shape != want.shape and not want.any_shape:
            return f"{directory}: {key}: got shape {got.shape}, expected {want.shape}; {of_model}"
        if resumes and not state and got.dtype != want.dtype:
            return (
                f"{directory}: {key}: got {got.dtype}, expected {want.dtype}; give the run the checkpoint's dtype "
                "(--bf16, --fp16, or neither), or add --no-load-optim to start from its weights in another one"
            )
    return None


def unwanted_problem(directory: Path, manifest: Manifest, wanted: Iterable[str]) -> str | None:
    """Says which of the model's tensors in a checkpoint a run has no use for; None if there are none.

    Args:
        directory: The iteration's, for messages.
        manifest: Its manifest.
        wanted: Keys that any rank of the run asks for.
    """
    left = sorted(set(model_keys(manifest.tensors or {})) - set(wanted))
    if not left:
        return None
    return (
        f"{directory}: {left[0]}{f' and {len(left) - 1} more' if left[1:] else ''}: got a tensor that this run's model "
        "has not; it is a checkpoint of another model; give the run the model's flags it was saved with, or "
        "--no-load-optim to take the weights that fit"
    )


def is_optimizer_state(key: str) -> bool:
    """Whether a tensor's key is that of optimizer state, in any of Megatron's formats."""
    return not model_keys([key])


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES).hexdigest()


def _check_inside(directory: Path, name: str) -> None:
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if not inside or not (directory / name).resolve().is_relative_to(directory.resolve()):
        raise ValueError(
            f"{directory / NAME}: got the file name {name!r}, expected one inside the checkpoint; do not use a "
            "checkpoint from this source"
        )


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _chunks(directory: Path, name: str | None = None) -> list[tuple[str, str, int, int]]:
    """File, key, offset and length in bytes of what a `torch_dist` checkpoint holds, of one file or all.

    Empty where nothing is known: of another format, or with damaged metadata.
    """
    if name == METADATA or not (directory / METADATA).is_file():
        return []
    try:
        storage = Checkpoint(directory).metadata.storage_data or {}
    except ValueError:
        return []
    found = [(info.relative_path, index.fqn, info.offset, info.length) for index, info in storage.items()]
    return sorted((chunk for chunk in found if name in (None, chunk[0])), key=lambda chunk: (chunk[0], chunk[2]))


def _lost(directory: Path, name: str, size: int) -> str:
    return named([key for _, key, offset, length in _chunks(directory, name) if offset + length > size], "lost")


def _damaged(directory: Path, name: str) -> str:
    """Names the tensors whose archives do not fit the checksums that torch.save puts into them."""
    bad = []
    with (directory / name).open("rb") as stream:
        for _, key, offset, length in _chunks(directory, name):
            stream.seek(offset)
            try:
                archive = zipfile.ZipFile(io.BytesIO(stream.read(length)))
                if archive.testzip() is not None:
                    bad.append(key)
            # A damaged archive can raise nearly anything.
            except Exception:
                bad.append(key)
    return named(bad, "damaged")


def named(keys: Sequence[str], what: str) -> str:
    """The end of a message: the first of some tensors, and how many more there are."""
    unique = list(dict.fromkeys(keys))
    if not unique:
        return ""
    return f"; {what}: {unique[0]}{f' and {len(unique) - 1} more' if unique[1:] else ''}"
