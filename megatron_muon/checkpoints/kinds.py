"""The optimizers whose state a checkpoint can hold, and how each names it.

| | main parameter | Muon's matrices | all others | momentum |
|---|---|---|---|---|
| adamw | `param` | `exp_avg`, `exp_avg_sq` | `exp_avg`, `exp_avg_sq` | mean gradient |
| megatron-muon | `fp32_param` | `momentum_buffer` | `exp_avg`, `exp_avg_sq` | mean gradient |
| distributed-muon | `param` | `momentum_buffer` | `exp_avg`, `exp_avg_sq` | sum: mean / (1 - momentum) |

A key is `optimizer.state.<state>.<name of the parameter in the model>`. Sources: megatron-core 0.19.2,
`optimizer/distrib_optimizer.py` and `optimizer/optimizer.py`; emerging-optimizers 0.3,
`orthogonalized_optimizer.py`, where the buffer is `lerp`ed towards the gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_muon.checkpoints.reader import Checkpoint

Kind = Literal["adamw", "megatron-muon", "distributed-muon"]
MOMENTUM, MEAN, SQUARE = "momentum_buffer", "exp_avg", "exp_avg_sq"
MAIN: dict[Kind, str] = {"adamw": "param", "megatron-muon": "fp32_param", "distributed-muon": "param"}
FULLY_RESHARDABLE = "fully_reshardable"

# Megatron puts `chained_0.` before keys of chained optimizers in all but the fully reshardable format.
_KEY = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([a-z0-9_]+)\.(.+)")


@dataclass(frozen=True)
class Parameter:
    """A trained parameter: its name in the model, its whole shape, and the keys of its states by state."""

    name: str
    shape: tuple[int, ...]
    states: Mapping[str, str]

    @property
    def stacked(self) -> int:
        """How many leading axes count layers or experts, which Megatron stacks into one tensor."""
        layers = re.search(r"\.layers\.(?!\d)", self.name) is not None
        experts = re.search(r"\.experts\.(?!\d)", self.name) is not None
        return int(layers) + int(experts)

    def is_muons(self, kind: Kind, router: str = "muon") -> bool:
        """Whether an optimizer updates the parameter as a matrix, judging by name and shape."""
        if kind == "adamw" or len(self.shape) - self.stacked != 2:
            return False
        if re.search(r"(^|\.)(word_embeddings|output_layer)\.", self.name):
            return False
        if kind == "megatron-muon":
            # Learned positions are not marked as an embedding there, and so are Muon's.
            return True
        return not ("embedding" in self.name or (router == "adam" and self.name.endswith("router.weight")))


def parameters(checkpoint: Checkpoint) -> dict[str, Parameter]:
    """The parameters that a checkpoint has optimizer state of, by name."""
    states: dict[str, dict[str, str]] = {}
    for key in checkpoint.tensors:
        if found := _KEY.fullmatch(key):
            states.setdefault(found[2], {})[found[1]] = key
    return {
        name: Parameter(name, tuple(checkpoint.tensors[next(iter(keys.values()))].size), keys)
        for name, keys in states.items()
    }


def is_state(key: str) -> bool:
    """Whether a key is that of optimizer state."""
    return _KEY.fullmatch(key) is not None


def optimizer_entries(common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a checkpoint says of each optimizer of the chain beside tensors."""
    state = common.get("optimizer")
    if not isinstance(state, dict):
        return []
    return [state] if "optimizer" in state else [state[key] for key in sorted(state) if isinstance(key, int)]


def sharding(checkpoint: Checkpoint) -> str:
    """Megatron's name of the format of the optimizer state."""
    return str((checkpoint.common.get("content_metadata") or {}).get("distrib_optim_sharding_type", "unknown"))


def kind_of(checkpoint: Checkpoint) -> Kind | None:
    """Which optimizer wrote a checkpoint; None if it holds no optimizer state."""
    entries = optimizer_entries(checkpoint.common)
    if any(entry["optimizer"].get("kind") == "muon" for entry in entries):
        return "distributed-muon"
    if any("momentum" in group for entry in entries for group in entry["optimizer"].get("param_groups", ())):
        return "megatron-muon"
    return "adamw" if entries else None


def model_keys(keys: Iterable[str]) -> list[str]:
    """Those of `keys` that name tensors of the model itself."""
    return [key for key in keys if not re.match(r"(chained_\d+\.)?optimizer\.", key)]
