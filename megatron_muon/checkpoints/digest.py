"""Size and checksum of a file: of one that is read, or of one that is being written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_READ_BYTES = 1 << 20
# As long as MD5's: the checksum finds accidents, not adversaries.
DIGEST_BYTES = 16


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes, and BLAKE2b checksum of 16 bytes in hexadecimal."""

    bytes: int
    checksum: str


class DigestWriter:
    """A file open for writing that digests every byte on its way to the file.

    It can only be appended to, which is how `torch.save` writes.

    Args:
        stream: The file, opened for binary writing, at its start.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._digest, self._bytes = stream, hashlib.blake2b(digest_size=DIGEST_BYTES), 0

    def write(self, data: Any) -> int:
        """Appends `data`; returns its size in bytes."""
        self._digest.update(data)
        self._bytes += memoryview(data).nbytes
        return self._stream.write(data)

    def entry(self) -> FileEntry:
        """Size and checksum of what has been written so far."""
        return FileEntry(self._bytes, self._digest.hexdigest())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def checksum(path: Path) -> FileEntry:
    """Reads a file once, in pieces. Raises OSError."""
    digest, size = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())
