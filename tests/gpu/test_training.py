"""Training, QK-Clip and checkpoints on all GPUs of a node; on a CPU the same functions with another device name.

The part on GPUs was never run in the development of this version: the tolerance is an expectation.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.training import ITERATIONS, SAVED_AT, resumed_and_uninterrupted

# Losses of about 4. Another layout adds the gradients' roundings in another order; a lost state differs by 1e-2.
TOLERANCE = 2e-4


def check(device: str, ranks: int, directory: Path) -> None:
    resumed, uninterrupted = resumed_and_uninterrupted(device, ranks, directory)
    assert list(uninterrupted) == list(range(1, ITERATIONS + 1))
    assert list(resumed) == list(range(SAVED_AT + 1, ITERATIONS + 1))
    for iteration, loss in resumed.items():
        assert loss == pytest.approx(uninterrupted[iteration], rel=TOLERANCE)


def test_the_check_itself_on_a_cpu(tmp_path: Path) -> None:
    check("cpu", 2, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices for expert parallelism")
def test_a_resumed_run_follows_the_uninterrupted_one(tmp_path: Path) -> None:
    check("cuda", 2 * (torch.cuda.device_count() // 2), tmp_path)
