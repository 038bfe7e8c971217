"""Runtime shims: where stock Megatron-Core is made to ask for Distributed Muon.

Each seam wraps one function, when asked to and once, and passes through to the original while Distributed Muon is not
active in the process. A target that is missing or whose parameters have changed raises and names the version: a seam
that no longer fits must not fall back to training without Muon.

| seam | why there |
|---|---|
| `megatron.training.arguments.parse_args` | adds the flags, and completes the arguments before `validate_args` |
| `DistributedDataParallel.__init__` | every loop wraps its model with it: tags decide which buffer a parameter gets |
| `TransformerLayer.__init__` | with FP8 weights for experts alone, a layer needs its name while it is built |
| `wrap_model_chunks_with_ddp`, `_ddp_wrap` | megatron.training computes DDP's layouts before it, and needs the tags |
| `setup_model_and_optimizer` | the first function after the process groups are made: ranks compare their settings |
| `get_megatron_optimizer` | every loop builds its optimizer with it |
| `get_mup_config_overrides` | muP's multipliers for AdamW's matrices must not reach Muon's |
| `clip_qk` | megatron.training clips with it once the optimizer has stepped; the optimizer has clipped already |
| `_load_global_dist_base_checkpoint` | knows the checkpoint's directory and what is asked of it, before it is read |
| `_load_base_checkpoint` | has read legacy files, and not yet given them to the optimizer |
| `dist_checkpointing.save`, `.load` | a manifest ends every save, and is checked before a load, in every loop |
| `FileSystemWriterAsync.write_preloaded_data` | knows which file could not be written; its callers drop that |
| `PersistentAsyncCaller.is_current_async_call_done` | waits for ever for a writer that was killed |
| `_get_checkpoint_format` | the first that looks at a checkpoint to be loaded, in every format |
| `save_checkpoint` | legacy files are written there, by no function of their own |
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_muon.config import MuonConfig
from megatron_muon.megatron.entry import arguments
from megatron_muon.megatron.entry.agreement import agree_on_settings, settings_of
from megatron_muon.megatron.entry.checks import check_megatron_version, check_mup
from megatron_muon.megatron.entry.kernels import check_fused_kernels
from megatron_muon.megatron.model import expert_fp8 as moe_fp8

if TYPE_CHECKING:
    from torch import nn

# Attribute of a replacement, so that a second installation finds the first.
SEAM_MARK = "__megatron_muon_seam__"

# The one place that says whether, and with which settings, Distributed Muon is active in this process.
_active: MuonConfig | None = None


def activate(config: MuonConfig | None) -> None:
    """Makes the installed seams use these settings from now on; None makes them pass through."""
    global _active
    _active = config


def active_config() -> MuonConfig | None:
    """The settings in use, or None if Distributed Muon is not active in this process."""
    return _active


def install_core_seams() -> None:
    """Installs the seams in megatron.core that every training loop passes. A second call does nothing.

    Raises:
        RuntimeError: If the Megatron version is not supported, a target has changed, or a library that Megatron would
            take kernels from does not work.
    """
    # Before Megatron is imported, which an incomplete library would fail.
    check_fused_kernels(cpu=cpu_backend_installed())
    version = check_megatron_version()
    from megatron.core import optimizer
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_muon.megatron.checkpoint import save_manifest as manifest
    from megatron_muon.megatron.checkpoint import writers

    _wrap(
        optimizer,
        "get_megatron_optimizer",
        _optimizer_seam,
        (
            "config",
            "model_chunks",
            "config_overrides",
            "use_gloo_process_groups",
            "pg_collection",
            "dump_param_to_param_group_map",
        ),
        version,
    )
    _wrap(
        optimizer,
        "get_mup_config_overrides",
        _mup_seam,
        ("config", "mup_width_mult", "optimizer_type"),
        version,
    )
    _wrap(
        importlib.import_module("megatron.core.optimizer.qk_clip"),
        "clip_qk",
        _clip_seam,
        ("model", "log_max_only"),
        version,
    )
    _wrap(
        DistributedDataParallel,
        "__init__",
        _ddp_seam,
        ("self", "config", "ddp_config", "module", "disable_bucketing", "pg_collection", "full_param_layout"),
        version,
    )
    _wrap(
        serialization,
        "save",
        manifest.saving_seam(active_config),
        ("sharded_state_dict", "checkpoint_dir"),
        version,
        exact=False,
    )
    _wrap(
        serialization,
        "load",
        manifest.loading_seam(active_config),
        ("sharded_state_dict", "checkpoint_dir", "sharded_strategy", "validate_access_integrity"),
        version,
        exact=False,
    )
    _wrap(
        FileSystemWriterAsync,
        "write_preloaded_data",
        writers.writing_seam,
        ("transform_list", "local_proc_idx", "write_bucket", "results_queue", "count_queue", "use_fsync", "kwargs"),
        version,
    )
    _wrap(
        PersistentAsyncCaller,
        "is_current_async_call_done",
        writers.waiting_seam,
        ("self", "blocking", "no_dist"),
        version,
    )
    _wrap(
        TransformerLayer,
        "__init__",
        _layer_seam,
        ("self", "config", "submodules", "layer_number"),
        version,
        exact=False,
    )


def install_training_seams() -> None:
    """Installs the seams in megatron.training, whose loop takes its settings from flags. A second call does nothing.

    Raises:
        RuntimeError: If a target has changed.
    """
    version = check_megatron_version()
    modules = [importlib.import_module(f"megatron.training.{name}") for name in ("arguments", "training")]
    from megatron_muon.megatron.checkpoint import adoption
    from megatron_muon.megatron.checkpoint import save_manifest as manifest

    dist_utils = importlib.import_module("megatron.training.models.dist_utils")
    _wrap(modules[1], "setup_model_and_optimizer", _agreement_seam, ("model_type",), version, exact=False)
    _wrap(modules[0], "parse_args", _parser_seam, ("extra_args_provider", "ignore_unknown_args"), version)
    checkpointing = importlib.import_module("megatron.training.checkpointing")
    opening, saving = manifest.opening_seam(active_config), manifest.legacy_saving_seam(active_config)
    _wrap(checkpointing, "_get_checkpoint_format", opening, ("checkpoint_name", "args"), version)
    _wrap(checkpointing, "save_checkpoint", saving, ("iteration", "model", "optimizer"), version, exact=False)
    _wrap(
        checkpointing,
        "_load_global_dist_base_checkpoint",
        adoption.loading_seam(active_config),
        ("load_dir", "args", "rank0", "sharded_state_dict", "iteration", "release"),
        version,
        exact=False,
    )
    _wrap(
        importlib.import_module("megatron.training.checkpointing"),
        "_load_base_checkpoint",
        adoption.legacy_loading_seam(active_config),
        ("load_dir", "args", "rank0"),
        version,
        exact=False,
    )
    _wrap(modules[1], "wrap_model_chunks_with_ddp", _tagging_seam, ("model_chunks",), version, exact=False)
    _wrap(dist_utils, "_ddp_wrap", _tagging_seam, ("model",), version, exact=False)


def cpu_backend_installed() -> bool:
    """Whether this package's CPU backend serves this process."""
    # Only asked once something has imported the backend: without it the answer is known.
    backend = sys.modules.get("megatron_muon.cpu")
    return backend is not None and bool(backend.is_installed())


