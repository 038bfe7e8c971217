"""Trains a mini-Moonlight on the Python standard library's source twice, with AdamW and with Distributed Muon.

    make demo                                             # or, in an environment that has the package:
    python examples/demo.py

Both runs have the same initial weights, data, order, schedule, learning rate and weight decay; 4 ranks on this
machine's CPU, TP2 x EP2 x DP2, bf16 with fp32 main parameters, through `megatron.training.pretrain`. The Muon run saves
a checkpoint shortly before its end; a third run resumes it at TP1 x EP4, and its losses are compared with those of the
run that was not interrupted. What it leaves in runs/demo: report.json, loss.csv, loss.png, checkpoint/, tensorboard/
and each rank's logs. Parts of it:

    python examples/demo.py --only adamw --lr 4e-3 --out runs/adamw-4e-3
    python examples/demo.py --steps 20 --out runs/smoke
    python examples/demo.py --fp8 tensorwise --out runs/demo-fp8    # make demo FP8=1

The last trains with Muon twice, in bf16 and with the experts in FP8, which a CPU emulates: docs/fp8.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import demo_report
import stdlib_corpus
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

HERE = Path(__file__).resolve().parent
PRETRAIN = HERE / "pretrain_mini_moonlight.py"
RANKS = 4
GLOBAL_BATCH = 16
SEQUENCE_LENGTH = 256
VALIDATION_BATCH = 64
STEPS_PER_EVALUATION = 10
RUNS = {"adamw": [], "muon": ["--distributed-muon", "--muon-ns-dtype", "fp32"]}
# Not blockwise: a rank has half a shared expert, 64 wide, and its blocks are 128.
FP8_RECIPES = ("tensorwise", "delayed", "mxfp8")
RUNS |= {f"muon_{recipe}": [*RUNS["muon"], "--muon-moe-fp8", recipe] for recipe in FP8_RECIPES}

# The run that resumes from the checkpoint of the Muon run, and what its layout changes.
RESUMED = "resumed"
RESUMED_STEPS = 10
LAYOUTS = ("TP2 x EP2 x DP2", "TP1 x EP4 x DP4")
RESUMED_LAYOUT = {
    "--tensor-model-parallel-size": 1,
    "--expert-model-parallel-size": RANKS,
    "--micro-batch-size": GLOBAL_BATCH // RANKS,
    "--eval-micro-batch-size": VALIDATION_BATCH // RANKS,
}

# The same for both optimizers; README.md has the losses at other rates.
LEARNING_RATE = 8e-3
STEPS = 160


class RunFailed(RuntimeError):
    """A training run ended with an error. The message ends with what the failing rank said last."""


def model_flags() -> list[str]:
    """The words of `mini_moonlight.flags`."""
    return shlex.split((HERE / "mini_moonlight.flags").read_text(encoding="utf-8"), comments=True)


def training_flags(run: str, *, steps: int, lr: float, corpus: Path, tensorboard: Path) -> list[str]:
    """A run's Megatron flags: the model's, those of all runs, and the run's own.

    Args:
        run: One of `RUNS`.
        steps: Training steps, at least 2.
        lr: Peak learning rate: warmed up over the first tenth of the steps, then a cosine down to a tenth of it.
        corpus: Where `train` and `valid` are.
        tensorboard: Where to log.

    Raises:
        ValueError: If `steps` leaves no room for a warm-up, or `lr` is not positive.
    """
    if steps < 2:
        raise ValueError(f"--steps: got {steps}, expected at least 2: one to warm up, one to train")
    if not 0 < lr < math.inf:
        raise ValueError(f"--lr: got {lr}, expected a positive number")
    flags = {
        "--train-iters": steps,
        "--lr": lr,
        "--min-lr": lr / 10,
        "--lr-decay-style": "cosine",
        "--lr-warmup-iters": max(1, steps // 10),
        "--micro-batch-size": GLOBAL_BATCH // 2,
        "--global-batch-size": GLOBAL_BATCH,
        "--seq-length": SEQUENCE_LENGTH,
        "--max-position-embeddings": SEQUENCE_LENGTH,
        "--seed": 1234,
        "--train-data-path": corpus / "train",
        "--valid-data-path": corpus / "valid",
        "--data-cache-path": corpus / "cache",
        "--num-workers": 0,
        "--eval-interval": STEPS_PER_EVALUATION,
        "--eval-iters": 1,
        "--eval-global-batch-size": VALIDATION_BATCH,
        "--eval-micro-batch-size": VALIDATION_BATCH // 2,
        "--log-interval": 1,
        "--timing-log-level": 1,
        "--tensorboard-dir": tensorboard,
        "--distributed-timeout-minutes": 3,
    }
    switches = ["--no-create-attention-mask-in-dataloader", "--log-timers-to-tensorboard"]
    return [*model_flags(), *(str(word) for flag in flags.items() for word in flag), *switches, *RUNS[run]]


def saved_step(steps: int) -> int:
    """After which step of `steps` the Muon run is saved to be resumed."""
    return steps - min(RESUMED_STEPS, steps // 2)


def saving_flags(steps: int, checkpoint: Path) -> list[str]:
    """What makes a run save a checkpoint that any layout can load."""
    interval = ["--save-interval", str(saved_step(steps)), "--ckpt-format", "torch_dist"]
    return ["--save", str(checkpoint), *interval, "--dist-ckpt-optim-fully-reshardable"]


def resuming_flags(flags: Sequence[str], steps: int, checkpoint: Path, tensorboard: Path) -> list[str]:
    """The flags of a run that resumes from a checkpoint at another layout. Where a flag repeats, the last one counts.

    Args:
        flags: The run's that is saved, without `saving_flags`.
        steps: Its training steps.
        checkpoint: Where it saves.
        tensorboard: Where to log.
    """
    load = {"--load": checkpoint, "--ckpt-step": saved_step(steps), "--tensorboard-dir": tensorboard}
    return [*flags, *(str(word) for flag in {**RESUMED_LAYOUT, **load}.items() for word in flag)]


def command(flags: Sequence[str], logs: Path, script: Path = PRETRAIN) -> list[str]:
    """The command that runs `script` on `RANKS` ranks of this machine's CPU, each rank's output going into `logs`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    redirect = ["--log-dir", str(logs), "--redirects", "3"]
    launch = ["-m", "megatron_muon.launch", "--device", "cpu", str(script)]
    return [*torchrun, *redirect, *launch, *flags]


