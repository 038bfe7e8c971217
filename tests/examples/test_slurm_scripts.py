"""The Slurm scripts are what their generator writes, and Megatron and our checks accept their arguments.

Nothing is trained: torchrun is stood in for by a program that writes down its arguments.
"""

from __future__ import annotations

import os
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_muon.estimate.shapes import load_model
from tests.examples.test_moonlight_script import HOPPER, machine_stand_in, parsed
from tests.paths import EXAMPLES

__all__ = ["machine_stand_in"]  # a fixture of every test here: Transformer Engine and a Hopper GPU by their versions

SLURM = EXAMPLES / "slurm"
MAKER = runpy.run_path(str(SLURM / "make_scripts.py"))
JOBS: dict[str, Any] = {job.name: job for job in MAKER["JOBS"]}


def test_there_is_no_other_script() -> None:
    assert {path.stem for path in SLURM.glob("*.sh")} == set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_a_script_is_what_the_generator_writes(name: str) -> None:
    """With the plan that its header shows."""
    assert (SLURM / f"{name}.sh").read_text(encoding="utf-8") == MAKER["script"](JOBS[name])


def words(directory: Path, name: str, **environment: str) -> list[str]:
    """The words that a script gives torchrun."""
    for program, text in (
        ("torchrun", '#!/bin/sh\nprintf "%s\\0" "$@"\n'),
        ("srun", '#!/bin/sh\nexec "$@"\n'),
        ("scontrol", "#!/bin/sh\nprintf 'node7\\nnode8\\n'\n"),
    ):
        (directory / program).write_text(text, encoding="utf-8")
        (directory / program).chmod(0o755)
    settings = {"MEGATRON_LM": "mlm", "DATA": "corpus", "TOKENIZER": "tokenizer", **environment}
    path = f"{directory}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SLURM / f"{name}.sh")],
        env={**os.environ, "PATH": path, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("name", JOBS)
def test_megatron_accepts_the_arguments_and_they_are_the_models(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training import arguments

    monkeypatch.setattr(arguments, "get_device_arch_version", lambda: 9)
    one_queue = "export CUDA_DEVICE_MAX_CONNECTIONS=1" in (SLURM / f"{name}.sh").read_text(encoding="utf-8")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1" if one_queue else "")
    job, model = JOBS[name], load_model(JOBS[name].model)
    args = parsed(words(tmp_path, name), HOPPER, job.gpus)
    arguments.validate_args(args)
    assert args.data_parallel_size == job.dp and args.num_layers == len(model.layers)
    assert args.distributed_muon and args.use_distributed_optimizer and args.optimizer == "adam"
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.expert_model_parallel_size)
    assert sizes == (job.tp, job.pp, job.ep) and job.gpus % 8 == 0
    assert args.global_batch_size % (args.micro_batch_size * job.dp) == 0


def test_launching_with_and_without_slurm(tmp_path: Path) -> None:
    alone = words(tmp_path, "qwen3-8b-64gpus", NODE_RANK="3", MASTER_ADDR="head")
    assert alone[:4] == ["--nnodes", "8", "--nproc-per-node", "8"]
    assert alone[4:10] == ["--node-rank", "3", "--master-addr", "head", "--master-port", "29500"]
    slurm = words(tmp_path, "qwen3-8b-64gpus", SLURM_JOB_ID="5", SLURM_NNODES="4", SLURM_JOB_NODELIST="node[7-8]")
    assert slurm[:4] == ["--nnodes", "4", "--nproc-per-node", "8"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "5", "--rdzv-endpoint", "node7:29500"]
    assert slurm[4:10] == rendezvous


def test_a_missing_setting_stops_the_script(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("DATA", "TOKENIZER", "MEGATRON_LM")}
    done = subprocess.run(
        ["bash", str(SLURM / "qwen3-8b-8gpus.sh")], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0 and "set DATA to the prefix" in done.stderr
