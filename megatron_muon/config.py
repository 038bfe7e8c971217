"""Settings of Distributed Muon: the only home of defaults. Command-line flags are made from `MuonConfig`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from megatron_muon.newton_schulz.coefficients import coefficients, scaling_for
from megatron_muon.newton_schulz.names import BackendName, Iteration

Preset = Literal["moonlight", "megatron", "deepseek-v4", "keller"]
Variant = Literal["muon", "normuon", "adamuon"]
MomentumForm = Literal["heavy_ball", "ema"]
ScaleMode = Literal["rms", "spectral", "unit_rms_norm", "shape_scaling"]
FloatDtype = Literal["bf16", "fp16", "fp32"]
ExchangeDtype = Literal["bf16", "fp32"]
MomentumDtype = Literal["fp32", "bf16"]
TensorParallelMode = Literal["exact", "blockwise"]
QkvSplit = Literal["none", "qkv", "group", "head"]
MlaSplit = Literal["none", "part", "head"]
Balance = Literal["time", "flops"]
RouterOptimizer = Literal["muon", "adam"]
InitFromAdamW = Literal["refuse", "momentum", "fresh"]
MoeFp8 = Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"]

Group = Literal["update", "Newton-Schulz", "matrices", "exchange", "logging", "checkpoints", "FP8"]

if TYPE_CHECKING:
    import torch

    TORCH_DTYPES: Mapping[str, torch.dtype]


def __getattr__(name: str) -> Any:
    # The flags and their help are made without torch, which takes seconds to import.
    if name == "TORCH_DTYPES":
        import torch

        return MappingProxyType({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _setting(group: Group, default: Any, text: str, *, is_file: bool = False) -> Any:
    """A field with what its flag needs: the group it is shown in, its help, and whether it names a file to be read."""
    return field(default=default, metadata={"group": group, "help": text, "is_file": is_file})


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """How Muon's matrices are updated. Learning rate and weight decay are the parameter groups', as for AdamW.

    The defaults are Moonlight's (arXiv 2502.16982): with them AdamW's learning rate and weight decay carry over.

    Raises:
        ValueError: If a value is outside its range or not among its choices; the message names the field.
    """

    variant: Variant = _setting(
        "update",
        "muon",
        "what the orthogonalized matrix is divided by: muon: nothing; normuon: the root of a running "
        "mean square of each row of the long side; adamuon: that of each element, after orthogonalizing "
        "signs",
    )
    momentum: float = _setting("update", 0.95, "decay of the momentum buffer, m = momentum*m + gradient")
    momentum_form: MomentumForm = _setting(
        "update", "heavy_ball", "ema weighs gradients with 1 - momentum; the update is the same but for rounding"
    )
    momentum_dtype: MomentumDtype = _setting(
        "update", "fp32", "dtype of the momentum buffer; bf16 rounds stochastically"
    )
    nesterov: bool = _setting("update", True, "orthogonalize gradient + momentum*m instead of m")
    beta2: float = _setting("update", 0.95, "decay of the mean squares of normuon and adamuon")
    second_moment_eps: float = _setting(
        "update", 1e-08, "least mean square that normuon divides by; what adamuon adds to the root"
    )
    cautious_weight_decay: bool = _setting("update", False, "decay only the weights that the update shrinks as well")
    scale_mode: ScaleMode = _setting(
        "update",
        "rms",
        "factor on the orthogonalized matrix: rms: update_rms*sqrt(max(rows, cols)); spectral: "
        "sqrt(max(rows, cols)); unit_rms_norm: sqrt(rows/cols); shape_scaling: sqrt(max(1, rows/cols))",
    )
    update_rms: float = _setting(
        "update", 0.2, "root mean square of an update that scale mode rms aims at; 0.2 is AdamW's"
    )
    extra_scale_factor: float = _setting("update", 1.0, "another factor on every update")
    coefficients: str = _setting("Newton-Schulz", "keller", "Newton-Schulz coefficient set")
    ns_steps: int = _setting("Newton-Schulz", 5, "Newton-Schulz iterations")
    ns_dtype: FloatDtype = _setting("Newton-Schulz", "bf16", "dtype of the Newton-Schulz iterations")
    ns_backend: BackendName = _setting(
        "Newton-Schulz",
        "torch",
        "what runs Newton-Schulz: torch, or on CUDA the kernels of emerging-optimizers (bf16) or of "
        "gram-newton-schulz (bf16, fp16), which need max_team_size 1",
    )
    ns_method: Iteration = _setting(
        "Newton-Schulz",
        "auto",
        "iterate on the matrix, or on its Gram matrix (not in bf16); auto: the cheaper by shape",
    )
    qkv_split: QkvSplit = _setting(
        "matrices",
        "qkv",
        "what of a fused QKV weight is orthogonalized as one: all of it; its Q, K and V; those of each "
        "query group; those of each head",
    )
    mla_split: MlaSplit = _setting(
        "matrices",
        "none",
        "what of a weight of multi-head latent attention is orthogonalized as one: all of it; its parts "
        "(with and without rotary positions, keys, values); those of each head, and the output "
        "projection's heads",
    )
    split_gated: bool = _setting("matrices", True, "orthogonalize gate and up of a fused gated-MLP weight separately")
    splits: str = _setting(
        "matrices",
        "",
        "YAML file of rows that say which parameters are Muon's and how they are split; empty: none",
        is_file=True,
    )
    router: RouterOptimizer = _setting("matrices", "muon", "optimizer of MoE router weights")
    tp_mode: TensorParallelMode = _setting(
        "matrices",
        "exact",
        "exact: the whole matrix over tensor-parallel ranks; blockwise: each rank's piece as a matrix of its own",
    )
    exchange_dtype: ExchangeDtype = _setting("exchange", "bf16", "dtype of slices on the wire, to the owner and back")
    batched: bool = _setting("exchange", True, "run Newton-Schulz on stacks of matrices of equal shape")
    max_team_size: int = _setting(
        "exchange", 64, "most ranks that may share one matrix where that is faster; 1: none share"
    )
    balance: Balance = _setting(
        "exchange",
        "time",
        "what owners are chosen by: time, in which a team's messages count; or flops of Newton-Schulz alone",
    )
    links: str = _setting(
        "exchange",
        "",
        "file of `python -m megatron_muon.profile links --json`, whose figures owners are chosen by; "
        "empty: conservative defaults",
        is_file=True,
    )
    exchange_buffer_mb: int = _setting(
        "exchange", 1024, "MiB of exchange buffers that a rank keeps; a round may take a quarter of them"
    )
    log_interval: int = _setting("logging", 0, "log metrics of the updates every so many steps; 0: never")
    log_params: bool = _setting(
        "logging", False, "print, at start-up, every parameter's optimizer, logical matrices, owners and FLOPs"
    )
    metrics_dir: str = _setting("logging", "", "where muon_metrics.jsonl is written; empty: the TensorBoard directory")
    profile: int = _setting("logging", 0, "time the phases of every so many steps; 0: never")
    profile_dir: str = _setting(
        "logging", "", "where the ranks' traces are written; empty: muon_profile in the TensorBoard directory"
    )
    init_from_adamw: InitFromAdamW = _setting(
        "checkpoints",
        "refuse",
        "what a run that loads AdamW's checkpoint starts momentum from: its exp_avg, or zero (fresh)",
    )
    verify_checkpoint: bool = _setting(
        "checkpoints", True, "check a checkpoint's files and tensors against its manifest before loading"
    )
    verify_saves: bool = _setting(
        "checkpoints", False, "read every saved checkpoint back and compare it with what was written; training waits"
    )
    moe_fp8: MoeFp8 = _setting(
        "FP8",
        "off",
        "run the linears of routed and shared experts in Transformer Engine's FP8 with this recipe, and "
        "leave everything else in bf16; on a CPU: emulated",
    )

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(type(self)).items():
            self._check_type(name, annotation, getattr(self, name))
        self._check(0.0 <= self.momentum < 1.0, "momentum", "in [0, 1)")
        self._check(0.0 <= self.beta2 < 1.0, "beta2", "in [0, 1)")
        self._check(self.second_moment_eps > 0, "second_moment_eps", "positive")
        self._check(self.log_interval >= 0, "log_interval", "0 or more")
        self._check(self.profile >= 0, "profile", "0 or more")
        self._check(self.ns_steps >= 1, "ns_steps", "at least 1")
        self._check(self.max_team_size >= 1, "max_team_size", "at least 1")
        self._check(self.exchange_buffer_mb >= 1, "exchange_buffer_mb", "at least 1")
        self._check(self.update_rms > 0, "update_rms", "positive")
        self._check(self.extra_scale_factor > 0, "extra_scale_factor", "positive")
        coefficients(self.coefficients, self.ns_steps)
        self._check_backend()

    def _check_backend(self) -> None:
        """Refuses what the Newton-Schulz back end and method do not do; whether they run here is known at `bind`."""
        if self.ns_backend == "torch":
            # Forced in bf16, the Gram iteration is far off on decaying spectra.
            gram_in_bf16 = self.ns_method == "gram" and self.ns_dtype == "bf16"
            self._check(
                not gram_in_bf16, "ns_method", "auto or standard with ns_dtype bf16; or set ns_dtype fp32 or fp16"
            )
            return
        from megatron_muon.newton_schulz.backends import BACKEND_DTYPES

        dtypes = BACKEND_DTYPES[self.ns_backend]
        self._check(
            __getattr__("TORCH_DTYPES")[self.ns_dtype] in dtypes,
            "ns_dtype",
            f"one that back end {self.ns_backend} takes: {dtypes}",
        )
        self._check(
            self.max_team_size == 1, "max_team_size", f"1: teams multiply with torch, not with {self.ns_backend}"
        )
        self._check(
            scaling_for(self.coefficients) == "frobenius",
            "coefficients",
            f"another set with back end {self.ns_backend}",
        )
        self._check(
            self.ns_backend != "emerging" or self.ns_method != "gram", "ns_method", "auto or standard with emerging"
        )

    def _check(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"MuonConfig.{name}: got {getattr(self, name)!r}, expected {expected}")

    @staticmethod
    def _check_type(name: str, annotation: Any, value: Any) -> None:
        choices = get_args(annotation)
        if choices:
            if value not in choices:
                raise ValueError(f"MuonConfig.{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
        elif annotation is float:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"MuonConfig.{name}: got {value!r}, expected a finite number")
        elif not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
            raise ValueError(f"MuonConfig.{name}: got {value!r}, expected {annotation.__name__}")

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> MuonConfig:
        """A preset's settings, with `overrides` on top.

        Raises:
            ValueError: If the preset or an override's name is unknown, or a value is bad.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ValueError(f"MuonConfig has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**{**PRESETS[preset], **overrides})