def _wrap(
    owner: Any,
    name: str,
    seam: Callable[[Callable[..., Any]], Callable[..., Any]],
    parameters: tuple[str, ...],
    version: str,
    *,
    exact: bool = True,
) -> None:
    """Replaces `owner.name` by `seam(original)`, there and in every module that holds the original by name.

    Args:
        parameters: The original's parameters, in order; with `exact` False, those it must begin with.
        version: Megatron's version, for the message.

    Raises:
        RuntimeError: If the original is missing or has other parameters.
    """
    where = f"{owner.__module__}.{owner.__qualname__}" if inspect.isclass(owner) else owner.__name__
    original = getattr(owner, name, None)
    if original is None:
        raise RuntimeError(
            f"{where}.{name}: missing in megatron-core {version}, expected a function; this version of megatron_muon "
            "does not fit it"
        )
    if hasattr(original, SEAM_MARK):
        return
    got = tuple(inspect.signature(original).parameters)
    if (got if exact else got[: len(parameters)]) != parameters:
        raise RuntimeError(
            f"{where}.{name}: got parameters {got} in megatron-core {version}, expected {parameters}; this version of "
            "megatron_muon does not fit it"
        )
    replacement = functools.wraps(original)(seam(original))
    setattr(replacement, SEAM_MARK, True)
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(replacement) if static else replacement)
    for module in list(sys.modules.values()):
        # This package's own modules import originals to call them.
        if not inspect.ismodule(module) or module.__name__.startswith("megatron_muon"):
            continue
        for attribute, value in list(vars(module).items()):
            if value is original:
                setattr(module, attribute, replacement)


