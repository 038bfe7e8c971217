"""Writes a run's model as a directory that Hugging Face Transformers, vLLM and SGLang load.

Reads a `torch_dist` checkpoint of any layout, one tensor at a time and without a process group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_muon.checkpoints.contents import model_keys
from megatron_muon.checkpoints.huggingface.architecture import architecture_of, config_of, heads_of
from megatron_muon.checkpoints.huggingface.card import model_card
from megatron_muon.checkpoints.huggingface.names import Block, Heads, blocks_of, separated
from megatron_muon.checkpoints.huggingface.safetensors_file import INDEX, Planned, shard_names, write_shard
from megatron_muon.checkpoints.huggingface.tokenizer import Tokenizer
from megatron_muon.checkpoints.manifest import file_problem, read_manifest
from megatron_muon.checkpoints.reader import Checkpoint, Progress, dtype_name, no_progress
from megatron_muon.checkpoints.writer import check_space, written_whole
from megatron_muon.config import TORCH_DTYPES
from megatron_muon.state_keys import PARAM, state_key

_ROUTER_BIAS = ".e_score_correction_bias"
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        dtype: Dtype of the weights; None keeps the checkpoint's. With fp32 the optimizer's main parameters are taken
            where the checkpoint has them. Biases of routers are always fp32.
        tokenizer: Directory with the tokenizer's files, which are copied.
        chat_template: File with a Jinja chat template.
        vocab_size: Rows of the vocabulary to keep; None keeps all, with Megatron's padding.
        eos: Ids of the tokens that end a text; None takes the tokenizer's.
        max_shard_bytes: Size from which a new file begins.
        any_epsilon: Whether to export a model for which Transformers has another epsilon in some norms.
    """

    dtype: str | None = None
    tokenizer: Path | None = None
    chat_template: Path | None = None
    vocab_size: int | None = None
    eos: tuple[int, ...] | None = None
    max_shard_bytes: int = 4 << 30
    any_epsilon: bool = False


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        directory: The new directory.
        architecture: Hugging Face's name of it.
        tensors: Number of tensors.
        parameters: Number of parameters.
        nbytes: Size of the weights in bytes.
        notes: What a user should know about the export.
    """

    directory: Path
    architecture: str
    tensors: int
    parameters: int
    nbytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """Where one of the exported tensors comes from: part number `part` of a block of the checkpoint."""

    block: Block
    part: int
    planned: Planned


def export(source: Path, target: Path, options: ExportOptions, progress: Progress = no_progress) -> Exported:
    """Exports the model of an iteration.

    Everything is written under another name, read back, and renamed, so that `target` is either whole or not there.

    Args:
        source: Directory of a run or of an iteration.
        target: New directory.
        options: How to export.
        progress: Shows how far the work is.

    Raises:
        ValueError: If an option or the source is bad, the model has no counterpart, or `target` exists.
        RuntimeError: If what was written does not read back.
        OSError: If the disk is full or fails.
    """
    with written_whole(target, "DIR") as partial:
        checkpoint = Checkpoint(source)
        _check_files(checkpoint.directory)
        args = checkpoint.common.get("args")
        if not hasattr(args, "num_layers"):
            raise ValueError(f"{checkpoint.directory}: has no arguments of Megatron's, expected a run's checkpoint")
        sources, stored = _plan(checkpoint, args, options)
        planned = {name: found.planned for name, found in sources.items()}
        rows = planned["model.embed_tokens.weight"].shape[0]
        tokenizer = Tokenizer.read(options.tokenizer, rows) if options.tokenizer else None
        eos = options.eos or (tokenizer.eos if tokenizer else None)
        dtype = dtype_name(next(p.dtype for name, p in planned.items() if not name.endswith(_ROUTER_BIAS)))
        bos = tokenizer.bos if tokenizer else None
        config = config_of(args, rows, dtype, bos, eos, any_epsilon=options.any_epsilon)
        shards = shard_names(planned, options.max_shard_bytes)
        check_space(partial, "DIR", sum(tensor.nbytes for tensor in planned.values()))
        tensors = _tensors(checkpoint, sources, heads_of(args), options, progress)
        for file, names in shards.items():
            write_shard(partial / file, {name: planned[name] for name in names}, islice(tensors, len(names)))
        result = Exported(
            target,
            config["architectures"][0],
            len(planned),
            sum(torch.Size(tensor.shape).numel() for tensor in planned.values()),
            sum(tensor.nbytes for tensor in planned.values()),
            tuple(_notes(stored, rows, args, options, tokenizer)),
        )
        if len(shards) > 1:
            places = {name: file for file, names in shards.items() for name in names}
            _write_json(partial / INDEX, {"metadata": {"total_size": result.nbytes}, "weight_map": places})
        _write_json(partial / "config.json", config)
        generation = {"bos_token_id": bos, "eos_token_id": config["eos_token_id"], "do_sample": False}
        _write_json(partial / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
        if tokenizer is not None:
            tokenizer.copy(partial, options.chat_template)
        facts = {"architecture": result.architecture, "parameters": f"{result.parameters:,}", "dtype": dtype}
        card = model_card(target.name, facts, result.notes, args, int(checkpoint.common.get("iteration", 0)))
        (partial / "README.md").write_text(card, encoding="utf-8")
    return result


def _check_files(directory: Path) -> None:
    """Raises ValueError if files of the checkpoint are missing or truncated, judging by its manifest."""
    manifest = read_manifest(directory)
    for name, entry in (manifest.files if manifest else {}).items():
        problem = file_problem(directory, name, entry, contents=False)
        if problem:
            raise ValueError(f"{problem}. Use another iteration, or a copy")


def _plan(checkpoint: Checkpoint, args: Any, options: ExportOptions) -> tuple[dict[str, _Source], torch.dtype]:
    """Every tensor of the export by its name, in the order of layers, and the dtype of the checkpoint's weights."""
    architecture = architecture_of(args, any_epsilon=options.any_epsilon)
    tensors = checkpoint.tensors
    keys = model_keys(tensors)
    if _EMBEDDING not in keys:
        raise ValueError(f"{checkpoint.directory}: has no {_EMBEDDING}, expected the checkpoint of a GPT model")
    stored = tensors[_EMBEDDING].properties.dtype
    dtype = TORCH_DTYPES[options.dtype] if options.dtype else stored
    out: dict[str, _Source] = {}
    heads = heads_of(args)
    for key in sorted(keys, key=_layer_order):
        for block in blocks_of(key, tensors[key].size, architecture):
            shape = tensors[key].size[len(block.index) :]
            if key in (_EMBEDDING, "output_layer.weight") and options.vocab_size:
                if not 0 < options.vocab_size <= shape[0]:
                    raise ValueError(f"--vocab-size: got {options.vocab_size}, expected 1 to {shape[0]}")
                shape = torch.Size((options.vocab_size, *shape[1:]))
            parts = separated(torch.empty(shape, device="meta"), block.join, heads)
            for number, (name, part) in enumerate(zip(block.names, parts, strict=True)):
                of = torch.float32 if name.endswith(_ROUTER_BIAS) else dtype
                # Norms may stand under two names, of local layers and of Transformer Engine's.
                out.setdefault(name, _Source(block, number, Planned(tuple(part.shape), of)))
    tied = not args.untie_embeddings_and_output_weights
    missing = [name for name in ("model.norm.weight", *(() if tied else ("lm_head.weight",))) if name not in out]
    layers = {name.split(".")[2] for name in out if name.startswith("model.layers.")}
    if missing or len(layers) != args.num_layers:
        raise ValueError(
            f"{checkpoint.directory}: got {len(layers)} layers, without {', '.join(missing) or 'nothing'}, expected "
            f"{args.num_layers} layers, a final norm and an output layer; use another iteration"
        )
    return out, stored


