"""Reads Megatron's `torch_dist` checkpoints chunk by chunk, without running code that they may hold.

Such a checkpoint is a directory: `.metadata` (a pickle of torch.distributed.checkpoint's Metadata), `*.distcp` files
with one `torch.save` archive per chunk of a tensor, and `metadata.json`. Megatron's own settings lie in an archive
called `common_state`.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

# Called with the name of what is done next, its number, and how many there are.
Progress = Callable[[str, int, int], None]

TRACKER = "latest_checkpointed_iteration.txt"
BACKEND = "metadata.json"
METADATA = ".metadata"
COMMON = "common_state/shard_0_1"

# The only names that a pickle of Metadata may contain: plain data without side effects.
_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
            *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        )
    },
    **{
        (planner.__name__, name): getattr(planner, name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
        if hasattr(planner, name)
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    (filesystem.__name__, "_StoragePrefix"): filesystem._StoragePrefix,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
}
# Empty classes that Megatron's earlier versions put into the metadata.
_MEGATRON_MARKERS = re.compile(r"MCore(SavePlan|Metadata)")


def no_progress(name: str, number: int, count: int) -> None:
    """Shows nothing."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _CLASSES.get((module, name))
        if found is None and module == "torch":
            found = getattr(torch, name, None)
            found = found if isinstance(found, torch.dtype) else None
        if found is None and module.startswith("megatron.core.") and _MEGATRON_MARKERS.fullmatch(name):
            found = planner.SavePlan if name == "MCoreSavePlan" else metadata.Metadata
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found


