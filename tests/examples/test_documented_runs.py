"""What README.md and the examples tell a user to run does run: the API snippet, the launch script, the demo."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.distributed import run_ranks
from tests.models import Layout, initialize, make_chunks, optimizer_config, train_step, wrap
from tests.paths import EXAMPLES, ROOT, TESTS
from tests.training_runs import train

sys.path.insert(0, str(EXAMPLES))

import demo

LAUNCHER = "megatron_muon.launch"


def blocks(text: str) -> list[str]:
    """Fenced and indented blocks of code of a Markdown text."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, flags=re.MULTILINE)
    return [*fenced, *(textwrap.dedent(block).strip() for block in indented)]


def run_snippet(rank: int, world_size: int, before: str, after: str) -> tuple[list[str], list[float]]:
    """Executes the snippet's two parts with a model made between them; returns the optimizers' names and losses."""
    names: dict[str, Any] = {}
    exec(before, names)
    layout = Layout(world_size)
    initialize(layout)
    names["model_chunks"] = wrap(make_chunks("dense", layout, torch.float32), layout)
    names["optimizer_config"] = optimizer_config(layout, torch.float32, lr=0.01)
    exec(after, names)
    optimizer = names["optimizer"]
    parts = sorted(type(part).__name__ for part in optimizer.chained_optimizers)
    return parts, [train_step(names["model_chunks"], optimizer, 0) for _ in range(3)]


def test_the_readmes_api_snippet_trains() -> None:
    (snippet,) = (
        block for block in blocks((ROOT / "README.md").read_text("utf-8")) if "megatron_muon.enable(" in block
    )
    before, after = re.split(r"^\.\.\.$", snippet, flags=re.MULTILINE)
    for parts, losses in run_ranks(run_snippet, 2, before, after):
        assert "MuonDistributedOptimizer" in parts and len(parts) > 1
        assert losses[0] > losses[1] > losses[2]


def launch(rank: int, world_size: int, port: int, script: str, words: list[str]) -> dict[int, dict[str, float]]:
    """A rank as torchrun would start it; its losses by iteration, counted from 0."""
    from megatron.training import get_tensorboard_writer

    losses = train(rank, world_size, port, script, words, None).losses
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.close()  # a test rank ends without the exit hooks that would do it
    return losses


def launch_all(world_size: int, words: list[str]) -> list[dict[int, dict[str, float]]]:
    """Runs what follows the launcher's name in a torchrun command."""
    assert words[:2] == ["--device", "cpu"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: list[dict[int, dict[str, float]]] = run_ranks(launch, world_size, port, words[2], words[3:])
    return results


def test_the_launch_script_trains(tmp_path: Path) -> None:
    """Its words are those that it gives torchrun; the script in the place of Megatron-LM's is one of the tests'."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n', encoding="utf-8")
    torchrun.chmod(0o755)
    shutil.copy(TESTS / "scripts" / "cpu_pretrain_gpt.py", tmp_path / "pretrain_gpt.py")
    settings = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MEGATRON_LM": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(EXAMPLES / "pretrain_gpt_muon.sh"), "--train-iters", "4", "--lr-warmup-iters", "1"],
        env={**settings, "RANKS": "2", "DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split("\0")[:-1]
    assert words[:4] == ["--nproc-per-node", "2", "-m", LAUNCHER]
    for losses in launch_all(2, words[4:]):
        values = [losses[step]["lm loss"] for step in range(4)]
        assert values[-1] < values[0] - 0.1, values


class InRanks:
    """Stands for `subprocess.Popen` of torchrun: runs its ranks at once, from the tests' fork server."""

    returncode: int | None = None

    def __init__(self, command: list[str], **_: Any) -> None:
        launch_all(demo.RANKS, command[command.index(LAUNCHER) + 1 :])
        self.returncode = 0

    def poll(self) -> int | None:
        return self.returncode


def test_make_demo_trains_resumes_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` in two steps: both optimizers, Muon's resumed run, and the files that README.md names."""
    words = ["make", "--no-print-directory", "-n", "demo"]  # without it, a make inside `make test` names directories
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1].split()[-1] == "examples/demo.py"
    stand_in = SimpleNamespace(Popen=InRanks, run=subprocess.run, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(demo, "subprocess", stand_in)
    console = Console(width=200)
    with console.capture() as capture:
        demo.run_demo(["adamw", "muon"], 2, 8e-3, tmp_path / "out", console)
    assert "largest difference over steps 2 to 2" in capture.get()
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["setup"]["resumed"]["steps"] == [2]
    (files,) = re.findall(r"`runs/demo/\{(.*?)\}`", (ROOT / "README.md").read_text("utf-8"))
    assert all((tmp_path / "out" / name).exists() for name in files.replace("/", "").split(","))
