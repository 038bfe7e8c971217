"""Stock DistributedOptimizer with torch's Adam, which Megatron-Core uses without Transformer Engine or apex, resumes.

Megatron-Core's checkpoint code is written for fused Adams, which count their steps per parameter group; torch's counts
per parameter. Three methods go wrong for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .redirect import Redirect


def _optimizer_state_dict(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`DistributedOptimizer.state_dict` of an Adam that has not stepped, which a resumed run asks for first.

    With torch's Adam, Megatron reads the step count from the state of the parameters; before a step there is none, and
    the load of a checkpoint fails. The state that Adam itself would start with is made here.
    """

    @functools.wraps(original)
    def state_dict(self: Any) -> dict[str, Any]:
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

    return state_dict


def _load_optimizer_state_dict(original: Callable[..., None]) -> Callable[..., None]:
    """`DistributedOptimizer.load_state_dict` with a step count for each parameter, and for fp32 training.

    With torch's Adam, Megatron gives all parameters one and the same tensor for the step, which then counts once for
    each of them. Main parameters of an fp32 run are views of the model's, which autograd guards.
    """

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        with torch.no_grad():
            original(self, state_dict)
        if isinstance(self.optimizer, torch.optim.Adam):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return load_state_dict


def _set_optimizer_states(original: Callable[..., None]) -> Callable[..., None]:
    """Leaves torch's step count out of what a checkpoint holds for a parameter; the parameter group holds it.

    One checkpoint format has no such entry and fails; the other has that of the optimizer before the load.
    """

    @functools.wraps(original)
    def set_main_param_and_optimizer_states(
        self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]
    ) -> None:
        # What is no tensor is not copied.
        original(self, model_param, {**tensors, "step": None})

    return set_main_param_and_optimizer_states


def redirects() -> list[Redirect]:
    """The table of DistributedOptimizer's methods."""
    owner = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
    return [
        Redirect(
            f"{owner}.state_dict",
            _optimizer_state_dict,
            "fails on an optimizer that has not stepped, so that no run resumes",
            ("self",),
        ),
        Redirect(
            f"{owner}.load_state_dict",
            _load_optimizer_state_dict,
            "all parameters get one step counter; in fp32, autograd refuses the copy",
            ("self", "state_dict"),
        ),
        Redirect(
            f"{owner}._set_main_param_and_optimizer_states",
            _set_optimizer_states,
            "loses the step count in one checkpoint format, fails in another",
            ("self", "model_param", "tensors"),
        ),
    ]
