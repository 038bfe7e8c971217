"""States as checkpoints hold them: a number for each element of a slice, so that they can be cut for any layout."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_muon.config import MuonConfig
from megatron_muon.matrices.slice_elements import SliceElements
from megatron_muon.state_keys import SECOND_MOMENT


def elementwise(state: Tensor, key: str, elements: SliceElements, muon: MuonConfig) -> Tensor:
    """A state tensor with one entry for each element of its slice.

    Args:
        state: As the optimizer keeps it; not mutated.
        key: Name of the state.
        elements: Of the slice.
        muon: The optimizer's settings.
    """
    if key != SECOND_MOMENT or muon.variant != "normuon":
        return state
    lines = elements.touched_lines
    table = state.new_zeros(int(lines[-1]) + 1)
    table[lines] = state
    return torch.cat([table[elements.lines(chunk)] for chunk in elements.chunks()])


def from_elements(values: Tensor, key: str, elements: SliceElements, muon: MuonConfig) -> Tensor:
    """The inverse of `elementwise`: the state tensor for which it returns `values`."""
    if key != SECOND_MOMENT or muon.variant != "normuon":
        return values
    lines = elements.touched_lines
    table = torch.zeros(int(lines[-1]) + 1, dtype=torch.float32, device=lines.device)
    for chunk in elements.chunks():
        # All elements of a line have the same value: whichever is written last, the result is the same.
        table[elements.lines(chunk)] = values[chunk].to(table)
    return table[lines]
