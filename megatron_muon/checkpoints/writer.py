"""Writes a `torch_dist` checkpoint archive by archive, and reads back what it wrote."""

from __future__ import annotations

import io
import os
import pickle
import zlib
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

from megatron_muon.checkpoints.reader import BACKEND, METADATA

_COPY_BYTES = 1 << 20
# A file is closed when it has grown past this, so that one damaged file does not cost everything.
_FILE_BYTES = 4 << 30
# torch.save copies what it writes, so that a chunk is written in pieces.
_PIECE_BYTES = 32 << 20


class CheckpointWriter:
    """Writes into a directory of its own. Call `finish` last: without it there is no checkpoint.

    Args:
        directory: New directory for the iteration.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self._entries: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._checksums: dict[MetadataIndex, int] = {}
        self._number = -1
        self._stream: _Checksummed | None = None

    def copy(self, index: MetadataIndex, stream: IO[bytes], tensor: TensorStorageMetadata | None = None) -> None:
        """Copies an archive as it is, under the key of `index`; `tensor` tells the dtype and shape of a tensor's."""
        out, offset = self._begin()
        while block := stream.read(_COPY_BYTES):
            out.write(block)
        self._end(index, out, offset)
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
            out, offset = self._begin()
            # A view would be saved with its whole storage.
            torch.save(piece.clone() if rows > step else piece, out)
            self._end(at, out, offset)
            properties = TensorProperties(dtype=piece.dtype)
            self._register(at, TensorStorageMetadata(properties, size, [ChunkStorageMetadata(offsets, piece.shape)]))

    def add_object(self, key: str, value: Any) -> None:
        """Writes an object as Megatron does, in a list."""
        buffer = io.BytesIO()
        torch.save([value], buffer)
        buffer.seek(0)
        self.copy(MetadataIndex(key), buffer)

    def finish(self, backend: bytes) -> None:
        """Reads everything back, then writes the metadata.

        Args:
            backend: Content of `metadata.json`.

        Raises:
            RuntimeError: If what is read differs from what was written.
        """
        self._close()
        for index, info in self._storage.items():
            path = self.directory / info.relative_path
            if _checksum(path, info.offset, info.length) != self._checksums[index]:
                raise RuntimeError(
                    f"{path}: {index.fqn} does not read back as it was written; check the disk and convert again"
                )
        # checkpoint_id and the like name the source's place; a checkpoint can be read without.
        content = pickle.dumps(Metadata(self._entries, storage_data=self._storage))
        for name, data in ((METADATA, content), (BACKEND, backend)):
            with (self.directory / name).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())

    def _begin(self) -> tuple[_Checksummed, int]:
        if self._stream is None or self._stream.tell() > _FILE_BYTES:
            self._close()
            self._number += 1
            self._stream = _Checksummed((self.directory / f"__0_{self._number}.distcp").open("wb"))
        self._stream.checksum = 0
        return self._stream, self._stream.tell()

    def _end(self, index: MetadataIndex, out: _Checksummed, offset: int) -> None:
        self._storage[index] = _StorageInfo(Path(out.name).name, offset, out.tell() - offset)
        self._checksums[index] = out.checksum

    def _register(self, index: MetadataIndex, tensor: TensorStorageMetadata | None) -> None:
        if tensor is None:
            self._entries[index.fqn] = BytesStorageMetadata()
            return
        entry = self._entries.setdefault(index.fqn, TensorStorageMetadata(tensor.properties, tensor.size, []))
        entry.chunks += [chunk for chunk in tensor.chunks if chunk.offsets == index.offset]

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None


class _Checksummed:
    """A file that adds up the CRC-32 of what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.name, self.checksum = stream, stream.name, 0

    def write(self, data: Any) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _checksum(path: Path, offset: int, length: int) -> int:
    value = 0
    with path.open("rb") as stream:
        stream.seek(offset)
        while length and (block := stream.read(min(_COPY_BYTES, length))):
            value = zlib.crc32(block, value)
            length -= len(block)
    return value
