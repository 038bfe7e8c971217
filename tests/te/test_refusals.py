"""Quantized parameters that Distributed Muon cannot keep in step with their main parameters are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.checkpoint_runs import EXACT
from tests.distributed import RankError, run_ranks
from tests.models import Layout, initialize, make_chunks, optimizer_config, wrap
from tests.te.fp8_runs import MODEL, fp8_layout


def build(rank: int, world_size: int, layout: Layout, adamws: str) -> None:
    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer

    initialize(layout)
    chunks = make_chunks(MODEL, layout, torch.bfloat16)
    for name, parameter in chunks[0].named_parameters():
        if adamws and adamws in name:
            parameter.use_muon = False  # type: ignore[attr-defined]
    tag_parameters(chunks, EXACT)
    wrapped = wrap(chunks, layout)
    get_megatron_optimizer(optimizer_config(layout, torch.bfloat16, fp8_recipe="blockwise"), wrapped, muon=EXACT)


def with_ddp(layout: Layout, **ddp: Any) -> Layout:
    return replace(layout, ddp={**layout.ddp, **ddp})


BLOCKWISE = fp8_layout(Layout(2), "blockwise")


def test_fp8_parameters_without_their_gather() -> None:
    with pytest.raises(RankError) as raised:
        run_ranks(build, 2, with_ddp(BLOCKWISE, fp8_param_gather=False), "")
    assert sorted(raised.value.errors) == [0, 1]
    for kind, message, _ in raised.value.errors.values():
        assert kind == "ValueError"
        assert "fp8_param_gather: got False, expected True with FP8 primary weights such as decoder.layers.0" in message
        assert "would never be updated; add --fp8-param-gather" in message


def test_fp8_parameters_of_both_optimizers() -> None:
    with pytest.raises(RankError) as raised:
        run_ranks(build, 2, BLOCKWISE, "layers.0.mlp.linear_fc2")
    assert sorted(raised.value.errors) == [0, 1]
    for kind, message, _ in raised.value.errors.values():
        assert kind == "NotImplementedError"
        assert "layers.0.mlp.linear_fc2.weight: got an FP8 primary weight for AdamW beside Muon's decoder" in message
