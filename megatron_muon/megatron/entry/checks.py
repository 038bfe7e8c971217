"""Settings of Megatron that Distributed Muon cannot honour are refused here, before the first collective.

One table serves command lines, where a setting is a flag, and other training loops, where it is a field of
`OptimizerConfig` or `DistributedDataParallelConfig`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

SUPPORTED_VERSIONS = ">=0.18.2,<0.21"


@dataclass(frozen=True)
class Refusal:
    """A setting of Megatron that must keep one value.

    Attributes:
        setting: The attribute, the same on parsed arguments and on Megatron's configs.
        why: Why no other value works.
        expected: The value that it must have. An object without the attribute passes.
        error: ValueError where the request contradicts itself, NotImplementedError where it is only not supported.
        flag: The command-line flag, where it is not made of the attribute's name.
    """

    setting: str
    why: str
    expected: Any = False
    error: type[Exception] = NotImplementedError
    flag: str = ""


_NO_BUFFERS = "momentum is sharded over the buffers of DistributedOptimizer, which FSDP does not have"
_OPTIMIZER = (
    Refusal("use_precision_aware_optimizer", "its low-precision state is kept by Transformer Engine's Adam alone"),
    Refusal("optimizer_cpu_offload", "the exchange needs momentum and gradients on the training device"),
    Refusal(
        "overlap_param_gather_with_optimizer_step",
        "parameters may be gathered only once Muon and AdamW have both stepped",
    ),
    Refusal("optimizer_cuda_graph", "the exchange's collectives and host-side plan cannot be captured"),
    Refusal(
        "use_layer_wise_distributed_optimizer",
        "momentum is sharded by Megatron's DistributedOptimizer instead",
        error=ValueError,
    ),
)
_DDP = (
    Refusal("fp4_param_gather", "only FP8 and bf16 parameters are gathered after Muon's update"),
    Refusal("use_megatron_fsdp", _NO_BUFFERS),
    Refusal("use_custom_fsdp", _NO_BUFFERS),
)
# Only on command lines: Megatron passes these to other parts than the optimizer and DDP.
_ARGUMENTS = (
    Refusal("use_torch_fsdp2", _NO_BUFFERS),
    Refusal(
        "use_layer_wise_param_layout",
        "it chooses a layout of the layer-wise optimizer, which Distributed Muon replaces",
        expected=True,
        flag="--no-use-layer-wise-param-layout",
        error=ValueError,
    ),
    Refusal("dump_param_to_param_group_map", "the file has no place for the two optimizers", expected=None),
    Refusal("freeze_all_layers", "it leaves nothing to train and switches DistributedOptimizer off", error=ValueError),
)
_NOT_NEGATIVE = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "weight_decay")


def refuse(
    refusals: Iterable[Refusal], owner: Any, feature: str = "Distributed Muon", *, where: str = "", remedy: str = ""
) -> None:
    """Raises the error of the first refusal that applies.

    Args:
        refusals: Settings that must keep their values.
        owner: Parsed arguments, or one of Megatron's configs.
        feature: What does not work with other values, for the message.
        where: Name of the config; without it the message names the flag.
        remedy: What to do; by default to omit the flag or to set the config's field.
    """
    for refusal in refusals:
        got = getattr(owner, refusal.setting, refusal.expected)
        if got == refusal.expected:
            continue
        name = f"{where}.{refusal.setting}" if where else refusal.flag or flag_of(refusal.setting)
        what = remedy or (f"set it to {refusal.expected!r}" if where else "omit it")
        raise refusal.error(f"{name}: got {got!r}, expected {refusal.expected!r} with {feature}: {refusal.why}; {what}")


def flag_of(setting: str) -> str:
    """The flag whose value argparse stores as `setting`."""
    return f"--{setting.replace('_', '-')}"


def check_arguments(args: argparse.Namespace) -> None:
    """Checks parsed arguments, before Megatron's `validate_args`, of a run with `--distributed-muon`.

    Raises:
        ValueError: If a value is bad or contradicts `--distributed-muon`.
        NotImplementedError: If a feature is asked for that Distributed Muon does not support.
    """
    _check_optimizer_name(args.optimizer)
    refuse((*_DDP, *_ARGUMENTS, *_OPTIMIZER), args)
    if not args.use_distributed_optimizer:
        raise ValueError(
            "--use-distributed-optimizer: got False, expected True with --distributed-muon, which shards momentum in "
            "Megatron's DistributedOptimizer; add --use-distributed-optimizer"
        )
    if (
        getattr(args, "fp8_param_gather", False)
        and getattr(args, "fp8_recipe", None) == "mxfp8"
        and not getattr(args, "reuse_grad_buf_for_mxfp8_param_ag", False)
    ):
        raise ValueError(
            "--reuse-grad-buf-for-mxfp8-param-ag: got False, expected True with --fp8-param-gather and --fp8-recipe "
            "mxfp8, since its parameters cannot lie in a buffer of DDP; add it"
        )
    for name in _NOT_NEGATIVE:
        _check_not_negative(flag_of(name), getattr(args, name, None))
    _check_loss_scale("--loss-scale", args.fp16, args.loss_scale)
    if getattr(args, "qk_clip", False):
        from megatron_muon.rule.qk_clip import ClipRule

        ClipRule(args.qk_clip_threshold, args.qk_clip_alpha)  # raises
    check_checkpoint_step(args, legacy=args.ckpt_format == "torch")
    if getattr(args, "dist_ckpt_optim_fully_reshardable", False):
        from megatron_muon.megatron.checkpoint.state_keys_018 import check_format

        check_format()
    tensor_parallel = args.tensor_model_parallel_size
    for kind, ranks in (("", tensor_parallel), ("expert_", args.expert_tensor_parallel_size or tensor_parallel)):
        shards = getattr(args, f"{kind}tensor_parallel_num_weight_shards", None)  # 0.18 has neither
        if shards is not None and shards > ranks:
            raise NotImplementedError(
                f"{flag_of(kind)}tensor-parallel-num-weight-shards: got {shards}, expected at most the tensor-parallel "
                f"size {ranks} with --distributed-muon: weights that are split further and rematerialized are not "
                "supported; omit it"
            )


def check_checkpoint_step(args: argparse.Namespace, *, legacy: bool) -> None:
    """Checks that Megatron can find the optimizer state of the iteration that is to be loaded.

    Args:
        args: Parsed arguments.
        legacy: Whether the checkpoint is in Megatron's legacy files.

    Raises:
        NotImplementedError: If it would load another iteration's.
    """
    loads_optimizer = args.load is not None and not (args.no_load_optim or args.finetune)
    if legacy and loads_optimizer and args.ckpt_step:
        raise NotImplementedError(
            f"--ckpt-step: got {args.ckpt_step}, expected none with legacy files (--ckpt-format torch): Megatron would "
            "join that iteration's weights with the optimizer state of the last one; write the iteration into "
            "latest_checkpointed_iteration.txt in --load's directory instead, or add --no-load-optim"
        )


def check_variant(saved: str, current: str) -> None:
    """Checks that a checkpoint has the second moment that a variant of Muon needs to resume.

    Args:
        saved: Variant of the run that wrote the checkpoint.
        current: Variant of this run.

    Raises:
        ValueError: If it has none, or one of another kind.
    """
    if current in (saved, "muon"):
        return
    has = "no second moment" if saved == "muon" else f"{saved}'s second moment"
    raise ValueError(
        f"--muon-variant: got {current}, expected {saved}, the checkpoint's variant: it has {has}; add "
        f"--muon-variant {saved}, or --no-load-optim to keep the weights and start all optimizer state anew"
    )


def check_mup(use_mup: bool, scale_mode: str) -> None:
    """Checks that Muon's learning rate carries over between widths, which is what muP is for.

    Megatron leaves the learning rate of Muon's matrices alone under muP. Their update, lr * scale * O, must then have
    a spectral norm in proportion to sqrt(rows/cols), whatever the width (arXiv 2310.17813, condition 1).

    Raises:
        ValueError: If the scale grows with the width.
    """
    if use_mup and scale_mode not in ("unit_rms_norm", "shape_scaling"):
        raise ValueError(
            f"--muon-scale-mode: got {scale_mode!r}, expected 'unit_rms_norm' or 'shape_scaling' with --use-mup, since "
            "the update would grow with the root of the width; choose one of these, or omit --use-mup"
        )


def check_optimizer_config(config: OptimizerConfig, ddp_config: DistributedDataParallelConfig) -> None:
    """Checks the configs of a training loop that builds Distributed Muon's optimizer. Issues no collective.

    Args:
        config: The optimizer's config.
        ddp_config: The config that the model chunks were wrapped with.

    Raises:
        ValueError: If a value is bad or contradicts Distributed Muon.
        NotImplementedError: If a feature is asked for that Distributed Muon does not support.
    """
    from megatron.core.distributed.torch_fully_sharded_data_parallel_config import TorchFullyShardedDataParallelConfig

    if config.optimizer != "adam":
        raise ValueError(
            f"OptimizerConfig.optimizer: got {config.optimizer!r}, expected 'adam', which the parameters that are not "
            "Muon's get; set optimizer='adam' and give Muon's settings as a MuonConfig"
        )
    if isinstance(ddp_config, TorchFullyShardedDataParallelConfig):
        raise NotImplementedError(
            "ddp_config: got torch FSDP2's config, expected DistributedDataParallelConfig with Distributed Muon, since "
            f"{_NO_BUFFERS}; wrap the model with DistributedDataParallel"
        )
    refuse(_DDP, ddp_config, where="DistributedDataParallelConfig")
    refuse(_OPTIMIZER, config, where="OptimizerConfig")
    for where, owner in (("OptimizerConfig", config), ("DistributedDataParallelConfig", ddp_config)):
        if not owner.use_distributed_optimizer:
            raise ValueError(
                f"{where}.use_distributed_optimizer: got False, expected True with Distributed Muon, which shards "
                "momentum in Megatron's DistributedOptimizer; set it to True"
            )
    if not config.decoupled_weight_decay:
        raise NotImplementedError(
            "OptimizerConfig.decoupled_weight_decay: got False, expected True with Distributed Muon: a penalty in the "
            "gradient would be orthogonalized away; set it to True"
        )
    for name in _NOT_NEGATIVE:
        _check_not_negative(f"OptimizerConfig.{name}", getattr(config, name))
    _check_loss_scale("OptimizerConfig.loss_scale", config.fp16, config.loss_scale)


def check_megatron_version() -> str:
    """Returns the version of the Megatron-Core that is imported here.

    A Megatron-LM source tree on `sys.path` hides an installed wheel, so the imported code is checked.

    Raises:
        RuntimeError: If this package does not support that version.
    """
    from megatron.core.package_info import __version__ as version
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    if not SpecifierSet(SUPPORTED_VERSIONS).contains(version, prereleases=True):
        why = "which megatron_muon's seams were made for"
        if Version(version) < Version("0.18"):
            why = "since older ones have no buffers for the parameters of another optimizer, which momentum lies beside"
        raise RuntimeError(
            f"megatron-core: got {version}, expected {SUPPORTED_VERSIONS}, {why}; pip install "
            f"'megatron-core{SUPPORTED_VERSIONS}', or check out a Megatron-LM of that version"
        )
    return str(version)


def _check_optimizer_name(name: str) -> None:
    if name == "adaptive_muon":
        raise NotImplementedError(
            "--optimizer: got 'adaptive_muon', expected 'adam' with --distributed-muon; use --optimizer "
            "adam --muon-variant adamuon or normuon, or omit --distributed-muon"
        )
    # Scripts made for Megatron's own Muon say muon; dist_muon is its deprecated spelling.
    if name not in ("adam", "muon", "dist_muon"):
        raise ValueError(
            f"--optimizer: got {name!r}, expected 'adam' with --distributed-muon, since the parameters that are not "
            "Muon's get AdamW; use --optimizer adam, or omit --distributed-muon"
        )


def _check_not_negative(name: str, value: float | None) -> None:
    # None: the schedule or a parameter group sets it.
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: got {value}, expected a finite number, 0 or more; correct it")


def _check_loss_scale(name: str, fp16: bool, loss_scale: float | None) -> None:
    # Megatron scales dynamically when no scale is set.
    if fp16 and loss_scale is not None and loss_scale <= 1:
        raise ValueError(
            f"{name}: got {loss_scale}, expected None (dynamic) or more than 1 with fp16, whose small gradients vanish "
            "without loss scaling; omit it, or train in bf16"
        )
