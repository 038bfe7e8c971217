"""Writes a Hugging Face model as a `torch_dist` checkpoint that any layout loads, and the flags to train it.

One tensor, or one expert of a stack, is in memory at a time; there is no process group.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_muon.checkpoints.contents import and_more
from megatron_muon.checkpoints.huggingface.architecture import (
    LATENT_EPSILON,
    Settings,
    architecture_of,
    flags_of,
    heads_of,
    settings_from_config,
)
from megatron_muon.checkpoints.huggingface.names import Block, blocks_of, generic, joined, keys_of, shapes_of
from megatron_muon.checkpoints.huggingface.safetensors_file import INDEX
from megatron_muon.checkpoints.huggingface.tokenizer import read_json
from megatron_muon.checkpoints.reader import COMMON, TRACKER, Progress, no_progress
from megatron_muon.checkpoints.writer import CheckpointWriter, check_space, written_whole

FLAGS = "model.flags"
_BIAS = "mlp.router.expert_bias"
_BACKEND = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        directory: The new run's directory.
        flags: File with the model's flags.
        tensors: Number of tensors in the checkpoint.
        parameters: Number of the model's parameters.
        notes: What a user should know about the import.
    """

    directory: Path
    flags: Path
    tensors: int
    parameters: int
    notes: tuple[str, ...]


class ModelDirectory:
    """A directory with config.json and safetensors, opened for reading.

    Args:
        path: The directory.

    Raises:
        ValueError: If it is no model, a file is missing, or safetensors is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = path / "config.json"
        if not config.is_file():
            raise ValueError(f"DIR: got {path} without config.json, expected a Hugging Face model's directory")
        self.config: dict[str, Any] = read_json(config)
        try:
            import safetensors
        except ModuleNotFoundError as error:
            if error.name != "safetensors":
                raise
            raise ValueError("safetensors is not installed; pip install megatron-muon[huggingface]") from error
        self._safe_open = safetensors.safe_open
        self._opened: dict[str, Any] = {}

    @cached_property
    def places(self) -> dict[str, str]:
        """File of each tensor by the tensor's name."""
        index = self.path / INDEX
        if index.is_file():
            return dict(read_json(index)["weight_map"])
        single = "model.safetensors"
        return dict.fromkeys(self._file(single).keys(), single)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its file's header."""
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Reads a tensor."""
        tensor: Tensor = self._file(self.places[name]).get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        try:
            return self._file(self.places[name]).get_slice(name)
        except KeyError as error:
            raise ValueError(f"{self.path}: {name}: missing, expected in the model; use another copy") from error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise ValueError(
                f"{self.path / self.places[name]}: has no {name}, where {INDEX} says it is; use another copy"
            ) from error

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            path = self.path / name
            if not path.is_file():
                raise ValueError(f"{path}: missing, expected the model's weights; download the directory again")
            try:
                self._opened[name] = self._safe_open(path, "pt")
            except Exception as error:
                # The library's own error is no ValueError.
                raise ValueError(f"{path}: cannot be read ({error}), expected safetensors; use another copy") from error
        return self._opened[name]


def import_model(source: Path, target: Path, dtype: torch.dtype | None, progress: Progress = no_progress) -> Imported:
    """Imports a model.

    Everything is written under another name, read back, and renamed, so that `target` is either whole or not there.

    Args:
        source: Directory with config.json and safetensors.
        target: New directory, for `--load`.
        dtype: Of the weights; None keeps that of the embedding. Biases of routers are fp32.
        progress: Shows how far the work is.

    Raises:
        ValueError: If the source is no model that Megatron computes, or lacks a tensor, or `target` exists.
        RuntimeError: If what was written does not read back.
        OSError: If the disk is full or fails.
    """
    with written_whole(target, "RUN") as partial:
        model = ModelDirectory(source)
        settings = settings_from_config(model.config)
        args = Namespace(**settings)
        architecture = architecture_of(args, any_epsilon=True)
        heads = heads_of(args)
        shapes = shapes_of(settings, heads)
        keys: dict[str, tuple[torch.Size, list[Block]]] = {}
        for key, stacked in keys_of(settings, architecture):
            leading = [settings["num_layers"]] if stacked else []
            if "experts.experts." in key:
                leading.append(settings["num_experts"])
            blocks = list(blocks_of(key, leading, architecture))
            keys[key] = (torch.Size((*leading, *_joined_shape(blocks[0], shapes))), blocks)
        _check_tensors(model, [name for _, blocks in keys.values() for block in blocks for name in block.names], shapes)
        dtype = dtype or model.tensor("model.norm.weight").dtype
        check_space(partial, "RUN", sum(size.numel() for size, _ in keys.values()) * dtype.itemsize)
        writer = CheckpointWriter(partial / "release")
        for number, (key, (size, blocks)) in enumerate(keys.items()):
            progress(key, number, len(keys))
            for block in blocks:
                value = joined([model.tensor(name) for name in block.names], block.join, heads)
                value = value.to(torch.float32 if key.endswith(_BIAS) else dtype)
                offsets = torch.Size((*block.index, *[0] * value.dim()))
                writer.add(MetadataIndex(key, offsets), value[(None,) * len(block.index)].contiguous(), size)
        args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
        content = {"distrib_optim_sharding_type": "fully_reshardable"}
        common = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}
        writer.add_object(COMMON, common)
        writer.finish(_BACKEND, {"optimizer": "none"})
        (partial / TRACKER).write_text("release", encoding="utf-8")
        (partial / FLAGS).write_text(_flags_file(settings, args, source, target), encoding="utf-8")
    parameters = {name: shapes[generic(name)] for _, blocks in keys.values() for b in blocks for name in b.names}
    return Imported(
        target,
        target / FLAGS,
        len(keys),
        sum(torch.Size(shape).numel() for shape in parameters.values()),
        tuple(_notes(settings)),
    )


def _joined_shape(block: Block, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of a block: its parts below each other."""
    parts = [shapes[generic(name)] for name in block.names]
    return (sum(part[0] for part in parts), *parts[0][1:])


