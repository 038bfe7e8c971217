"""A short training run by Megatron's own loop, saved and resumed at another layout, on the device that is asked for."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.training_runs import MODEL, MUON, SCRIPT, TRAINING

# What Megatron would take from apex, which need not be there.
UNFUSED = ["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-persist-layer-norm"]
ITERATIONS, SAVED_AT = 4, 2
CHECKPOINTS = ["--ckpt-format", "torch_dist", "--dist-ckpt-optim-fully-reshardable", "--save-interval", str(SAVED_AT)]
CLIP = ["--qk-clip", "--qk-clip-threshold", "0.02"]


def losses(device: str, ranks: int, arguments: list[str]) -> dict[int, float]:
    """Iteration -> training loss of a run of `ranks` processes.

    Attention logits are recorded by the CPU backend and by Transformer Engine; QK-Clip is on where they are.

    Raises:
        AssertionError: If the run fails; with the end of its output.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m", "megatron_muon.launch"]
    with_te = device == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    implementation = ["--transformer-impl", "transformer_engine" if with_te else "local"]
    flags = [
        *MODEL,
        *TRAINING,
        *MUON,
        *UNFUSED,
        *implementation,
        *(CLIP if with_te or device == "cpu" else []),
        *arguments,
    ]
    on = ["--device", "cpu"] if device == "cpu" else []
    done = subprocess.run([*launch, *on, SCRIPT, *flags], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found = re.findall(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)", done.stdout)
    printed = {int(iteration): float(loss) for iteration, loss in found}
    # As the loss of a run's second iteration Megatron prints the mean of its first two.
    first, second, *_ = printed
    printed[second] = 2 * printed[second] - printed[first]
    return printed


def resumed_and_uninterrupted(device: str, ranks: int, directory: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Losses of a run from iteration 1 on, which saves, and of one that resumes without expert parallelism."""
    save = ["--save", str(directory)]
    uninterrupted = losses(device, ranks, [*CHECKPOINTS, *save])
    (directory / "latest_checkpointed_iteration.txt").write_text(str(SAVED_AT))
    resumed = losses(device, ranks, [*CHECKPOINTS, "--load", str(directory), "--expert-model-parallel-size", "1"])
    return resumed, uninterrupted
