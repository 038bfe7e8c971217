"""DistributedOptimizer whose checkpoints hold the states of its inner optimizer, whichever these are.

From megatron-core 0.19 on, that is what `optimizer_state_keys` says. In 0.18, four of its functions have the names of
Adam's states as a constant; here they get the names of `optimizer_state_keys` in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_ADAM = ("exp_avg", "exp_avg_sq")
_CONSTANT = ("param", *_ADAM)


HAS_STATE_KEYS = hasattr(DistributedOptimizer, "optimizer_state_keys")


def check_format() -> None:
    """Refuses `fully_reshardable` where the megatron-core that is installed gives parts of it to wrong places.

    Raises:
        NotImplementedError: With megatron-core 0.18.
    """
    if not HAS_STATE_KEYS:
        raise NotImplementedError(
            "--dist-ckpt-optim-fully-reshardable: got True, expected False with --distributed-muon on megatron-core "
            "0.18, which loads such optimizer state wrongly in another layout; omit it, or use megatron-core 0.19"
        )


def distributed_optimizer() -> Any:
    """Megatron's DistributedOptimizer; in megatron-core 0.18 a subclass that follows `optimizer_state_keys`.

    Raises:
        RuntimeError: If the class has neither that property nor functions with the constant.
    """
    if HAS_STATE_KEYS:
        return DistributedOptimizer
    functions = {
        name: function
        for name, function in vars(DistributedOptimizer).items()
        if isinstance(function, FunctionType) and _CONSTANT in function.__code__.co_consts
    }
    if not functions:
        raise RuntimeError(
            "megatron_muon does not fit this megatron-core: DistributedOptimizer has neither optimizer_state_keys nor "
            "functions with Adam's state keys; install megatron-core 0.18.2 or later"
        )
    methods = {name: _by_state_keys(function) for name, function in functions.items()}
    return type("DistributedOptimizer", (DistributedOptimizer,), {"optimizer_state_keys": _ADAM, **methods})


def _by_state_keys(original: FunctionType) -> Callable[..., Any]:
    @functools.cache
    def with_constant(constant: tuple[str, ...]) -> FunctionType:
        code = original.__code__
        constants = tuple(constant if value == _CONSTANT else value for value in code.co_consts)
        changed = FunctionType(
            code.replace(co_consts=constants), original.__globals__, original.__name__, original.__defaults__
        )
        changed.__kwdefaults__ = original.__kwdefaults__
        return changed

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return with_constant(("param", *self.optimizer_state_keys))(self, *args, **kwargs)

    return method
