"""Distributed Muon over NCCL on all GPUs of a node; on a CPU the same function over Gloo.

The part on GPUs was never run in the development of this version: the tolerance is an expectation.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.distributed import run_ranks
from tests.gpu.node import TOLERANCE, cases_of, worst_difference
from tests.paths import ROOT


def test_the_check_itself_on_a_cpu() -> None:
    plans = [case.plan() for case in cases_of(2)]
    stages = [max(plan.team_stages(r) for r in range(len(plan.rounds))) for plan in plans]
    assert [count > 0 for count in stages] == [False] * 5 + [True] * 2
    for difference in run_ranks(worst_difference, 2, "cpu"):
        # Stacked matrices alone round in another way than the reference.
        assert difference < TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
def test_equals_the_reference_over_nccl() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={torch.cuda.device_count()}"]
    done = subprocess.run([*launch, "-m", "tests.gpu.node"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
