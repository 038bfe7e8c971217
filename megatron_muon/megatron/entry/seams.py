"""The seams: functions of stock Megatron-Core that are replaced so that it asks for Distributed Muon.

One table says what is replaced, in which versions, and why; installation, the test of changed targets and
`docs/seams.md` are made from it. Each seam passes through to the original while Distributed Muon is not active in the
process, but for those that say otherwise.
"""

# More than 400 lines: half of them are the table of seams.

from __future__ import annotations

import functools
import inspect
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_muon.megatron.checkpoint import adoption, loading, saving
from megatron_muon.megatron.entry import arguments
from megatron_muon.megatron.entry.active import activate_by_flags, active_config, cpu_backend_installed
from megatron_muon.megatron.entry.agreement import agree_on_settings, settings_of
from megatron_muon.megatron.entry.checks import SUPPORTED_VERSIONS, check_megatron_version, check_mup
from megatron_muon.megatron.entry.kernels import check_fused_kernels, compile_helpers
from megatron_muon.megatron.entry.patching import Applied, Patch, apply_patches, undo
from megatron_muon.megatron.model import expert_fp8

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Seam(Patch):
    """A patch with the versions of megatron-core that need it; elsewhere it is not installed.

    Attributes:
        versions: As for pip.
        acts: When it does something other than call the original.
    """

    by_name: bool = True
    versions: str = SUPPORTED_VERSIONS
    acts: str = "with Distributed Muon"


# What has been installed in this process, by target. `install_*` add, `remove_seams` empties.
_installed: dict[str, list[Applied]] = {}


def install_core_seams() -> None:
    """Installs the seams in megatron.core that every training loop passes. A second call does nothing.

    Raises:
        RuntimeError: If the Megatron version is not supported, a target has changed, or a library that Megatron would
            take kernels from does not work.
    """
    # Before Megatron is imported, which an incomplete library would fail.
    check_fused_kernels(cpu=cpu_backend_installed())
    _install(CORE)


def install_training_seams() -> None:
    """Installs the seams in megatron.training, whose loop takes its settings from flags. A second call does nothing.

    Raises:
        RuntimeError: If the Megatron version is not supported, or a target has changed.
    """
    _install(TRAINING)


def remove_seams() -> None:
    """Gives Megatron its own functions back. For tests."""
    for applied in reversed(_installed.values()):
        undo(applied)
    _installed.clear()


def _install(seams: Sequence[Seam]) -> None:
    version = check_megatron_version()
    from packaging.specifiers import SpecifierSet

    missing = [
        seam
        for seam in seams
        if seam.target not in _installed and SpecifierSet(seam.versions).contains(version, prereleases=True)
    ]
    if missing:
        applied = apply_patches(missing, "megatron_muon", "install a version of megatron_muon that was made for it")
        _installed[missing[0].target] = applied
        _installed.update({seam.target: [] for seam in missing[1:]})


def get_megatron_optimizer(
    original: Callable[..., Any],
    config: Any,
    model_chunks: list[Any],
    config_overrides: Any = None,
    use_gloo_process_groups: bool = True,
    pg_collection: Any = None,
    dump_param_to_param_group_map: str | None = None,
) -> Any:
    """Builds Distributed Muon's optimizer in the place of Megatron's."""
    rest = (config_overrides, use_gloo_process_groups, pg_collection, dump_param_to_param_group_map)
    muon = active_config()
    if muon is None:
        return original(config, model_chunks, *rest)
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer as build

    return build(config, model_chunks, *rest, muon=muon)


def get_mup_config_overrides(
    original: Callable[..., Any], config: Any, mup_width_mult: float, optimizer_type: str = "adam"
) -> Any:
    """Takes Muon's parameters out of muP's overrides of learning rates."""
    overrides = original(config, mup_width_mult, optimizer_type)
    muon = active_config()
    if muon is None:
        return overrides
    check_mup(True, muon.scale_mode)
    return {_without_muons(key): override for key, override in overrides.items()}


