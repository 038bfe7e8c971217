"""The patches apply to their Megatron-LM trees, whose scripts then train as under the launcher."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.sources import TREES, unpack
from tests.test_launch import TRAINING

# What a user's script does in the place of the launcher on a machine without CUDA.
ON_A_CPU = """
import runpy, sys
sys.path[0] = sys.argv[1].rpartition("/")[0]
from megatron_muon import cpu
cpu.install()
sys.argv = [*sys.argv[1:], *cpu.cpu_arguments()]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MUON = ("--distributed-muon", "--muon-ns-dtype", "fp32", "--log-throughput")


def losses(tree: Path, *command: str) -> list[str]:
    """The losses that a run of the tree's pretrain_gpt.py prints."""
    words = [*command, str(tree / "pretrain_gpt.py"), *TRAINING, *MUON]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tree), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *words], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return re.findall(r"lm loss: (\S+)", run.stdout)


@pytest.mark.parametrize(
    "version", [pytest.param(v, marks=() if v == "0.19" else pytest.mark.exhaustive) for v in TREES]
)
def test_a_patched_tree_trains_as_under_the_launcher(version: str, tmp_path: Path) -> None:
    tree = unpack(version, tmp_path)
    datasets = tree / "megatron" / "core" / "datasets"
    # The helper of the installed wheel, in the place of a build: its source is the same in all versions.
    (datasets / "Makefile").unlink(missing_ok=True)
    core = find_spec("megatron.core")
    assert core is not None and core.submodule_search_locations is not None
    for helper in Path(core.submodule_search_locations[0], "datasets").glob("helpers_cpp*.so"):
        shutil.copy(helper, datasets)
    launched = losses(tree, "-m", "megatron_muon.launch", "--device", "cpu")
    subprocess.run(["git", "init", "--quiet"], cwd=tree, check=True)
    patch = str(ROOT / "patches" / f"megatron-lm-{version}.patch")
    subprocess.run(["git", "apply", "--check", patch], cwd=tree, check=True)
    subprocess.run(["git", "apply", patch], cwd=tree, check=True)
    assert len(launched) == 3
    assert losses(tree, "-c", ON_A_CPU) == launched
    assert losses(tree, "-m", "megatron_muon.launch", "--device", "cpu") == launched
