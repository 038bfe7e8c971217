"""The parameters in a checkpoint, and the optimizer that wrote it. States are named in `state_keys`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_muon.checkpoints.reader import Checkpoint
from megatron_muon.state_keys import OptimizerKind, kind_by_states, split_key, states_among

FULLY_RESHARDABLE = "fully_reshardable"


@dataclass(frozen=True)
class Parameter:
    """A trained parameter: its name in the model, its whole shape, and the key of each of its states."""

    name: str
    shape: tuple[int, ...]
    states: Mapping[str, str]

    @property
    def stacked(self) -> int:
        """The number of leading axes that count layers or experts, which Megatron stacks into one tensor."""
        layers = re.search(r"\.layers\.(?!\d)", self.name) is not None
        experts = re.search(r"\.experts\.(?!\d)", self.name) is not None
        return int(layers) + int(experts)

    def is_muons(self, kind: OptimizerKind, router: str = "muon") -> bool:
        """Whether an optimizer updates the parameter as a matrix, judging by name and shape."""
        if kind == "adamw" or len(self.shape) - self.stacked != 2:
            return False
        if re.search(r"(^|\.)(word_embeddings|output_layer)\.", self.name):
            return False
        if kind == "megatron-muon":
            # Learned positions are not marked as an embedding there, so that Muon updates them.
            return True
        return not ("embedding" in self.name or (router == "adam" and self.name.endswith("router.weight")))


def parameters(checkpoint: Checkpoint) -> dict[str, Parameter]:
    """The parameters that a checkpoint has optimizer state of, by name."""
    states: dict[str, dict[str, str]] = {}
    for key in checkpoint.tensors:
        if found := split_key(key):
            states.setdefault(found[1], {})[found[0]] = key
    return {
        name: Parameter(name, tuple(checkpoint.tensors[next(iter(keys.values()))].size), keys)
        for name, keys in states.items()
    }


def optimizer_entries(state: Any) -> dict[int, dict[str, Any]]:
    """The entry of each optimizer of a chain by position; `state` is one entry, a list, or a dict by position."""
    if not isinstance(state, Mapping):
        return dict(enumerate(state or ()))
    if "optimizer" in state:
        return {0: dict(state)}
    return {position: state[position] for position in sorted(key for key in state if isinstance(key, int))}


def sharding(checkpoint: Checkpoint) -> str:
    """Megatron's name of the format of the optimizer state."""
    return str((checkpoint.common.get("content_metadata") or {}).get("distrib_optim_sharding_type", "unknown"))


def optimizer_kind(checkpoint: Checkpoint) -> OptimizerKind | None:
    """Which optimizer wrote a checkpoint; None if it holds no optimizer state."""
    return kind_by_states(set.union(*states_among(checkpoint.tensors)))


def model_keys(keys: Iterable[str]) -> list[str]:
    """Those of `keys` that name tensors of the model itself."""
    return [key for key in keys if not re.match(r"(chained_\d+\.)?optimizer\.", key)]


def is_optimizer_state(key: str) -> bool:
    """Whether a tensor's key is that of optimizer state, in any of Megatron's formats."""
    return not model_keys([key])


def and_more(names: Sequence[str]) -> str:
    """The first of some names and the number of others, for messages."""
    return f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}"