def _without_muons(key: Any) -> Any:
    """A key of muP's overrides that matches what it did, except for the parameters that are tagged as Muon's."""
    from megatron_muon.megatron.model.routing import TAG

    predicate = key.with_name_predicate

    def matches(parameter: nn.Parameter, name: str) -> bool:
        return not getattr(parameter, TAG, False) and bool(predicate.fn(parameter, name))

    return replace(key, with_name_predicate=replace(predicate, name=f"{predicate.name}_of_adamw", fn=matches))


def clip_qk(original: Callable[..., float], model: list[Any], log_max_only: bool = False) -> Any:
    """Returns the largest attention logit of this rank's part of the model, which the optimizer has clipped.

    A 0-d tensor where Megatron returns a float: whoever writes the number waits for the device, and nobody else.
    """
    from megatron_muon.megatron.optimizer.attention_clip import clip_of

    clip = None if active_config() is None else clip_of(model)
    return original(model, log_max_only) if clip is None else clip.largest


def init_ddp(
    original: Callable[..., None],
    self: Any,
    config: Any,
    ddp_config: Any,
    module: nn.Module,
    disable_bucketing: bool = False,
    pg_collection: Any = None,
    full_param_layout: Any = None,
) -> None:
    """Tags Muon's parameters before DDP makes its buffers."""
    muon = active_config()
    # A model without DistributedOptimizer, such as a frozen reference model, is not Muon's to train.
    if muon is not None and ddp_config.use_distributed_optimizer:
        emulate = sys.modules["megatron_muon.cpu"].emulate_fp8 if cpu_backend_installed() else None
        expert_fp8.prepare_model(module, muon.moe_fp8, emulate=emulate)
        _tag([module])
        if full_param_layout is not None and not _fits(full_param_layout, module, ddp_config):
            # Computed from the untagged parameters; DDP computes the same layout for the tagged ones.
            full_param_layout = None
    original(self, config, ddp_config, module, disable_bucketing, pg_collection, full_param_layout)
    if muon is not None and ddp_config.use_distributed_optimizer and ddp_config.overlap_param_gather:
        for bucket_groups in (self.bucket_groups, self.expert_parallel_bucket_groups):
            _order_param_gathers(bucket_groups, module)


def _order_param_gathers(bucket_groups: Sequence[Any], module: nn.Module) -> None:
    """Makes the gather of each bucket group start that of the group which the forward pass needs next.

    Megatron links groups in the order of its buffers, in which all of one kind come before all of the other.
    """
    place = {parameter: index for index, parameter in enumerate(module.parameters())}
    order = sorted(bucket_groups, key=lambda group: min(place[p] for b in group.buckets for p in b.params_list))
    for group, following in zip(order, (*order[1:], None)):
        group.next_param_gather_bucket_group = following


def _fits(layout: Any, module: nn.Module, ddp_config: Any) -> bool:
    """Whether a layout given to DDP was computed for the parameters as they are tagged now."""
    from megatron.core.distributed.param_and_grad_buffer import group_params_for_buffers

    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = group_params_for_buffers(parameters, ddp_config.grad_reduce_in_fp32)
    return groups.keys() == layout.layouts.keys() and all(
        set(members) == set(layout.layouts[key].param_index_map) and indices == layout.layouts[key].param_indices
        for key, (members, indices) in groups.items()
    )


