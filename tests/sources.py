"""Megatron-LM's published source trees, beside this repository; tests that need one are skipped without."""

from __future__ import annotations

import importlib.metadata
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.paths import ROOT

SOURCES = ROOT.parent / "shared" / "sources"
# Minor version of megatron-core -> the archive of its tree.
TREES = {"0.18": "megatron-lm-0.18.2", "0.19": "megatron-lm-0.19.0", "0.20": "megatron-lm-0.20-dev-d98e8a6"}
INSTALLED = importlib.metadata.version("megatron-core")[:4]


def unpack(version: str, directory: Path, members: Sequence[str] = ()) -> Path:
    """Unpacks a source tree, or files of it, into a directory and returns the tree's root."""
    name = TREES[version]
    archive = SOURCES / f"{name}.tar.xz"
    if not archive.is_file():
        pytest.skip(f"the source tree {archive.name} is not in ../shared/sources beside the repository")
    with tarfile.open(archive) as tree:
        tree.extractall(directory, [tree.getmember(f"{name}/{m}") for m in members] or None, filter="data")
    return directory / name
