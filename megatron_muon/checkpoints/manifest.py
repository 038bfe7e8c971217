"""The manifest of a checkpoint: what a finished iteration consists of, so that damage is found before it is loaded.

A JSON file in the iteration's directory, written last, under another name, and renamed. It holds size and checksum of
every file, and shape and dtype of every tensor. It finds accidents; it is not signed and does not protect against
somebody who can write to the checkpoint.
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

from megatron_muon.checkpoints.contents import and_more, is_optimizer_state, model_keys
from megatron_muon.checkpoints.digest import DIGEST_BYTES, FileEntry, checksum
from megatron_muon.checkpoints.reader import METADATA, TRACKER, Checkpoint, dtype_name

NAME = "muon_manifest.json"
FORMAT = "megatron_muon checkpoint manifest"
VERSION = 1
SKIP = "--muon-no-verify-checkpoint to load it unverified"


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
        files: Files by path relative to the iteration's directory, with slashes.
        tensors: Tensors by key; None where the format does not list them (legacy files).
        optimizer: Name and variant of the optimizer that wrote the checkpoint, for messages.
    """

    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry] | None = None
    optimizer: Mapping[str, str] | None = None

    @classmethod
    def of(cls, directory: Path, files: Mapping[str, FileEntry], optimizer: Mapping[str, str]) -> Manifest:
        """The manifest of a finished iteration; the tensors are read from its metadata.

        Raises:
            ValueError: If the metadata is damaged or names anything but torch's own classes.
        """
        if not (directory / METADATA).is_file():
            return cls(files, None, optimizer)
        tensors = {
            key: TensorEntry(tuple(entry.size), dtype_name(entry.properties.dtype))
            for key, entry in Checkpoint(directory).tensors.items()
        }
        return cls(files, tensors, optimizer)

    def write(self, directory: Path) -> None:
        """Writes the manifest into the iteration's directory: it is there whole or not at all.

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
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of an iteration; None if it has none, as in checkpoints of other programs.

    Raises:
        ValueError: If it is damaged, names a file outside the directory, or has a newer format.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    damaged = f"expected a manifest as it was written; it is damaged. Load another iteration, or add {SKIP}"
    try:
        body = json.loads(path.read_bytes())
        form, version = body["format"], body["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}), {damaged}") from error
    if form != FORMAT or not isinstance(version, int) or version < 1:
        raise ValueError(f"{path}: got format {form!r}, version {version!r}, expected {FORMAT!r}; {damaged}")
    if version > VERSION:
        raise ValueError(
            f"{path}: got format version {version}, expected at most {VERSION}: a newer megatron_muon wrote it; "
            f"install that one, or add {SKIP}"
        )
    if body.pop("digest", None) != _digest(body):
        raise ValueError(f"{path}: its content does not match its digest, {damaged}")
    for name in body["files"]:
        _check_inside(directory, name)
    tensors = body["tensors"]
    return Manifest(
        files={name: FileEntry(**entry) for name, entry in body["files"].items()},
        tensors=None if tensors is None else {k: TensorEntry(tuple(shape), d) for k, (shape, d) in tensors.items()},
        optimizer=body["optimizer"],
    )


def file_sizes(directory: Path) -> dict[str, int]:
    """Size in bytes of each file of an iteration but the manifest, by relative path with slashes. Raises OSError."""
    found = {path for path in directory.rglob("*") if path.is_file()}
    # Listings of a network file system may lag behind; what the metadata names must be there.
    found |= {directory / name for name, _, _, _ in _archives(directory)}
    found -= {directory / NAME, directory / f".{NAME}.partial"}
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in found}


def split_evenly(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Splits files over `count` readers of about equally many bytes; the result is the same on every rank."""
    out: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        at = loads.index(min(loads))
        out[at].append(name)
        loads[at] += sizes[name]
    return out


