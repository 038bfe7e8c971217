"""Runs an unmodified Megatron script with this package's flags on its command line.

torchrun --nproc-per-node 8 -m megatron_muon.launch pretrain_gpt.py <the script's arguments> --distributed-muon

The script runs in this process as `__main__`, with `sys.argv` and `sys.path` as `python SCRIPT` would set them; its
exit code and its exceptions are the launcher's.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from typing import NoReturn

DEVICES = ("auto", "cuda", "cpu")

# Megatron's flags that go with Distributed Muon: flag, name of its value (None: a switch), Megatron's default, text.
# Written here, since importing Megatron for its help takes seconds; a test compares them with Megatron's parser.
MEGATRON_FLAGS: tuple[tuple[str, str | None, object, str], ...] = (
    ("--use-distributed-optimizer", None, False, "shard optimizer state; needed by --distributed-muon"),
    ("--optimizer", "NAME", "adam", "adam: what the parameters get that are not Muon's; muon is taken as adam here"),
    ("--lr", "LR", None, "peak learning rate, of Muon and AdamW alike"),
    ("--min-lr", "LR", 0.0, "learning rate at the end of the schedule"),
    ("--weight-decay", "FACTOR", 0.01, "weight decay, of Muon and AdamW alike; Moonlight: 0.1"),
    ("--clip-grad", "NORM", 1.0, "gradient norm to clip at; Muon's direction does not depend on it"),
    ("--adam-beta1", "FACTOR", 0.9, "decay of AdamW's mean gradient"),
    ("--adam-beta2", "FACTOR", 0.999, "decay of AdamW's mean square; Moonlight: 0.95"),
    ("--qk-clip", None, False, "MuonClip: scale query and key weights whose attention logits grow too large"),
    ("--qk-clip-threshold", "LOGIT", 100, "largest attention logit that --qk-clip leaves alone"),
    ("--qk-clip-alpha", "SHARE", 0.5, "share of --qk-clip's factor that queries take; keys take the rest"),
    ("--log-max-attention-logit", None, False, "log the largest attention logits, and clip nothing"),
    ("--overlap-grad-reduce", None, False, "reduce gradients during the backward pass"),
    ("--overlap-param-gather", None, False, "gather updated parameters during the next forward pass"),
    ("--fp8-param-gather", None, False, "keep FP8 primary weights, and gather these"),
    ("--num-distributed-optimizer-instances", "N", 1, "copies of the optimizer's shards over the data-parallel ranks"),
    ("--use-mup", None, False, "muP; needs --muon-scale-mode unit_rms_norm or shape_scaling"),
    ("--dist-ckpt-optim-fully-reshardable", None, False, "save checkpoints that any layout can load"),
    ("--tensorboard-dir", "DIR", None, "TensorBoard's directory; Muon's metrics and profiles go there too"),
)

# Flags of the CPU backend that only spare it work. A script that says otherwise is left alone, with a message.
_PREFERRED = frozenset({"--num-workers"})


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher's command line.

    Args:
        argv: The words after `megatron_muon.launch`; those of the process by default.

    Raises:
        SystemExit: On a bad command line, or for any error that this package raises while the script runs (2, with one
            line on standard error; `MEGATRON_MUON_TRACEBACK=1` raises the error itself), for `--help` (0), or as the
            script exits.
    """
    try:
        _run(argv)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        from megatron_muon.megatron.entry.messages import is_own, stop

        if is_own(error):
            stop(error)
        raise


