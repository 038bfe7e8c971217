"""`--muon-moe-fp8` with FP8 primary weights: Transformer Engine makes the experts' weights FP8, and no others."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.models import Layout, initialize, make_chunks
from tests.te.fp8_runs import MODEL, is_fp8


def fp8_weights(rank: int, world_size: int, recipe: Any, seam: bool) -> dict[str, bool]:
    """Name of each matrix -> whether its primary weight is FP8."""
    import megatron_muon
    from megatron_muon.megatron.entry import seams
    from megatron_muon.megatron.model.expert_fp8 import config_settings

    if seam:
        # It refuses Transformer Engine on a CPU, whose kernels are stood in for here.
        seams.check_fused_kernels = lambda *, cpu: None
        megatron_muon.enable(moe_fp8=recipe)
    layout = Layout(world_size, config={**config_settings(recipe), "fp8_param": True}, ddp={"fp8_param_gather": True})
    initialize(layout)
    (chunk,) = make_chunks(MODEL, layout, torch.bfloat16)
    return {name: is_fp8(p) for name, p in chunk.named_parameters() if p.dim() == 2}


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_experts_weights_alone_are_fp8(recipe: str) -> None:
    (found,) = run_ranks(fp8_weights, 1, recipe, True)
    expected = {name: bool(re.search(r"\.mlp\.(shared_)?experts\.linear_fc[12]\.weight\d*$", name)) for name in found}
    assert found == expected and 0 < sum(found.values()) < len(found)


def test_without_names_attention_would_be_fp8_too() -> None:
    """Why the layers get their names before they are built."""
    (found,) = run_ranks(fp8_weights, 1, "tensorwise", False)
    assert any(fp8 for name, fp8 in found.items() if "self_attention" in name)
