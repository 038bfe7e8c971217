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

# Flags of the CPU backend that only spare it work. A script that says otherwise is left alone, with a message.
_PREFERRED = frozenset({"--num-workers"})


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher's command line.

    Args:
        argv: The words after `megatron_muon.launch`; those of the process by default.

    Raises:
        SystemExit: On a bad command line of the launcher's own (2), for `--help` (0), or as the script exits.
        ValueError: If a flag of the script contradicts what the CPU backend needs.
        RuntimeError: If the device, the Megatron version or an installed library of kernels does not fit.
    """
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
    from megatron_muon.megatron.entry.kernels import check_fused_kernels

    check_fused_kernels(cpu=device == "cpu")
    if device == "cpu":
        _install_cpu_backend()
    from megatron_muon.megatron.entry import seams

    seams.install_core_seams()
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

    cpu.install()
    sys.argv, added, kept = merge_arguments(sys.argv, cpu.REQUIRED_FLAGS)
    if int(os.environ.get("RANK", "0")) == 0:
        if added:
            print(f"megatron_muon: --device cpu adds {' '.join(added)}", flush=True)
        for word in kept:
            print(f"megatron_muon: --device cpu leaves {word} as given", flush=True)


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
