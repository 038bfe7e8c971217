"""Checkpoints of runs with FP8 primary weights hold the fp32 main parameters; any recipe or bf16 goes on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint_runs import assemble
from tests.distributed import run_ranks
from tests.models import Layout
from tests.te.fp8_runs import Recipe, Resumed, resume, save

DP2, EP2 = Layout(2), Layout(2, ep=2)
PAIRS: dict[str, tuple[tuple[Recipe | None, Layout], tuple[Recipe | None, Layout], str]] = {
    "blockwise, ep2 to dp2": (("blockwise", EP2), ("blockwise", DP2), "fully_reshardable"),
    "blockwise to bf16": (("blockwise", EP2), (None, EP2), "fully_reshardable"),
    "bf16 to tensorwise": ((None, DP2), ("tensorwise", EP2), "fully_reshardable"),
    "tensorwise, dp2 to one rank": (("tensorwise", DP2), ("tensorwise", Layout(1)), "dp_reshardable"),
    "delayed": (("delayed", DP2), ("delayed", DP2), "fully_reshardable"),
    "mxfp8 to bf16": (("mxfp8", DP2), (None, DP2), "fully_reshardable"),
}


@pytest.mark.parametrize(
    "name",
    [
        "blockwise, ep2 to dp2",
        "blockwise to bf16",
        "tensorwise, dp2 to one rank",
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in ("bf16 to tensorwise", "delayed", "mxfp8 to bf16")
        ),
    ],
)
def test_goes_on_with_the_same_main_parameters(tmp_path: Path, name: str) -> None:
    (recipe, layout), (target, target_layout), sharding = PAIRS[name]
    directory = tmp_path / "checkpoint"
    saved: list[Any] = run_ranks(save, layout.world_size, layout, recipe, directory, sharding)
    whole = assemble(saved)
    arguments = (target_layout, target, directory, sharding, whole)
    results: list[Resumed] = run_ranks(resume, target_layout.world_size, *arguments)
    # Every state of 22 parameters is stored somewhere.
    assert sum(result.checked for result in results) >= 50
    for rank, result in enumerate(results):
        print(f"rank {rank}: {result.checked} slices, unlike: {result.differences}; then {result.after.mismatches}")
        assert result.differences == []
        # States and AdamW's count of steps have been loaded too: one more step is the oracles' third.
        assert (result.after.main, result.after.bf16) == (0.0, 0.0)
        assert sum(result.after.mismatches.values()) == 0
        assert result.adam <= 1e-6  # see test_adamws_parameters_get_te_fused_adam
        assert bool(result.after.mismatches) == (target is not None)
