"""The Python standard library's own source text as two Megatron indexed datasets of bytes, `train` and `valid`.

    python examples/stdlib_corpus.py runs/corpus

    train: 533 files, 8772614 bytes, sha256 93c7b848bb67...
    valid: 28 files, 540753 bytes, sha256 5471ba33d799...

A file is a document: its bytes, then one byte 0, which no Python source holds. Every 20th file is held out for
validation. The same interpreter always gives the same bytes; another patch release gives slightly other ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

END_OF_DOCUMENT = b"\0"
DESCRIPTION = "corpus.json"
HELD_OUT_EVERY = 20
HELD_OUT_FIRST = 10

# Tests and third-party packages are not installed with every interpreter; encodings and pydoc_data are generated
# tables; _sysconfigdata* tells of the machine that built the interpreter.
SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
)
SKIPPED_PREFIXES = ("_sysconfigdata",)


@dataclass(frozen=True)
class Split:
    """One of the two datasets.

    Attributes:
        name: `train` or `valid`.
        files: Its number of documents.
        num_bytes: Its number of tokens, the documents' ends included.
        sha256: Of all its bytes.
    """

    name: str
    files: int
    num_bytes: int
    sha256: str


def source_files(root: Path) -> list[Path]:
    """The source files under `root`, without tests, tables and third-party packages, sorted by their path from it."""
    found = []
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if SKIPPED_DIRECTORIES.isdisjoint(inside.parts[:-1]) and not path.name.startswith(SKIPPED_PREFIXES):
            found.append(inside)
    return [root / inside for inside in sorted(found, key=lambda inside: inside.parts)]


def split_files(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Deals sorted files out to `train` and `valid`: every 20th is held out."""
    held_out = range(HELD_OUT_FIRST, len(files), HELD_OUT_EVERY)
    return {
        "train": [path for index, path in enumerate(files) if index not in held_out],
        "valid": [files[index] for index in held_out],
    }


def write_dataset(documents: Sequence[bytes], prefix: Path) -> Split:
    """Writes documents as the indexed dataset `prefix`.bin, `prefix`.idx.

    Raises:
        ValueError: If a document holds the byte that ends documents.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint8)
    digest = hashlib.sha256()
    num_bytes = 0
    for number, document in enumerate(documents):
        if END_OF_DOCUMENT in document:
            raise ValueError(f"document {number}: got a byte 0, expected text without; it marks the end of a document")
        tokens = np.frombuffer(document + END_OF_DOCUMENT, dtype=np.uint8)
        builder.add_document(tokens, [tokens.size])
        digest.update(tokens)
        num_bytes += tokens.size
    builder.finalize(get_idx_path(str(prefix)))
    return Split(prefix.name, len(documents), num_bytes, digest.hexdigest())


def prepare(directory: Path, root: Path | None = None) -> list[Split]:
    """Writes `train` and `valid` into `directory`, and what they hold into its `corpus.json`.

    Args:
        directory: Made if it does not exist; files of the same names are overwritten.
        root: Where the sources are; the running interpreter's standard library by default.

    Raises:
        ValueError: If there are too few sources to hold one out.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = source_files(root)
    if len(files) <= HELD_OUT_FIRST:
        raise ValueError(f"{root}: got {len(files)} Python sources, expected more than {HELD_OUT_FIRST}")
    directory.mkdir(parents=True, exist_ok=True)
    splits = [
        write_dataset([path.read_bytes() for path in paths], directory / name)
        for name, paths in split_files(files).items()
    ]
    (directory / DESCRIPTION).write_text(
        json.dumps([asdict(split) for split in splits], indent=2) + "\n", encoding="utf-8"
    )
    return splits


def main() -> None:
    """Prepares the datasets and says what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write train.bin, train.idx, valid.bin, valid.idx")
    for split in prepare(parser.parse_args().directory):
        print(f"{split.name}: {split.files} files, {split.num_bytes} bytes, sha256 {split.sha256[:12]}...")


if __name__ == "__main__":
    main()
