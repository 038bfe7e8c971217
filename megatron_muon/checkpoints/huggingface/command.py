"""`python -m megatron_muon export` and `import`: models of Hugging Face's, offline, on one CPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_muon.checkpoints.command import fail

_DTYPES = ("bf16", "fp16", "fp32")


def add_export_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `export` subcommand; `run` is its action."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "export",
        help="make a Hugging Face model of a checkpoint",
        description=(
            "Writes the model of a torch_dist checkpoint, saved at any layout, as a directory that Transformers, vLLM "
            "and SGLang load: deepseek_v3 (Moonlight), llama, qwen3, qwen3_moe. What has no counterpart is refused."
        ),
    )
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="directory of a run, or of one iteration")
    parser.add_argument("directory", type=Path, metavar="DIR", help="new directory")
    parser.add_argument("--to", choices=("huggingface",), required=True, help="format of DIR")
    parser.add_argument("--iteration", type=int, help="iteration to export (default: the latest)")
    parser.add_argument("--dtype", choices=_DTYPES, help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="directory with the tokenizer's files to copy")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja chat template for the tokenizer")
    parser.add_argument("--vocab-size", type=int, help="rows of the vocabulary to keep (default: all, with padding)")
    parser.add_argument(
        "--eos-token-id", type=int, nargs="+", help="tokens that end a text (default: the tokenizer's, if there is one)"
    )
    parser.add_argument(
        "--any-epsilon",
        action="store_true",
        help="export latent attention whose --norm-epsilon is not 1e-6, which Transformers uses in some norms",
    )
    parser.set_defaults(run=run_export)
    return parser


def add_import_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `import` subcommand; `run` is its action."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "import",
        help="make a checkpoint of a Hugging Face model",
        description=(
            "Writes a Hugging Face model as a torch_dist checkpoint that any layout loads with --load RUN --finetune, "
            "and the model's flags as RUN/model.flags."
        ),
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory with config.json and safetensors")
    parser.add_argument("--from", dest="source", choices=("huggingface",), required=True, help="format of DIR")
    parser.add_argument("--to", dest="run_directory", type=Path, metavar="RUN", required=True, help="new directory")
    parser.add_argument("--dtype", choices=_DTYPES, help="dtype of the weights (default: the model's)")
    parser.set_defaults(run=run_import)
    return parser


def run_export(args: argparse.Namespace) -> int:
    """Runs `export`; returns 0, or 2 if an option, the source or the disk is bad."""
    from megatron_muon.checkpoints.huggingface.export import ExportOptions, export
    from megatron_muon.observe.console import progress_bar

    source = args.run_directory
    if args.iteration is not None:
        source /= f"iter_{args.iteration:07d}"
    options = ExportOptions(
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        chat_template=args.chat_template,
        vocab_size=args.vocab_size,
        eos=tuple(args.eos_token_id) if args.eos_token_id else None,
        any_epsilon=args.any_epsilon,
    )
    try:
        with progress_bar() as progress:
            result = export(source, args.directory, options, progress)
    except (ValueError, RuntimeError, OSError) as error:
        return fail("export", error)
    print(
        f"wrote {result.directory}: {result.architecture}, {result.parameters:,} parameters in {result.tensors} "
        f"tensors of {result.nbytes:,} bytes, verified"
    )
    for note in result.notes:
        print(f"note: {note}")
    return 0


def run_import(args: argparse.Namespace) -> int:
    """Runs `import`; returns 0, or 2 if an option, the source or the disk is bad."""
    from megatron_muon.checkpoints.huggingface.import_model import import_model
    from megatron_muon.config import TORCH_DTYPES
    from megatron_muon.observe.console import progress_bar

    try:
        with progress_bar() as progress:
            dtype = TORCH_DTYPES[args.dtype] if args.dtype else None
            result = import_model(args.directory, args.run_directory, dtype, progress)
    except (ValueError, RuntimeError, OSError) as error:
        return fail("import", error)
    print(f"wrote {result.directory}: {result.parameters:,} parameters in {result.tensors} tensors, verified")
    print(f"the model's flags are in {result.flags}")
    for note in result.notes:
        print(f"note: {note}")
    return 0