# Sources: moonlight: arXiv 2502.16982 and MoonshotAI/Moonlight. megatron: megatron-core 0.19's own flag
# defaults, but for whole matrices instead of `--muon-tp-mode blockwise`.
# deepseek-v4: its report (hybrid coefficients, update RMS 0.18). keller: KellerJordan/Muon.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "moonlight": {},
        "megatron": {
            "momentum": 0.9,
            "nesterov": False,
            "coefficients": "you",
            "scale_mode": "spectral",
            "split_gated": False,
        },
        "deepseek-v4": {"coefficients": "deepseek_v4", "ns_steps": 10, "update_rms": 0.18},
        "keller": {"scale_mode": "shape_scaling"},
    }
)


def scale_factor(rows: int, cols: int, config: MuonConfig) -> float:
    """The factor that turns an orthogonalized logical matrix of `rows` x `cols` into its update, before lr.

    Source: `rms`: equation 4 of arXiv 2502.16982; the others: emerging-optimizers' modes of the same names.
    """
    base = {
        "rms": config.update_rms * math.sqrt(max(rows, cols)),
        "spectral": math.sqrt(max(rows, cols)),
        "unit_rms_norm": math.sqrt(rows / cols),
        "shape_scaling": math.sqrt(max(1.0, rows / cols)),
    }[config.scale_mode]
    return base * config.extra_scale_factor


def owner_factor(rows: int, cols: int, config: MuonConfig) -> float:
    """The factor that the owner of a logical matrix applies; the variants scale where the second moment is stored."""
    return scale_factor(rows, cols, config) if config.variant == "muon" else 1.0


def gradient_gain(config: MuonConfig) -> float:
    """What a gradient is multiplied with before it enters the momentum."""
    return 1.0 if config.momentum_form == "heavy_ball" else 1.0 - config.momentum