def _check_tensors(model: ModelDirectory, names: list[str], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError if tensors are missing, left over, or of another shape than config.json says."""
    wanted = dict.fromkeys(names)
    missing = [name for name in wanted if name not in model.places]
    if missing:
        raise ValueError(
            f"{model.path}: {and_more(missing)}: missing, expected from config.json; a file is missing, or it is not "
            "this model's config.json. Download the directory again"
        )
    for name in wanted:
        got, expected = model.shape(name), shapes[generic(name)]
        if got != expected:
            raise ValueError(
                f"{model.path / model.places[name]}: {name}: got shape {got}, expected {expected} from config.json; "
                "the file is another model's. Download the directory again"
            )
    # A tied output layer, and constants of older releases, may be stored all the same.
    ignored = ("lm_head.weight", "rotary_emb.inv_freq")
    left = [name for name in model.places if name not in wanted and not name.endswith(ignored)]
    if left:
        raise ValueError(
            f"{model.path}: {and_more(left)}: got a tensor that Megatron's model does not have; models with it cannot "
            "be imported"
        )


def _flags_file(settings: Settings, args: Namespace, source: Path, target: Path) -> str:
    lines = [
        f"# The model of {source.resolve().name} as Megatron's flags; add parallelism, data, batch and schedule.",
        "# A first run loads the weights with the last three lines; leave them out to resume a run of your own.",
        *(" ".join(words) for words in flags_of(settings)),
        *(["--bf16"] if args.bf16 else ["--fp16"] if args.fp16 else []),
        f"--load {shlex.quote(str(target.resolve()))}",
        "--finetune",
        # Transformer Engine's layers ask for extra state, which a released model does not have.
        "--dist-ckpt-strictness log_unexpected",
    ]
    return "\n".join(lines) + "\n"


def _notes(settings: Settings) -> list[str]:
    if settings["multi_latent_attention"] and settings["layernorm_epsilon"] != LATENT_EPSILON:
        return [
            f"rms_norm_eps {settings['layernorm_epsilon']} is used in all norms, as in vLLM and SGLang; Transformers "
            f"has {LATENT_EPSILON} in the norms of compressed states, so that its logits differ by about 5e-5"
        ]
    return []
