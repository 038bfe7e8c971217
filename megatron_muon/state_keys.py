"""What optimizers call their states in a checkpoint: the one table that runs and offline tools share. Without torch.

| | main parameter | Muon's matrices | all others | momentum |
|---|---|---|---|---|
| adamw | `param` | `exp_avg`, `exp_avg_sq` | `exp_avg`, `exp_avg_sq` | mean gradient |
| megatron-muon | `fp32_param`, others' also `param` | `momentum_buffer` | `exp_avg`, `exp_avg_sq` | mean gradient |
| distributed-muon | `param` | `momentum_buffer` | `exp_avg`, `exp_avg_sq` | sum: mean / (1 - momentum) |

Variants of Distributed Muon have `second_moment` beside the momentum.

A key is `optimizer.state.<state>.<name of the parameter in the model>`. Sources: megatron-core 0.19.2,
`optimizer/distrib_optimizer.py`, `optimizer/optimizer.py` and `optimizer/__init__.py`, where Megatron's Muon leaves the
others to a DistributedOptimizer (`param`) or not (`fp32_param`), by how the script makes its model; emerging-optimizers
0.3, `orthogonalized_optimizer.py`, where the buffer is `lerp`ed towards the gradient.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

OptimizerKind = Literal["adamw", "megatron-muon", "distributed-muon"]

PARAM, FP32_PARAM = "param", "fp32_param"
MOMENTUM, SECOND_MOMENT = "momentum_buffer", "second_moment"
MEAN, SQUARE = "exp_avg", "exp_avg_sq"

PREFIX = "optimizer.state"
# Megatron puts `chained_0.` before keys of chained optimizers in all but the fully reshardable format.
_KEY = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([a-z0-9_]+)\.(.+)")
# Megatron's flat buckets, of all parameters of a data type: `...bucket_idx_0.exp_avg`.
_IN_BUCKETS = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\..*\.([a-z0-9_]+)")


def states_of(kind: OptimizerKind, *, is_matrix: bool) -> tuple[str, ...]:
    """The states that an optimizer keeps of a parameter, as in the table above; main parameters come first.

    Args:
        kind: The optimizer.
        is_matrix: Whether it updates the parameter as a matrix.
    """
    if kind == "adamw" or (kind == "distributed-muon" and not is_matrix):
        return (PARAM, MEAN, SQUARE)
    if kind == "distributed-muon":
        return (PARAM, MOMENTUM)
    # Which optimizer Megatron gives the others depends on how the script makes its model: either finds its own.
    return (FP32_PARAM, MOMENTUM) if is_matrix else (FP32_PARAM, PARAM, MEAN, SQUARE)


def state_key(state: str, name: str) -> str:
    """The key of a parameter's state in a checkpoint."""
    return f"{PREFIX}.{state}.{name}"


def split_key(key: str) -> tuple[str, str] | None:
    """State and parameter of a key; None for a key of anything else."""
    found = _KEY.fullmatch(key)
    return (found[1], found[2]) if found else None


def state_in_buckets(key: str) -> str | None:
    """The state that a flat bucket holds; None for a key of anything else."""
    found = _IN_BUCKETS.fullmatch(key)
    return found[1] if found else None


def states_among(keys: Iterable[str]) -> tuple[set[str], set[str]]:
    """The states that a checkpoint's keys name: of single parameters, and in flat buckets."""
    listed = list(keys)
    single = {found[0] for key in listed if (found := split_key(key))}
    return single, {state for key in listed if (state := state_in_buckets(key))}


def kind_by_states(states: Collection[str]) -> OptimizerKind | None:
    """Which optimizer keeps these states; None for one that is not in the table, or for no states."""
    if MOMENTUM in states:
        return "megatron-muon" if FP32_PARAM in states else "distributed-muon"
    return "adamw" if MEAN in states else None
