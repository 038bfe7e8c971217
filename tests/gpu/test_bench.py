"""`benchmarks/gpu.py` with another device name: every part runs, and its page has them. Their figures mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, overlap, step
from tests.distributed import run_ranks

CPU = torch.device("cpu")
HEADINGS = ["# One node's GPUs", "## Newton-Schulz", "## The optimizer step", "## Overlap", "## Links"]


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    gpu.main(["--output", str(tmp_path)])
    assert "skipped, since there is no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def both(rank: int, world_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts that need ranks: a row of the step, and the overlap of four matrices."""
    from megatron_muon import cpu

    cpu.install()
    (case,) = (case for case in gpu.step_cases(world_size, hidden=64) if case.name == "8 experts, ep2 dp1")
    return step.measure(case, 1, CPU), overlap.measure(rank, world_size, 4, 64, 2**20, 1, CPU)


def test_the_parts_on_a_cpu() -> None:
    """The agreement with Megatron's Muon is checked in the measurement itself."""
    results = run_ranks(both, 2)
    row, rows = results[0][0], [of_rank for _, of_rank in results]
    assert row["name"] == "8 experts, ep2 dp1" and min(row[f"{who}_ms"] for who in step.OPTIMIZERS) > 0
    found = gpu.newton_schulz_rows([(16, 32), (24, 24)], 1, CPU)
    # Kernels of other packages need CUDA; the reason stands in their place.
    assert ["reason" in entry for entry in found] == [False, False, True, True, True]
    report = {
        "device": "CPU process",
        "ranks": 2,
        "repeats": 1,
        "torch": torch.__version__,
        "shapes": [(16, 32), (24, 24)],
        "newton_schulz": found,
        "step": step.report_of([row], 1, "The optimizer step"),
        "overlap": {"torch": torch.__version__, "matrices": 4, "size": 64, "steps": 1, "ranks": rows},
        "links": "what the tool prints",
    }
    page = gpu.page(report)
    assert [line for line in page.splitlines() if line.startswith("#")] == HEADINGS
    assert "| 8 experts, ep2 dp1 |" in page and page.count("not run:") == 3 and "| torch, gram, float16 | " in page


@pytest.mark.exhaustive
def test_the_whole_command_on_a_cpu(tmp_path: Path) -> None:
    small = "--hidden 64 --matrices 4 --repeats 1 --shapes 16x32 24x24"
    gpu.main(["--device", "cpu", *small.split(), "--output", str(tmp_path)])
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("#")] == HEADINGS
    for name in ("1 rank", "1 rank, 8 experts", "dp2", "tp2 dp1", "8 experts, ep2 dp1"):
        assert f"| {name} |" in page
    for picture in ("gpu_step.png", "gpu_overlap.png"):
        assert f"({picture})" in page and (tmp_path / picture).stat().st_size > 1000
    assert (tmp_path / "links.json").exists()
