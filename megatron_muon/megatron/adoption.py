"""Continues a checkpoint of Megatron's AdamW under Distributed Muon, where the launch flags say how.

Both write `optimizer.state.<state>.<model key>`: `param` is the fp32 parameter in both, AdamW's parameters have
`exp_avg` and `exp_avg_sq`, Muon's have `momentum_buffer`. So a load of an AdamW checkpoint differs for Muon's
parameters alone: what is asked for as `momentum_buffer` is read from `exp_avg`, and then scaled or zeroed.

`exp_avg` is a mean of gradients, `b*m + (1-b)*g`; `momentum_buffer` is a sum, `mu*m + g`. A constant gradient g leaves
g in the one and g/(1-mu) in the other, hence the factor 1/(1-mu).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megatron_muon.config import MuonConfig
from megatron_muon.megatron.arguments import say
from megatron_muon.optimizer import MOMENTUM

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "optimizer.state"
MEAN = "exp_avg"
_FLAG = "--muon-init-from-adamw"


def loading_seam(settings: Callable[[], MuonConfig | None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The seam around Megatron's load of a torch_dist checkpoint; `settings` gives those of Distributed Muon, if on."""

    def seam(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(
            load_dir: Any, args: Any, rank0: bool, sharded_state_dict: Any, iteration: int, release: bool, **rest: Any
        ) -> Any:
            config = settings()
            wanted = not rank0 and "optimizer" in (sharded_state_dict or {})
            if wanted and config is None and args.optimizer == "adam":
                _refuse_muons(load_dir, iteration, release)
            if config is None or not wanted:
                return original(load_dir, args, rank0, sharded_state_dict, iteration, release, **rest)
            adopts = _is_adamws(_directory(load_dir, iteration, release), config)
            if adopts:
                for entry in _momenta(sharded_state_dict["optimizer"]):
                    entry.key = entry.key.replace(f"{PREFIX}.{MOMENTUM}.", f"{PREFIX}.{MEAN}.", 1)
            state, *others = original(load_dir, args, rank0, sharded_state_dict, iteration, release, **rest)
            if adopts:
                state["optimizer"] = adopted(state["optimizer"], config)
            return (state, *others)

        return load

    return seam


def _directory(load_dir: Any, iteration: int, release: bool) -> str:
    from megatron.training.checkpointing import get_checkpoint_name

    return str(get_checkpoint_name(load_dir, iteration, release, return_base_dir=True))


def _states(directory: str) -> tuple[set[str], set[str]]:
    """Names of the states that a torch_dist checkpoint has, by its metadata: per parameter, and in flat buckets."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    keys = list(load_tensors_metadata(directory))
    per_parameter = {key.removeprefix(f"{PREFIX}.").split(".", 1)[0] for key in keys if key.startswith(f"{PREFIX}.")}
    return per_parameter, {key.rsplit(".", 1)[-1] for key in keys if "optimizer.distributed." in key}


def _refuse_muons(load_dir: Any, iteration: int, release: bool) -> None:
    """Raises ValueError if a run with AdamW alone is about to load optimizer state of Muon."""
    directory = _directory(load_dir, iteration, release)
    if MOMENTUM in set.union(*_states(directory)):
        raise ValueError(
            f"{directory}: got a checkpoint of Muon, expected one of AdamW; add --distributed-muon to go on with it, "
            "or --no-load-optim to keep the weights and start AdamW's state anew"
        )


def _is_adamws(directory: str, config: MuonConfig) -> bool:
    """Whether a torch_dist checkpoint's optimizer is AdamW alone, read from its metadata.

    Raises:
        ValueError: If it is and the flags do not say how to go on from it.
        NotImplementedError: If it is, in a format that has no tensors of parameters.
    """
    per_parameter, in_buckets = _states(directory)
    states = per_parameter | in_buckets
    if MEAN not in states or MOMENTUM in states:
        return False
    if config.init_from_adamw == "refuse":
        raise ValueError(
            f"{directory}: got a checkpoint of AdamW alone, expected one of Distributed Muon; add {_FLAG} momentum to "
            f"start Muon's momentum from {MEAN}, {_FLAG} fresh to start it from zero (both keep the other parameters' "
            "state), or --no-load-optim to drop all optimizer state"
        )
    if MEAN not in per_parameter:
        raise NotImplementedError(
            f"{directory}: {_FLAG} {config.init_from_adamw}: got optimizer state in flat buckets (dp_reshardable), "
            "expected one tensor per parameter; resume it once with AdamW and --dist-ckpt-optim-fully-reshardable, and "
            "continue what that saves"
        )
    return True


def _momenta(state: dict[Any, Any]) -> Iterator[Any]:
    """The entries of an optimizer's sharded state dict that ask for Muon's momentum in model space."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    for entry in nested_values(state):
        if str(getattr(entry, "key", "")).startswith(f"{PREFIX}.{MOMENTUM}."):
            yield entry


def adopted(state: dict[Any, Any], config: MuonConfig) -> dict[int, dict[str, Any]]:
    """AdamW's loaded optimizer state as the state of a chain of AdamW's and Muon's optimizers.

    Args:
        state: By position in the chain: `param_state`, where Muon's `momentum_buffer` holds what was `exp_avg`. All
            else is as AdamW saved it: of one optimizer at the top, or of a chain of another length by position.
        config: Says what becomes of `exp_avg`.

    Returns:
        By position, entries that `CheckpointedChain.load_state_dict` takes. Momentum is changed in place.
    """
    own = {key: value for key, value in state.items() if isinstance(key, int)}
    saved = [state] if "optimizer" in state else [entry for entry in own.values() if "optimizer" in entry]
    groups = [group for entry in saved for group in entry["optimizer"]["param_groups"]]
    rest = {k: v for k, v in saved[0].items() if isinstance(k, str) and k not in ("optimizer", "param_state")}

    def entry(kind: str, **own: Any) -> dict[str, Any]:
        return {**rest, **own, "optimizer": {"kind": kind, "param_groups": groups}}

    # Without parameter state: what an optimizer is told that stores nothing on this rank.
    out = {-2: entry("adam"), -1: entry("muon")}
    for at, param_state in ((at, part["param_state"]) for at, part in own.items() if "param_state" in part):
        momenta = [states[MOMENTUM] for states in param_state.values() if MOMENTUM in states]
        for momentum in momenta:
            _start(momentum, config)
        out[at] = entry("muon" if momenta else "adam", param_state=param_state)
    how = f"{MEAN} / (1 - {config.momentum})" if config.init_from_adamw == "momentum" else "zero"
    say(f"{_FLAG} {config.init_from_adamw}: the checkpoint is AdamW's; Muon's {MOMENTUM} starts from {how}")
    return out


def _start(momentum: Tensor, config: MuonConfig) -> None:
    if config.init_from_adamw == "fresh":
        momentum.zero_()
    else:
        momentum.div_(1.0 - config.momentum)