def init_transformer_layer(
    original: Callable[..., None],
    self: Any,
    config: Any,
    submodules: Any,
    layer_number: int = 1,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Gives a layer its name while it is built."""
    muon = active_config()
    if muon is not None and muon.moe_fp8 != "off":
        kwargs["name"] = expert_fp8.layer_name(kwargs.get("name"), layer_number)
    original(self, config, submodules, layer_number, *args, **kwargs)


def tag_then_wrap(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Tags Muon's parameters of the model chunks, the first argument, before Megatron computes layouts from them."""
    if active_config() is not None:
        _tag(args[0] if args else kwargs[next(iter(inspect.signature(original).parameters))])
    return original(*args, **kwargs)


def _tag(model_chunks: list[nn.Module]) -> None:
    from megatron_muon.megatron.model.routing import tag_parameters

    muon = active_config()
    assert muon is not None
    tag_parameters(model_chunks, muon)


def parse_args(
    original: Callable[..., Namespace],
    extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None,
    ignore_unknown_args: bool = False,
) -> Namespace:
    """Adds the flags, and completes the arguments before Megatron's `validate_args`."""
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
    activate_by_flags(arguments.apply(args, changes, cpu=cpu_backend_installed()))
    return args


def with_distributed_muon(original: Callable[..., Namespace]) -> Callable[..., Namespace]:
    """Decorates `parse_args` in a patched Megatron-LM tree (`patches/`), which then needs no launcher.

    The first call installs the other seams; without `--distributed-muon` they pass through, as under the launcher.
    """

    @functools.wraps(original)
    def decorated(
        extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None, ignore_unknown_args: bool = False
    ) -> Namespace:
        if _PARSE_ARGS in _installed:  # by the launcher
            return original(extra_args_provider, ignore_unknown_args)
        install_core_seams()
        _install([seam for seam in TRAINING if seam.target != _PARSE_ARGS])
        return parse_args(original, extra_args_provider, ignore_unknown_args)

    return decorated


def setup_model_and_optimizer(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compares the ranks' settings before the model is built. Collective over the world, also without the flag."""
    from megatron.training.global_vars import get_args

    agree_on_settings(settings_of(active_config(), get_args()))
    return original(*args, **kwargs)


_PARSE_ARGS = "megatron.training.arguments:parse_args"
_CHECKPOINTING = "megatron.core.dist_checkpointing"
CORE: tuple[Seam, ...] = (
    Seam(
        target="megatron.core.optimizer:get_megatron_optimizer",
        replacement=get_megatron_optimizer,
        why="every loop builds its optimizer with it",
        parameters=(
            *("config", "model_chunks", "config_overrides", "use_gloo_process_groups", "pg_collection"),
            "dump_param_to_param_group_map",
        ),
        exact=True,
    ),
    Seam(
        target="megatron.core.optimizer:get_mup_config_overrides",
        replacement=get_mup_config_overrides,
        why="muP's multipliers for AdamW's matrices must not reach Muon's",
        parameters=("config", "mup_width_mult", "optimizer_type"),
        exact=True,
    ),
    Seam(
        target="megatron.core.optimizer.qk_clip:clip_qk",
        replacement=clip_qk,
        why="megatron.training clips after the optimizer's step, which has clipped already",
        parameters=("model", "log_max_only"),
        exact=True,
    ),
    Seam(
        target="megatron.core.distributed:DistributedDataParallel.__init__",
        replacement=init_ddp,
        why="every loop wraps its model with it, and tags decide which buffer a parameter gets",
        parameters=(
            *("self", "config", "ddp_config", "module", "disable_bucketing", "pg_collection", "full_param_layout"),
        ),
        exact=True,
    ),
    Seam(
        target="megatron.core.transformer.transformer_layer:TransformerLayer.__init__",
        replacement=init_transformer_layer,
        why="with FP8 weights for experts alone, a layer needs its name while it is built",
        parameters=("self", "config", "submodules", "layer_number"),
        acts="with --muon-moe-fp8",
    ),
    Seam(
        target=f"{_CHECKPOINTING}.serialization:save",
        replacement=saving.save,
        why="a manifest ends every save, in every loop",
        parameters=("sharded_state_dict", "checkpoint_dir"),
    ),
    Seam(
        target=f"{_CHECKPOINTING}.serialization:load",
        replacement=loading.load,
        why="a checkpoint is checked before anything is read from it",
        parameters=("sharded_state_dict", "checkpoint_dir"),
    ),
    Seam(
        target=f"{_CHECKPOINTING}.strategies.filesystem_async:FileSystemWriterAsync.write_preloaded_data",
        replacement=saving.write_preloaded_data,
        why="it knows which file could not be written, which its callers leave out of the error",
        parameters=(
            *("transform_list", "local_proc_idx", "write_bucket", "results_queue", "count_queue", "use_fsync"),
            "kwargs",
        ),
        exact=True,
        acts="always",
    ),
    Seam(
        target=f"{_CHECKPOINTING}.strategies.filesystem_async:FileSystemWriterAsync.get_save_function_and_args",
        replacement=saving.get_save_function_and_args,
        why="names the function that writes a rank's files, in this process or another: it is to digest what it writes",
        parameters=("self",),
        exact=True,
    ),
    Seam(
        target=f"{_CHECKPOINTING}.strategies.filesystem_async:FileSystemWriterAsync.finish",
        replacement=saving.finish,
        why="gets the results of all ranks, with the digests of their files",
        parameters=("self", "metadata", "results"),
        exact=True,
    ),
    Seam(
        target=f"{_CHECKPOINTING}.strategies.async_utils:PersistentAsyncCaller.is_current_async_call_done",
        replacement=saving.is_current_async_call_done,
        why="it waits for ever for a writer that was killed",
        parameters=("self", "blocking", "no_dist"),
        exact=True,
        acts="always",
    ),
)
TRAINING: tuple[Seam, ...] = (
    Seam(
        target=_PARSE_ARGS,
        replacement=parse_args,
        why="adds the flags, and completes the arguments before `validate_args`",
        parameters=("extra_args_provider", "ignore_unknown_args"),
        exact=True,
        acts="always",
    ),
    Seam(
        target="megatron.core.datasets.utils:compile_helpers",
        replacement=compile_helpers,
        why="runs make, for which the wheel has no Makefile; the compiled helper is in it",
        acts="always",
    ),
    Seam(
        target="megatron.training.training:setup_model_and_optimizer",
        replacement=setup_model_and_optimizer,
        why="the first function after the process groups are made: ranks compare their settings",
        acts="always",
    ),
    Seam(
        target="megatron.training.training:wrap_model_chunks_with_ddp",
        replacement=tag_then_wrap,
        why="computes DDP's layouts before DDP does, and needs the tags",
        parameters=("model_chunks",),
    ),
    Seam(
        target="megatron.training.models.dist_utils:_ddp_wrap",
        replacement=tag_then_wrap,
        why="computes DDP's layouts before DDP does, and needs the tags",
        parameters=("model",),
    ),
    Seam(
        target="megatron.training.checkpointing:_get_checkpoint_format",
        replacement=loading.get_checkpoint_format,
        why="the first that looks at a checkpoint to be loaded, in every format",
        parameters=("checkpoint_name", "args"),
        exact=True,
    ),
    Seam(
        target="megatron.training.checkpointing:save_checkpoint",
        replacement=saving.save_checkpoint,
        why="legacy files are written there, not in a function of their own",
        parameters=("iteration", "model", "optimizer"),
        acts="with Distributed Muon and --ckpt-format torch",
    ),
    Seam(
        target="megatron.training.checkpointing:_load_global_dist_base_checkpoint",
        replacement=adoption.load_global_dist_base_checkpoint,
        why="knows a checkpoint's directory and what is asked of it, before it is read",
        parameters=("load_dir", "args", "rank0", "sharded_state_dict", "iteration", "release"),
        acts="always: stock optimizers cannot continue Distributed Muon's checkpoints, and are told so",
    ),
    Seam(
        target="megatron.training.checkpointing:_load_base_checkpoint",
        replacement=adoption.load_base_checkpoint,
        why="has read legacy files, and not yet given them to the optimizer",
        parameters=("load_dir", "args", "rank0"),
        acts="always: stock optimizers cannot continue Distributed Muon's checkpoints, and are told so",
    ),
)


# Versions that docs/seams.md has a column for, each with what the tests are run on.
DOCUMENTED_VERSIONS = {"0.18": "0.18.2", "0.19": "0.19.2", "0.20": "0.20.0"}


def markdown() -> str:
    """The table of seams, as `docs/seams.md` has it: one column for each version of megatron-core."""
    from packaging.specifiers import SpecifierSet

    rows = [("function", "why there", "acts", *DOCUMENTED_VERSIONS), ("---",) * (3 + len(DOCUMENTED_VERSIONS))]
    for seam in (*CORE, *TRAINING):
        installed = (SpecifierSet(seam.versions).contains(version) for version in DOCUMENTED_VERSIONS.values())
        rows.append((f"`{seam.target}`", seam.why, seam.acts, *("yes" if yes else "not needed" for yes in installed)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