def rank_environment() -> dict[str, str]:
    """This process's environment, with the cores shared out among the ranks and GPUs, if any, left alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, cores // RANKS)),
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONWARNINGS": "ignore",
    }


def failure_message(run: str, exit_code: int, logs: Path, lines: int = 40) -> str:
    """The last lines of the rank that torchrun saw fail first, or of torchrun itself if no rank did."""
    torchrun_log = logs / "torchrun.log"
    said = torchrun_log.read_text(encoding="utf-8", errors="replace")
    root_cause = re.search(r"Root Cause.*?rank\s*:\s*(\d+)", said, re.DOTALL)
    log, who = torchrun_log, "torchrun"
    if root_cause:
        rank = root_cause.group(1)
        log, who = next(iter(logs.glob(f"*/attempt_*/{rank}/stderr.log")), torchrun_log), f"rank {rank}"
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    return f"run {run} ended with exit code {exit_code}; the end of {who}'s log, {log}:\n{tail}"


def prepare_corpus(directory: Path) -> list[dict[str, Any]]:
    """Runs `stdlib_corpus.py`, in a process of its own since this one has no other need of torch and Megatron.

    Returns:
        What the datasets hold: `name`, `files`, `num_bytes` and `sha256` of each.

    Raises:
        RunFailed: If it exits with an error.
    """
    done = subprocess.run([sys.executable, stdlib_corpus.__file__, str(directory)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RunFailed(f"preparing the corpus ended with exit code {done.returncode}:\n{done.stderr}")
    splits: list[dict[str, Any]] = json.loads((directory / stdlib_corpus.DESCRIPTION).read_text(encoding="utf-8"))
    return splits


def start(flags: Sequence[str], logs: Path, script: Path = PRETRAIN) -> subprocess.Popen[bytes]:
    """Starts `command`; torchrun's own output goes into `torchrun.log` in `logs`."""
    with (logs / "torchrun.log").open("wb") as output:
        return subprocess.Popen(
            command(flags, logs, script),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=rank_environment(),
            start_new_session=True,  # Ctrl-C is ours to pass on
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends torchrun and, through it, its ranks; does nothing if it has ended."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=45)  # it gives its ranks 30 seconds before it kills them
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def train(run: str, flags: Sequence[str], out: Path, progress: Progress, task: TaskID) -> demo_report.RunLog:
    """Runs one training to its end, showing how far it is.

    Returns:
        What it logged.

    Raises:
        RunFailed: If it exits with an error.
    """
    logs = out / "logs" / run
    logs.mkdir(parents=True)
    reader = demo_report.RunReader(out / "tensorboard" / run)
    process = start(flags, logs)
    try:
        evaluated = 0
        while process.poll() is None:
            time.sleep(0.5)
            log = reader.read()
            show(log, progress, task)
            if not progress.console.is_terminal and len(log.validation_loss) > evaluated:
                evaluated = len(log.validation_loss)
                step = max(log.validation_loss)
                loss = log.validation_loss[step]
                progress.console.print(f"{demo_report.LABELS[run]:<7} step {step:>4}  validation loss {loss:.3f}")
    finally:
        stop(process)
    if process.returncode != 0:
        raise RunFailed(failure_message(run, process.returncode, logs))
    log = reader.read()
    show(log, progress, task)
    return log


def show(log: demo_report.RunLog, progress: Progress, task: TaskID) -> None:
    """Brings a run's progress line up to date."""
    if not log.train_loss:
        return
    step = max(log.train_loss)
    parts = [f"loss {log.train_loss[step]:.3f}"]
    if log.validation_loss:
        parts.append(f"validation {log.validation_loss[max(log.validation_loss)]:.3f}")
    if step in log.step_s:
        parts.append(f"{GLOBAL_BATCH * SEQUENCE_LENGTH / log.step_s[step]:,.0f} tokens/s")
    progress.update(task, completed=step, status="  ".join(parts))


def run_demo(runs: Sequence[str], steps: int, lr: float, out: Path, console: Console) -> None:
    """Prepares the corpus, trains, resumes the Muon run at another layout, writes the report and shows its table.

    Raises:
        ValueError: If `steps` or `lr` is out of range.
        RunFailed: If a training run exits with an error, or the resumed run did not start at the right step.
    """
    corpus, checkpoint = out / "corpus", out / "checkpoint"
    flags = {
        run: training_flags(run, steps=steps, lr=lr, corpus=corpus, tensorboard=out / "tensorboard" / run)
        for run in runs
    }
    if "muon" in flags:
        flags[RESUMED] = resuming_flags(flags["muon"], steps, checkpoint, out / "tensorboard" / RESUMED)
        flags["muon"] += saving_flags(steps, checkpoint)
    for stale in (corpus, checkpoint, out / "tensorboard", out / "logs"):
        shutil.rmtree(stale, ignore_errors=True)
    with console.status("Preparing the corpus"):
        splits = prepare_corpus(corpus)
    for split in splits:
        console.print(
            f"{split['name']}: {split['files']} files of Python's standard library, {split['num_bytes']:,} bytes"
        )

    started = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    logs = {}
    with Progress(*columns, console=console) as progress:
        tasks = {
            run: progress.add_task(f"{demo_report.LABELS[run]:<7}", total=steps, start=False, status="waiting")
            for run in flags
        }
        for run, task in tasks.items():
            progress.start_task(task)
            progress.update(task, status="starting")
            logs[run] = train(run, flags[run], out, progress, task)

    resumed = logs.pop(RESUMED, None)
    setup = {
        "steps": steps,
        "tokens_per_step": GLOBAL_BATCH * SEQUENCE_LENGTH,
        "learning_rate": lr,
        "ranks": RANKS,
        "corpus": splits,
        "flags": flags,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("megatron-core", "megatron-muon", "torch")},
        },
        "training_s": round(time.monotonic() - started, 1),
    }
    if resumed is not None:
        try:
            setup["resumed"] = demo_report.continuation(logs["muon"], resumed, saved_step(steps))
        except ValueError as error:
            raise RunFailed(f"{error}; its logs: {out / 'logs' / RESUMED}") from None
    console.print(demo_report.write_report(out, logs, setup))
    if resumed is not None:
        console.print(demo_report.told(setup["resumed"], *LAYOUTS), highlight=False)
    console.print(f"{setup['training_s']:.0f} s of training. Report, curves and TensorBoard files: {out}")


def main() -> None:
    """Parses the command line and runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help=f"training steps of {GLOBAL_BATCH} x {SEQUENCE_LENGTH} bytes (default: %(default)s)",
    )
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="peak learning rate (default: %(default)s)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", choices=tuple(RUNS), help="this run alone")
    chosen.add_argument("--fp8", choices=FP8_RECIPES, help="Muon in bf16, and with the experts in emulated FP8")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where to write (default: %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    try:
        runs = ["muon", f"muon_{options.fp8}"] if options.fp8 else [options.only] if options.only else ["adamw", "muon"]
        run_demo(runs, options.steps, options.lr, options.out, console)
    except ValueError as error:
        parser.error(str(error))
    except RunFailed as error:
        console.print(f"[bold red]failed[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted; the ranks are stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