def _run(argv: Sequence[str] | None) -> None:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.help:
        _print_help(parser)
    if options.script is None:
        parser.error("SCRIPT is missing: the Megatron script to run, such as pretrain_gpt.py; see --help")
    if not os.path.isfile(options.script):
        parser.error(f"SCRIPT: got {options.script!r}, which is no file; give the path of a Megatron script")
    device = _choose_device(options.device)

    sys.argv = [options.script, *options.arguments]
    # What `python -m` put first is the working directory; `python SCRIPT` puts the script's own there. A Megatron-LM
    # tree around the script thus hides an installed megatron-core, so nothing may import megatron before this.
    if not sys.flags.safe_path and sys.path:
        sys.path[0] = os.path.dirname(os.path.abspath(options.script))
    from megatron_muon.megatron.entry import kernels

    kernels.check_fused_kernels(cpu=device == "cpu")
    if device == "cpu":
        _install_cpu_backend()
    from megatron_muon.megatron.entry import seams

    seams.install_core_seams()
    if os.environ.get("RANK", "0") == "0":  # the rank that compiles
        kernels.check_dataset_helper()
    seams.install_training_seams()
    runpy.run_path(options.script, run_name="__main__")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_muon.launch",
        usage="%(prog)s [-h] [--device {auto,cuda,cpu}] SCRIPT [the script's arguments] [--distributed-muon ...]",
        description="Run an unmodified Megatron script with Distributed Muon.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this; after SCRIPT: Megatron's flags and this package's"
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="auto: CUDA, which must be there; cpu: this package's CPU backend over Gloo, with the flags it needs",
    )
    parser.add_argument("script", metavar="SCRIPT", nargs="?", help="path of the script, such as pretrain_gpt.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _print_help(parser: argparse.ArgumentParser) -> NoReturn:
    # Not with the launcher's parser itself: these flags belong after SCRIPT.
    from megatron_muon.megatron.entry import arguments

    flags = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    arguments.add_arguments(flags)
    megatrons = flags.add_argument_group("Megatron's own flags that matter here (all of them: SCRIPT --help)")
    for flag, metavar, default, text in MEGATRON_FLAGS:
        shown = "" if metavar is None else f" (default: {default})"
        if metavar is None:
            megatrons.add_argument(flag, action="store_true", help=text)
        else:
            megatrons.add_argument(flag, metavar=metavar, help=f"{text}{shown}")
    print(f"{parser.format_help()}\nAfter SCRIPT, beside the script's own arguments:\n{flags.format_help()}", end="")
    sys.exit(0)


def _choose_device(device: str) -> str:
    if device == "cpu":
        return device
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            f"--device: got {device}, expected a CUDA device that torch {torch.__version__} can use; run on a GPU "
            "machine, or add --device cpu before SCRIPT to run on this machine's CPU over Gloo"
        )
    return "cuda"


def _install_cpu_backend() -> None:
    from megatron_muon import cpu
    from megatron_muon.megatron.entry.messages import say

    cpu.install()
    sys.argv, added, kept = merge_arguments(sys.argv, cpu.REQUIRED_FLAGS)
    if added:
        say(f"--device cpu adds {' '.join(added)}")
    for word in kept:
        say(f"--device cpu leaves {word} as given")


def merge_arguments(
    argv: Sequence[str], required: Sequence[tuple[str, str | None]]
) -> tuple[list[str], list[str], list[str]]:
    """Completes a command line with the flags the CPU backend needs.

    Args:
        argv: The script's command line.
        required: Flags, each with its value, or None for a switch.

    Returns:
        The completed command line, the words added to it, and the words left in it that differ from `required`.

    Raises:
        ValueError: If the command line gives a flag the backend needs another value.
    """
    added: list[str] = []
    kept: list[str] = []
    for flag, value in required:
        given = _given(argv, flag)
        if given is None:
            added += [flag] if value is None else [flag, value]
        elif value is not None and given != value:
            if flag not in _PREFERRED:
                raise ValueError(
                    f"{flag}: got {given!r}, expected {value!r} with --device cpu; omit it, or run without --device cpu"
                )
            kept.append(f"{flag} {given}")
    return [*argv, *added], added, kept


def _given(argv: Sequence[str], flag: str) -> str | None:
    """The value that a command line gives a flag, the last one where it repeats; '' for a switch; None without it."""
    given: str | None = None
    for word, following in zip(argv, (*argv[1:], "")):
        if word == flag:
            given = "" if following.startswith("--") else following
        elif word.startswith(f"{flag}="):
            given = word.split("=", 1)[1]
    return given


if __name__ == "__main__":
    main()