def _layer_order(key: str) -> tuple[int, int, str]:
    """Embedding, layers by number, final norm, output layer."""
    parts = key.split(".")
    if parts[0] == "embedding":
        return (0, 0, key)
    if parts[:2] == ["decoder", "layers"]:
        return (1, int(parts[2]) if parts[2].isdecimal() else 0, key)
    return (2, 0, key)


def _tensors(
    checkpoint: Checkpoint, sources: dict[str, _Source], heads: Heads | None, options: ExportOptions, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Yields the exported tensors; a block is read once for all of its parts."""
    last: tuple[Block, list[Tensor]] | None = None
    for number, (name, source) in enumerate(sources.items()):
        progress(name, number, len(sources))
        block = source.block
        if last is None or last[0] is not block:
            last = None
            main = state_key(PARAM, block.key)
            key = main if source.planned.dtype == torch.float32 and main in checkpoint.tensors else block.key
            whole = checkpoint.tensors[block.key].size
            sizes = [1] * len(block.index) + list(whole[len(block.index) :])
            if options.vocab_size and block.key in (_EMBEDDING, "output_layer.weight"):
                sizes[0] = options.vocab_size
            value = checkpoint.region(key, [*block.index, *[0] * (len(whole) - len(block.index))], sizes)
            last = (block, separated(value.view(sizes[len(block.index) :]), block.join, heads))
        yield name, last[1][source.part].to(source.planned.dtype)


def _notes(
    stored: torch.dtype, rows: int, args: Any, options: ExportOptions, tokenizer: Tokenizer | None
) -> Iterator[str]:
    if options.dtype and TORCH_DTYPES[options.dtype] != stored:
        exported = dtype_name(TORCH_DTYPES[options.dtype])
        yield f"weights were stored as {dtype_name(stored)} and are exported as {exported}"
    if tokenizer is not None and tokenizer.size is not None and tokenizer.size < rows:
        yield (
            f"the vocabulary has {rows} rows and the tokenizer {tokenizer.size} tokens; --vocab-size "
            f"{tokenizer.size} leaves out the padding"
        )
    if tokenizer is None:
        yield "there is no tokenizer in the directory; add one with --tokenizer"
    if options.any_epsilon and args.multi_latent_attention:
        yield f"vLLM and SGLang use epsilon {args.layernorm_epsilon} in all norms, Transformers 1e-6 in some"


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
