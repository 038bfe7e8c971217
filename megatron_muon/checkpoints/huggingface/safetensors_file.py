"""Writes safetensors files one tensor at a time; the library's own writer needs a whole file's tensors in memory.

A file is 8 bytes with the header's length (little endian), the header (JSON: for each tensor its dtype, shape and place
in the rest), and the tensors' bytes one after the other. Source: github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_muon.checkpoints.digest import DigestWriter, checksum

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def shard_names(tensors: Mapping[str, Planned], max_bytes: int) -> dict[str, list[str]]:
    """Distributes tensors, in order, over files of at most `max_bytes` (one tensor may be larger): file -> names."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{at:05}-of-{len(shards):05}.safetensors": names for at, names in enumerate(shards, 1)}


def write_shard(path: Path, planned: Mapping[str, Planned], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes a file and reads it back.

    Args:
        path: The new file.
        planned: The tensors of the file, in the order in which they are written.
        tensors: The tensors in that order; each is asked for when the one before has been written.

    Raises:
        RuntimeError: If the file does not read back as it was written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in planned.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as stream:
        out = DigestWriter(stream)
        out.write(len(content).to_bytes(8, "little"))
        out.write(content)
        for (name, value), (expected, plan) in zip(tensors, planned.items(), strict=True):
            assert (name, tuple(value.shape), value.dtype) == (expected, plan.shape, plan.dtype), name
            out.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
    if checksum(path) != out.entry():
        raise RuntimeError(f"{path}: does not read back as it was written; check the disk and export again")
