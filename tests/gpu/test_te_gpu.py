"""Forward and backward passes of Transformer Engine in FP8 with Muon's updates of FP8 primary weights, on CUDA.

Never run in the development of this version, which had no GPU: the tolerance is an expectation, not an experience.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache

import pytest
import torch

from tests.paths import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]
# Of a device, at which a recipe's matrix products begin.
CAPABILITIES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


@cache
def losses(recipe: str) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={min(2, torch.cuda.device_count())}"]
    done = subprocess.run(
        [*command, "-m", "tests.gpu.te_training", recipe],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("recipe", CAPABILITIES)
def test_losses_follow_those_of_bf16(recipe: str) -> None:
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITIES[recipe]:
        pytest.skip(f"{recipe} needs compute capability {CAPABILITIES[recipe]}, this device has {capability}")
    fp8, bf16 = losses(recipe), losses("bf16")
    print(recipe, fp8, bf16)
    assert len(fp8) == len(bf16) == 20
    # Two batches in turn, learned by heart: the loss of both falls from ln 64 = 4.16.
    assert bf16[-1] < 0.8 * bf16[0]
    # Operands with three bits of mantissa: errors of up to 2^-4 each, which average out over sums of 256 products.
    assert fp8 == pytest.approx(bf16, rel=0.05)
