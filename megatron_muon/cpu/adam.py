"""Stock DistributedOptimizer with torch's Adam, which Megatron-Core uses without Transformer Engine or apex, resumes.

Megatron-Core's checkpoint code is written for fused Adams, which count their steps per parameter group; torch's counts
per parameter. Three methods go wrong for it. Distributed Muon's own optimizers override them
(`megatron/checkpoint/sharded_states.py`); these patches are for stock runs on a CPU, with which Muon is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_muon.megatron.entry.patching import Patch


def _state_dict(original: Callable[..., dict[str, Any]], self: Any) -> dict[str, Any]:
    """Of an Adam that has not stepped too, which a resumed run asks for first.

    With torch's Adam, Megatron reads the step count from the state of the parameters; before a step there is none, and
    the load of a checkpoint fails. The state that Adam itself would start with is made here.
    """
    inner = self.optimizer
    if isinstance(inner, torch.optim.Adam) and not inner.state:
        for group in inner.param_groups:
            for parameter in group["params"]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    return original(self)


def _load_state_dict(original: Callable[..., None], self: Any, state_dict: dict[str, Any]) -> None:
    """Gives each parameter a step count of its own, and loads fp32 training.

    With torch's Adam, Megatron gives all parameters one and the same tensor for the step, which then counts once for
    each of them. Main parameters of an fp32 run are views of the model's, which autograd guards.
    """
    with torch.no_grad():
        original(self, state_dict)
    if isinstance(self.optimizer, torch.optim.Adam):
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()


def _set_main_param_and_optimizer_states(
    original: Callable[..., None], self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]
) -> None:
    """Leaves torch's step count out of what a checkpoint holds for a parameter; the parameter group holds it.

    One checkpoint format has no such entry and fails; the other has that of the optimizer before the load.
    """
    # Megatron copies tensors alone.
    original(self, model_param, {**tensors, "step": None})


_OWNER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
PATCHES = (
    Patch(
        f"{_OWNER}.state_dict",
        _state_dict,
        "fails on an optimizer that has not stepped, so that no run resumes",
        ("self",),
    ),
    Patch(
        f"{_OWNER}.load_state_dict",
        _load_state_dict,
        "all parameters get one step counter; in fp32, autograd refuses the copy",
        ("self", "state_dict"),
    ),
    Patch(
        f"{_OWNER}._set_main_param_and_optimizer_states",
        _set_main_param_and_optimizer_states,
        "loses the step count in one checkpoint format, fails in another",
        ("self", "model_param", "tensors"),
    ),
)