def _optimizer_seam(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_megatron_optimizer(
        config: Any,
        model_chunks: list[Any],
        config_overrides: Any = None,
        use_gloo_process_groups: bool = True,
        pg_collection: Any = None,
        dump_param_to_param_group_map: str | None = None,
    ) -> Any:
        rest = (config_overrides, use_gloo_process_groups, pg_collection, dump_param_to_param_group_map)
        if _active is None:
            return original(config, model_chunks, *rest)
        from megatron_muon.megatron.optimizer.build import get_megatron_optimizer as build

        return build(config, model_chunks, *rest, muon=_active)

    return get_megatron_optimizer


def _mup_seam(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_mup_config_overrides(config: Any, mup_width_mult: float, optimizer_type: str = "adam") -> Any:
        overrides = original(config, mup_width_mult, optimizer_type)
        if _active is None:
            return overrides
        check_mup(True, _active.scale_mode)
        return {_without_muons(key): override for key, override in overrides.items()}

    return get_mup_config_overrides


def _clip_seam(original: Callable[..., float]) -> Callable[..., float]:
    def clip_qk(model: list[Any], log_max_only: bool = False) -> float:
        """Returns the largest attention logit of this rank's part of the model."""
        from megatron_muon.megatron.optimizer.attention_clip import clip_of

        clip = None if _active is None else clip_of(model)
        return original(model, log_max_only) if clip is None else clip.largest

    return clip_qk


def _without_muons(key: Any) -> Any:
    """A key of muP's overrides that matches what it did, but for the parameters that are tagged as Muon's."""
    from megatron_muon.megatron.model.routing import TAG

    predicate = key.with_name_predicate

    def matches(parameter: nn.Parameter, name: str) -> bool:
        return not getattr(parameter, TAG, False) and bool(predicate.fn(parameter, name))

    return replace(key, with_name_predicate=replace(predicate, name=f"{predicate.name}_of_adamw", fn=matches))


def _ddp_seam(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(
        self: Any,
        config: Any,
        ddp_config: Any,
        module: nn.Module,
        disable_bucketing: bool = False,
        pg_collection: Any = None,
        full_param_layout: Any = None,
    ) -> None:
        # A model without DistributedOptimizer, such as a frozen reference model, is not Muon's to train.
        if _active is not None and ddp_config.use_distributed_optimizer:
            emulate = sys.modules["megatron_muon.cpu"].emulate_fp8 if cpu_backend_installed() else None
            moe_fp8.prepare_model(module, _active.moe_fp8, emulate=emulate)
            _tag([module])
            if full_param_layout is not None and not _fits(full_param_layout, module, ddp_config):
                # Computed from the untagged parameters; DDP computes the same layout for the tagged ones.
                full_param_layout = None
        original(self, config, ddp_config, module, disable_bucketing, pg_collection, full_param_layout)

    return __init__


def _layer_seam(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, config: Any, submodules: Any, layer_number: int = 1, *args: Any, **kwargs: Any) -> None:
        if _active is not None and _active.moe_fp8 != "off":
            kwargs["name"] = moe_fp8.layer_name(kwargs.get("name"), layer_number)
        original(self, config, submodules, layer_number, *args, **kwargs)

    return __init__


def _tagging_seam(original: Callable[..., Any]) -> Callable[..., Any]:
    first = next(iter(inspect.signature(original).parameters))

    def tag_then_wrap(*args: Any, **kwargs: Any) -> Any:
        if _active is not None:
            _tag(args[0] if args else kwargs[first])
        return original(*args, **kwargs)

    return tag_then_wrap


def _parser_seam(original: Callable[..., Namespace]) -> Callable[..., Namespace]:
    from_flags: MuonConfig | None = None

    def parse_args(
        extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None,
        ignore_unknown_args: bool = False,
    ) -> Namespace:
        nonlocal from_flags
        changes: arguments.ParserChanges | None = None

        def add_flags(parser: ArgumentParser) -> ArgumentParser:
            nonlocal changes
            changes = arguments.add_arguments(parser)
            return parser if extra_args_provider is None else extra_args_provider(parser)

        args = original(add_flags, ignore_unknown_args)
        assert changes is not None, "Megatron's parse_args did not call extra_args_provider"
        if getattr(args, "yaml_cfg", None) is not None:
            # The YAML's values replace everything parsed; it knows none of the flags.
            if "--distributed-muon" in sys.argv:
                raise NotImplementedError(
                    "--yaml-cfg: got a file, expected none with --distributed-muon, which a YAML cannot express; give "
                    "the run's settings as flags"
                )
            return args
        config = arguments.apply(args, changes, cpu=cpu_backend_installed())
        # Arguments without --distributed-muon end what earlier ones began, but not what `enable` did.
        if config is not None or (from_flags is not None and _active is from_flags):
            activate(config)
        from_flags = config
        return args

    return parse_args


def _agreement_seam(original: Callable[..., Any]) -> Callable[..., Any]:
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        from megatron.training.global_vars import get_args

        # Also without --distributed-muon: on another rank it may be given.
        agree_on_settings(settings_of(_active, get_args()))
        return original(*args, **kwargs)

    return setup_model_and_optimizer


def _tag(model_chunks: list[nn.Module]) -> None:
    from megatron_muon.megatron.model.routing import tag_parameters

    assert _active is not None
    tag_parameters(model_chunks, _active)


def _fits(layout: Any, module: nn.Module, ddp_config: Any) -> bool:
    """Whether a layout given to DDP was computed for the parameters as they are tagged now."""
    from megatron.core.distributed.param_and_grad_buffer import group_params_for_buffers

    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = group_params_for_buffers(parameters, ddp_config.grad_reduce_in_fp32)
    return groups.keys() == layout.layouts.keys() and all(
        set(members) == set(layout.layouts[key].param_index_map) and indices == layout.layouts[key].param_indices
        for key, (members, indices) in groups.items()
    )
