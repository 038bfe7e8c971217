"""The drawn examples in the docstrings of `shares` and `slice_elements`, number by number."""

from __future__ import annotations

import numpy as np
import torch

from megatron_muon.config import MuonConfig
from megatron_muon.matrices.fused import GatedMlp, spec_from_split
from megatron_muon.matrices.shares import Share, Strip, collected_strips, share_positions, stored_strips
from megatron_muon.matrices.slice_elements import SliceElements
from megatron_muon.matrices.spec import MatrixSpec, whole


def test_two_slices_and_two_shares_of_columns() -> None:
    spec = MatrixSpec("m", (6, 8), 1, None, whole(6))
    left, right = Share(1, 0, 4), Share(1, 4, 8)
    ends = np.array([0, 20, 48])
    assert share_positions(spec, 0, left, 0, ends).tolist() == [0, 12, 24]
    assert share_positions(spec, 0, right, 0, ends).tolist() == [0, 8, 24]
    assert stored_strips(spec, 0, left, 0, 0, 20) == [Strip(0, 3, 4, 8)]
    assert stored_strips(spec, 0, right, 0, 0, 20) == [Strip(4, 2, 4, 8)]
    assert collected_strips(spec, 0, left, 0, 0, 12) == [Strip(0, 1, 12, 4)]


def test_gate_and_up_on_two_ranks() -> None:
    spec = spec_from_split("mlp", (4, 3), GatedMlp().split(MuonConfig()), tp_size=2, partition_dim=0)
    elements, everything = SliceElements(spec, 1, 3, 9, torch.device("cpu")), slice(0, 6)
    assert elements.parts(everything).tolist() == elements.matrices(everything).tolist() == [0, 0, 0, 1, 1, 1]
    assert elements.numbers(everything).tolist() == [9, 10, 11, 18, 19, 20]
    assert elements.lines(everything).tolist() == [3, 3, 3, 6, 6, 6]