class Checkpoint:
    """A `torch_dist` checkpoint of one iteration, opened for reading.

    Args:
        path: The directory of an iteration, or of a run; of a run the iteration that its tracker file names.

    Attributes:
        directory: The directory of the iteration.
        metadata: torch.distributed.checkpoint's, read without a plain unpickle.

    Raises:
        ValueError: If there is no such checkpoint, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.directory = iteration_directory(path)
        self.metadata = _read_metadata(self.directory)
        self._root = self.directory.resolve()
        self._kept: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Key -> shape, dtype and chunks of each tensor."""
        entries = self.metadata.state_dict_metadata
        return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    @property
    def objects(self) -> list[str]:
        """Keys of entries that are not tensors."""
        return [key for key, entry in self.metadata.state_dict_metadata.items() if key not in self.tensors]

    @cached_property
    def common(self) -> dict[str, Any]:
        """Megatron's settings and progress: args, iteration, parameter groups, schedule.

        Read with `weights_only`, which allows what Megatron-Core lists as safe.

        Raises:
            ValueError: If it is missing, damaged, or asks for a class that is not on that list.
        """
        from megatron.core.safe_globals import SAFE_GLOBALS

        legacy = self.directory / "common.pt"
        try:
            with torch.serialization.safe_globals(list(SAFE_GLOBALS)):
                if legacy.is_file():
                    return dict(torch.load(legacy, map_location="cpu", weights_only=True))
                with self.open(MetadataIndex(COMMON)) as stream:
                    return dict(torch.load(stream, map_location="cpu", weights_only=True)[0])
        except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, IndexError) as error:
            raise ValueError(
                f"{self.directory}: common_state cannot be read ({_first_line(error)}), expected Megatron's args and "
                "settings; the file is damaged or holds code. Use another iteration"
            ) from error

    def chunks(self, key: str) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        """Yields each stored chunk of a tensor with its place; one chunk is in memory at a time.

        Raises:
            ValueError: If a chunk is missing, damaged, or of another shape or dtype than the metadata says.
        """
        for chunk in self.tensors[key].chunks:
            yield chunk, self.chunk(key, chunk)

    def chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """One stored chunk of a tensor. Raises as `chunks`."""
        dtype = self.tensors[key].properties.dtype
        index = MetadataIndex(key, chunk.offsets)
        try:
            with self.open(index) as stream:
                tensor: Tensor = torch.load(stream, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{self.path(index)}: {key} at {tuple(chunk.offsets)} cannot be read ({_first_line(error)}), "
                "expected a tensor; the file is damaged. Use another iteration"
            ) from error
        got = (tuple(tensor.shape), tensor.dtype)
        if got != (tuple(chunk.sizes), dtype):
            raise ValueError(
                f"{self.path(index)}: {key} at {tuple(chunk.offsets)}: got shape {got[0]} and {got[1]}, expected "
                f"{tuple(chunk.sizes)} and {dtype} as {METADATA} says; use another iteration"
            )
        return tensor

    def region(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A part of a tensor, assembled from the chunks that overlap it.

        The chunks of the last region are kept, so that adjacent regions read each chunk once.

        Args:
            key: Key of the tensor.
            offsets: Start of the part along each axis.
            sizes: Shape of the part.

        Raises:
            ValueError: As `chunks`; or if the chunks do not cover the part.
        """
        out = torch.empty(tuple(sizes), dtype=self.tensors[key].properties.dtype)
        overlaps: dict[tuple[str, tuple[int, ...]], tuple[ChunkStorageMetadata, list[int], list[int]]] = {}
        for chunk in self.tensors[key].chunks:
            starts = [max(o, c) for o, c in zip(offsets, chunk.offsets)]
            stops = [min(o + n, c + m) for o, n, c, m in zip(offsets, sizes, chunk.offsets, chunk.sizes)]
            if all(start < stop for start, stop in zip(starts, stops)):
                overlaps[key, tuple(chunk.offsets)] = (chunk, starts, stops)
        # Frees the others before more are read.
        self._kept = {at: tensor for at, tensor in self._kept.items() if at in overlaps}
        covered = 0
        for at, (chunk, starts, stops) in overlaps.items():
            if at not in self._kept:
                self._kept[at] = self.chunk(key, chunk)
            here = tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, offsets))
            there = tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, chunk.offsets))
            out[here] = self._kept[at][there]
            covered += out[here].numel()
        if covered != out.numel():
            raise ValueError(
                f"{self.directory / METADATA}: {key}: its chunks cover {covered} of the {out.numel()} elements at "
                f"{tuple(offsets)}; the checkpoint is damaged. Use another iteration"
            )
        return out

    @contextmanager
    def open(self, index: MetadataIndex) -> Iterator[IO[bytes]]:
        """Opens a stream over the bytes of one chunk or object.

        Raises:
            ValueError: If its file is missing, too short, or outside the checkpoint.
        """
        path, offset, length = self.extent(index)
        with path.open("rb") as stream:
            yield _create_file_view(stream, offset, length)  # type: ignore[arg-type, misc]

    def extent(self, index: MetadataIndex) -> tuple[Path, int, int]:
        """File, offset and length in bytes of a chunk or object. Raises as `open`."""
        path = self.path(index)
        info = self._info(index)
        if info.transform_descriptors:
            raise ValueError(
                f"{path}: {index.fqn} is stored as {list(info.transform_descriptors)}, expected plain archives; "
                "save the checkpoint without storage transforms"
            )
        if not path.is_file():
            raise ValueError(f"{path}: missing, expected it to hold {index.fqn}; use another iteration, or a copy")
        size = path.stat().st_size
        if not 0 <= info.offset <= info.offset + info.length <= size:
            raise ValueError(
                f"{path}: has {size} bytes, expected {info.offset + info.length} or more for {index.fqn}; the file is "
                "truncated. Use another iteration, or a copy"
            )
        return path, info.offset, info.length

    def path(self, index: MetadataIndex) -> Path:
        """The file that holds a chunk or object. Raises ValueError if it would lie outside the checkpoint."""
        relative = self._info(index).relative_path
        path = self.directory / relative
        if not path.resolve().is_relative_to(self._root):
            raise ValueError(
                f"{self.directory / METADATA}: {index.fqn}: got the file {relative!r}, expected a file inside the "
                "checkpoint; do not use a checkpoint from this source"
            )
        return path

    def _info(self, index: MetadataIndex) -> filesystem._StorageInfo:
        info = (self.metadata.storage_data or {}).get(index)
        if info is None:
            raise ValueError(
                f"{self.directory / METADATA}: has no place for {index.fqn} at {index.offset}; the file is "
                "damaged. Use another iteration"
            )
        return info  # type: ignore[no-any-return]


def iteration_directory(path: Path) -> Path:
    """The directory of the iteration that `path` names: itself, or that of a run's tracker file.

    Raises:
        ValueError: If there is no `torch_dist` checkpoint.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: got no directory of this name, expected that of a run or of one of its checkpoints")
    tracker = path / TRACKER
    if tracker.is_file():
        name = tracker.read_text(encoding="utf-8").strip()
        if name != "release" and not name.isdecimal():
            raise ValueError(f"{tracker}: got {name[:40]!r}, expected an iteration or 'release'; correct the file")
        path = path / (name if name == "release" else f"iter_{int(name):07d}")
    if not (path / METADATA).is_file() or not (path / BACKEND).is_file():
        raise ValueError(
            f"{path}: got no {METADATA} and {BACKEND} there, expected a checkpoint saved with --ckpt-format torch_dist "
            f"(or a directory with {TRACKER}); an unfinished save has only some of them: use an earlier iteration"
        )
    try:
        backend = json.loads((path / BACKEND).read_text(encoding="utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / BACKEND}: got no sharded_backend, expected 'torch_dist'; use a copy") from error
    if backend != "torch_dist":
        raise ValueError(f"{path / BACKEND}: got {backend!r}, expected 'torch_dist'; save it in that format")
    return path


def _read_metadata(directory: Path) -> metadata.Metadata:
    path = directory / METADATA
    try:
        with path.open("rb") as stream:
            loaded = _MetadataUnpickler(stream).load()
    except Exception as error:
        # A damaged pickle can raise anything.
        raise ValueError(
            f"{path}: cannot be read ({_first_line(error)}), expected nothing but torch.distributed.checkpoint's "
            "metadata; the file is damaged or holds code. Use another iteration"
        ) from error
    if not isinstance(loaded, metadata.Metadata):
        raise ValueError(f"{path}: got {type(loaded).__name__}, expected torch.distributed.checkpoint's Metadata")
    return loaded


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without `torch.`, as manifests and tables have it."""
    return str(dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
