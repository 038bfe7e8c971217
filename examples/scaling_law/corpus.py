"""The corpus: Python sources of the standard library and of installed packages, as Megatron's indexed datasets.

A document is one file, a token is one byte, and byte 0 ends a document. Files with the same content count once. Every
twentieth file is held out by the hash of its content, so that a file never changes sides when packages come or go, and
the held-out set shares no file with training.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stdlib_corpus import END_OF_DOCUMENT, SKIPPED_DIRECTORIES, Split, source_files, write_dataset

DESCRIPTION = "corpus.json"
HELD_OUT_EVERY = 20
# Tables of numbers and generated code are not text that a model of this size should learn from.
LARGEST_FILE_BYTES = 200_000


def documents(packages: Iterable[str] = ()) -> Iterator[bytes]:
    """The contents of the files, each content once, in an order that depends on the contents alone.

    Args:
        packages: Installed packages besides the standard library.

    Raises:
        ValueError: If a package is not installed.
    """
    paths = sysconfig.get_paths()
    files = source_files(Path(paths["stdlib"]))
    for package in packages:
        root = Path(paths["purelib"]) / package
        if not root.is_dir():
            raise ValueError(f"corpus: got package {package}, expected one that is installed; pip install it")
        inside = ((path, path.relative_to(root)) for path in root.rglob("*.py"))
        files += [path for path, name in inside if SKIPPED_DIRECTORIES.isdisjoint(name.parts[:-1])]
    found: dict[str, bytes] = {}
    for path in files:
        content = path.read_bytes()
        if 0 < len(content) <= LARGEST_FILE_BYTES and END_OF_DOCUMENT not in content:
            found.setdefault(hashlib.sha256(content).hexdigest(), content)
    return (found[digest] for digest in sorted(found))


def held_out(content: bytes) -> bool:
    """Whether a file belongs to the validation set."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % HELD_OUT_EVERY == 0


def prepare(directory: Path, packages: Iterable[str] = ()) -> list[Split]:
    """Writes `train` and `valid` into `directory` and what they hold into its `corpus.json`.

    Raises:
        ValueError: If a package is not installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sides: dict[str, list[bytes]] = {"train": [], "valid": []}
    for content in documents(packages):
        sides["valid" if held_out(content) else "train"].append(content)
    splits = [write_dataset(contents, directory / name) for name, contents in sides.items()]
    description = [vars(split) | {"packages": list(packages)} for split in splits]
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return splits


if __name__ == "__main__":
    for made in prepare(Path(sys.argv[1]), sys.argv[2:]):
        print(f"{made.name}: {made.files} files, {made.num_bytes} bytes, sha256 {made.sha256[:12]}...")
