"""Writes a `torch_dist` checkpoint archive by archive, and reads back what it wrote."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_muon.checkpoints.digest import DigestWriter, FileEntry, checksum
from megatron_muon.checkpoints.manifest import Manifest
from megatron_muon.checkpoints.reader import BACKEND, METADATA

_COPY_BYTES = 1 << 20
# A file is closed when it has grown past this, so that one damaged file does not cost everything.
_FILE_BYTES = 4 << 30
# torch.save copies what it writes, so that a chunk is written in pieces.
_PIECE_BYTES = 32 << 20


class CheckpointWriter:
    """Writes a checkpoint into a new directory. Call `finish` last: without it there is no checkpoint.

    Args:
        directory: New directory for the iteration.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self._entries: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._files: dict[str, FileEntry] = {}
        self._out: DigestWriter | None = None

    def copy(self, index: MetadataIndex, stream: IO[bytes], tensor: TensorStorageMetadata | None = None) -> None:
        """Copies an archive as it is, under the key of `index`; `tensor` has the dtype and shape of a tensor."""
        with self._archive(index) as out:
            shutil.copyfileobj(stream, out, _COPY_BYTES)
        self._register(index, tensor)

    def add(self, index: MetadataIndex, chunk: Tensor, size: torch.Size) -> None:
        """Writes a chunk of a tensor of shape `size`; large ones in pieces along their first axis."""
        assert index.offset is not None
        rows = chunk.shape[0] if chunk.dim() else 1
        row_bytes = max(1, chunk.numel() * chunk.element_size() // max(1, rows))
        step = max(1, _PIECE_BYTES // row_bytes)
        for start in range(0, rows, step):
            piece = chunk[start : start + step] if rows > step else chunk
            offsets = torch.Size((index.offset[0] + start, *index.offset[1:]) if chunk.dim() else ())
            at = MetadataIndex(index.fqn, offsets)
            with self._archive(at) as out:
                # A view would be saved with its whole storage.
                torch.save(piece.clone() if rows > step else piece, out)
            properties = TensorProperties(dtype=piece.dtype)
            self._register(at, TensorStorageMetadata(properties, size, [ChunkStorageMetadata(offsets, piece.shape)]))

    def add_object(self, key: str, value: Any) -> None:
        """Writes an object as Megatron does, in a list."""
        buffer = io.BytesIO()
        torch.save([value], buffer)
        buffer.seek(0)
        self.copy(MetadataIndex(key), buffer)

    def finish(self, backend: bytes, optimizer: Mapping[str, str] | None = None) -> None:
        """Writes the metadata, reads everything back, and writes the manifest.

        Args:
            backend: Content of `metadata.json`.
            optimizer: Name of the optimizer that wrote the state, for the manifest; None: no manifest is written.

        Raises:
            RuntimeError: If what is read differs from what was written.
        """
        self._close()
        # checkpoint_id and the like name the source's place; a checkpoint can be read without.
        content = pickle.dumps(Metadata(self._entries, storage_data=self._storage))
        for name, data in ((METADATA, content), (BACKEND, backend)):
            self._out = DigestWriter((self.directory / name).open("wb"))
            self._out.write(data)
            self._close()
        for name, entry in self._files.items():
            if checksum(self.directory / name) != entry:
                raise RuntimeError(
                    f"{self.directory / name}: does not read back as it was written; check the disk and try again"
                )
        if optimizer is not None:
            Manifest.of(self.directory, self._files, optimizer).write(self.directory)

    @contextmanager
    def _archive(self, index: MetadataIndex) -> Iterator[Any]:
        """The file to append an archive to; a new one when the last has grown large."""
        if self._out is None or self._out.tell() > _FILE_BYTES:
            self._close()
            self._out = DigestWriter((self.directory / f"__0_{len(self._files)}.distcp").open("wb"))
        offset = self._out.tell()
        yield self._out
        self._storage[index] = _StorageInfo(Path(self._out.name).name, offset, self._out.tell() - offset)

    def _register(self, index: MetadataIndex, tensor: TensorStorageMetadata | None) -> None:
        if tensor is None:
            self._entries[index.fqn] = BytesStorageMetadata()
            return
        entry = self._entries.setdefault(index.fqn, TensorStorageMetadata(tensor.properties, tensor.size, []))
        entry.chunks += [chunk for chunk in tensor.chunks if chunk.offsets == index.offset]

    def _close(self) -> None:
        if self._out is not None:
            self._out.flush()
            os.fsync(self._out.fileno())
            self._out.close()
            self._files[Path(self._out.name).name] = self._out.entry()
            self._out = None


@contextmanager
def written_whole(target: Path, name: str) -> Iterator[Path]:
    """A new directory to write into, renamed to `target` at the end and removed if anything fails.

    So `target` is either whole or not there.

    Args:
        target: The directory that must not exist yet.
        name: What the command line calls it, for messages.

    Raises:
        ValueError: If `target`, or the partial directory of another attempt, exists.
    """
    partial = target.with_name(f".{target.name}.partial")
    for path in (target, partial):
        if path.exists():
            raise ValueError(f"{name}: got {path}, which exists, expected a new directory; remove it, or name another")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_space(directory: Path, name: str, nbytes: int) -> None:
    """Raises ValueError if the disk of `directory` (`name` on the command line) has less than `nbytes` free."""
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise ValueError(
            f"{name}: got {free} bytes free on the disk, expected {nbytes} or more; free some, or name another"
        )