def file_problem(directory: Path, name: str, entry: FileEntry, *, contents: bool = True) -> str | None:
    """Says what is wrong with a file and which tensors are lost; None if the file is as it was written.

    Args:
        directory: The iteration's.
        name: Relative path of the file.
        entry: Size and checksum that the manifest has for it.
        contents: Whether to read the file; if not, only its presence and size are checked.
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
    """What to do about a damaged iteration: names another one that is whole, judging by sizes."""
    other = newest_whole(directory.parent, besides=directory.name)
    if other is None:
        return f"restore the file from a copy, or load another checkpoint; {SKIP} is for what must be rescued"
    return (
        f"restore the file from a copy, or resume from iteration {other}, the newest other one that has all its files: "
        f"write {other} into {directory.parent / TRACKER}"
    )


def newest_whole(run: Path, besides: str = "") -> int | None:
    """The newest iteration of a run with all files of its manifest in their sizes; None if there is none.

    Args:
        run: The directory that holds the iterations.
        besides: Name of a directory to leave out.
    """
    for directory in sorted((path for path in run.glob("iter_*") if path.name != besides), reverse=True):
        number = directory.name.removeprefix("iter_")
        try:
            manifest = read_manifest(directory) if number.isdecimal() else None
        except ValueError:
            continue
        if manifest is not None and not any(
            file_problem(directory, name, entry, contents=False) for name, entry in manifest.files.items()
        ):
            return int(number)
    return None


_OF_ANOTHER_MODEL = (
    "it is a checkpoint of another model; give the run the model's flags it was saved with, or another --load"
)


def model_problem(
    directory: Path, manifest: Manifest, wanted: Mapping[str, TensorEntry], *, resumes: bool
) -> str | None:
    """Says why a checkpoint is not one of this run's model; None if it is.

    Flat buckets, which only their own layout can read, are not compared, nor is the dtype of optimizer state: the dtype
    of momentum is a setting.

    Args:
        directory: The iteration's, for messages.
        manifest: Its manifest.
        wanted: What the run asks for, by key; a rank's part of it is enough.
        resumes: Whether optimizer state is asked for. Weights alone may change their dtype.
    """
    stored = manifest.tensors
    if stored is None:
        return None
    for key in sorted(wanted):
        want, got, state = wanted[key], stored.get(key), is_optimizer_state(key)
        if state and not key.startswith("optimizer.state."):
            continue
        if got is None and state and key.split(".", 3)[3] in stored:
            wrote = " ".join(f"{k} {v}" for k, v in (manifest.optimizer or {}).items())
            return (
                f"{directory}: {key}: missing, expected shape {want.shape}; the checkpoint's optimizer has no such "
                f"state ({wrote}). Choose the flags it was saved with, or add --no-load-optim"
            )
        if got is None:
            return f"{directory}: {key}: missing, expected shape {want.shape}; {_OF_ANOTHER_MODEL}"
        if got.shape != want.shape and not want.any_shape:
            return f"{directory}: {key}: got shape {got.shape}, expected {want.shape}; {_OF_ANOTHER_MODEL}"
        if resumes and not state and got.dtype != want.dtype:
            return (
                f"{directory}: {key}: got {got.dtype}, expected {want.dtype}; give the run the checkpoint's dtype "
                "(--bf16, --fp16, or neither), or add --no-load-optim to start from its weights in another one"
            )
    return None


def unwanted_problem(directory: Path, manifest: Manifest, wanted: Iterable[str]) -> str | None:
    """Names the model's tensors in a checkpoint that no rank of the run asks for; None if there are none.

    Args:
        directory: The iteration's, for messages.
        manifest: Its manifest.
        wanted: Keys that any rank of the run asks for.
    """
    left = sorted(set(model_keys(manifest.tensors or {})) - set(wanted))
    if not left:
        return None
    return (
        f"{directory}: {and_more(left)}: got a tensor that this run's model does not have; it is a checkpoint of "
        "another model; give the run the model's flags it was saved with, or --no-load-optim to take the weights that "
        "fit"
    )


def named(keys: Sequence[str], what: str) -> str:
    """The end of a message: the first of some tensors and the number of others, or nothing if there are none."""
    return f"; {what}: {and_more(list(dict.fromkeys(keys)))}" if keys else ""


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).hexdigest()


def _check_inside(directory: Path, name: str) -> None:
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if not inside or not (directory / name).resolve().is_relative_to(directory.resolve()):
        raise ValueError(
            f"{directory / NAME}: got the file name {name!r}, expected one inside the checkpoint; do not use a "
            "checkpoint from this source"
        )


def _archives(directory: Path, name: str | None = None) -> list[tuple[str, str, int, int]]:
    """File, key, offset and length in bytes of each archive in a `torch_dist` checkpoint, of one file or all.

    Empty where the format is another one or the metadata is damaged.
    """
    if name == METADATA or not (directory / METADATA).is_file():
        return []
    try:
        storage = Checkpoint(directory).metadata.storage_data or {}
    except ValueError:
        return []
    found = [(info.relative_path, index.fqn, info.offset, info.length) for index, info in storage.items()]
    return sorted((archive for archive in found if name in (None, archive[0])), key=lambda item: (item[0], item[2]))


def _lost(directory: Path, name: str, size: int) -> str:
    return named([key for _, key, offset, length in _archives(directory, name) if offset + length > size], "lost")


def _damaged(directory: Path, name: str) -> str:
    """Names the tensors whose archives do not match the checksums that torch.save puts into them."""
    bad = []
    with (directory / name).open("rb") as stream:
        for _, key, offset, length in _archives(directory, name):
            stream.seek(offset)
            try:
                if zipfile.ZipFile(io.BytesIO(stream.read(length))).testzip() is not None:
                    bad.append(key)
            # A damaged archive can raise nearly anything.
            except Exception:
                bad.append(key)
    return named(bad, "damaged")
