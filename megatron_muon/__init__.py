"""Distributed Muon inside Megatron-Core's DistributedOptimizer.

Importing this package imports neither torch nor Megatron. A Megatron script runs with it through
`python -m megatron_muon.launch`; other training loops call `enable` before they wrap their model with DDP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
    from torch import nn

    from megatron_muon.config import MuonConfig

__all__ = ["MuonConfig", "enable", "get_megatron_optimizer"]


def enable(config: MuonConfig | None = None, **overrides: Any) -> MuonConfig:
    """Makes this process's Megatron-Core train matrices with Distributed Muon. For loops without Megatron's flags.

    Call it before the model is wrapped with `DistributedDataParallel`: parameters are tagged there, and Megatron's
    `get_megatron_optimizer`, also where a module has imported it by name, then builds Distributed Muon's optimizer.
    The loop's `OptimizerConfig` keeps `optimizer='adam'` and `use_distributed_optimizer=True`. Issues no collective;
    a later call replaces the settings.

    Args:
        config: The settings. Without it they come from `overrides`.
        **overrides: Fields of `MuonConfig`, and `preset` to choose what they override.

    Returns:
        The settings in use.

    Raises:
        ValueError: If a value or a name is bad, or both `config` and `overrides` are given.
        RuntimeError: If the Megatron version is not supported.
    """
    from megatron_muon.config import MuonConfig
    from megatron_muon.megatron.entry import active, arguments, seams

    if config is not None and overrides:
        raise ValueError(
            f"enable: got config and {', '.join(sorted(overrides))}, expected one or the other; use "
            "dataclasses.replace(config, ...)"
        )
    if config is None:
        preset = overrides.pop("preset", arguments.DEFAULT_PRESET)
        if active.cpu_backend_installed():
            overrides |= arguments.settings_for_cpu(preset, overrides)
        config = MuonConfig.from_preset(preset, **overrides)
    seams.install_core_seams()
    active.activate(config)
    return config


def get_megatron_optimizer(
    config: OptimizerConfig,
    model_chunks: list[nn.Module],
    config_overrides: Any = None,
    use_gloo_process_groups: bool = True,
    pg_collection: Any = None,
    dump_param_to_param_group_map: str | None = None,
    *,
    muon: MuonConfig | None = None,
) -> MegatronOptimizer:
    """Builds Distributed Muon's optimizer: Megatron's function of this name, with one more argument.

    The model chunks must have been wrapped with DDP after `enable`. Every rank must call it: it compares the ranks'
    plans with a collective.

    Args:
        config: As for Megatron, with `optimizer='adam'` and `use_distributed_optimizer=True`.
        model_chunks: The rank's DDP-wrapped model chunks.
        config_overrides: As for Megatron.
        use_gloo_process_groups: As for Megatron.
        pg_collection: As for Megatron.
        dump_param_to_param_group_map: As for Megatron.
        muon: Muon's settings; without them those of `enable`.

    Raises:
        ValueError: If a setting is bad.
        NotImplementedError: If a setting or layout is not supported.
        RuntimeError: If neither `muon` nor `enable` gave settings, or ranks disagree.
    """
    from megatron_muon.megatron.entry.active import active_config
    from megatron_muon.megatron.optimizer import build

    muon = muon or active_config()
    if muon is None:
        raise RuntimeError(
            "get_megatron_optimizer: Distributed Muon is not enabled in this process; call megatron_muon.enable() "
            "before wrapping the model with DistributedDataParallel"
        )
    return build.get_megatron_optimizer(
        config,
        model_chunks,
        config_overrides,
        use_gloo_process_groups,
        pg_collection,
        dump_param_to_param_group_map,
        muon=muon,
    )


def __getattr__(name: str) -> Any:
    # Imported when first asked for, so that importing the package stays quick.
    if name == "MuonConfig":
        from megatron_muon.config import MuonConfig

        return MuonConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
