"""Experts in Transformer Engine's FP8, everything else in bf16, through Megatron-Core's own settings.

Megatron enters Transformer Engine's FP8 autocast once for a layer (once for all layers under delayed scaling) if
`TransformerConfig.fp8` is set, and a Transformer Engine linear whose name a precision file matches overrides it around
its own forward pass. So FP8 is switched on as for a whole model, and `moe_fp8.yaml` switches it off again for all
linears but the experts'. The other way round, FP8 for experts only where a file names them, cannot do: such a rule
takes no delayed scaling, and without `TransformerConfig.fp8` Megatron neither pads tokens for FP8 nor keeps FP8
weights.

Norms, router and embeddings have no FP8 form. What autocast does to attention's products is off by default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megatron_muon.config import MoeFp8
from megatron_muon.megatron.entry.fp8_checks import (
    RECIPES,
    Fp8Machine,
    check_dimension,
    check_machine,
    check_names,
    this_machine,
)

if TYPE_CHECKING:
    from torch import nn

PRECISION_FILE = Path(__file__).with_name("expert_fp8.yaml")

# Names of experts' linears in Megatron-Core's MoELayer; tokens reach them through its router alone.
_EXPERT = re.compile(r"(^|\.)mlp\.(shared_)?experts\.")

# How the flags are spelled that `implied_arguments` sets.
_FLAGS = MappingProxyType({"fp8": "--fp8-format"})


def is_expert(name: str) -> bool:
    """Whether a module or parameter of this name belongs to a routed or shared expert."""
    return _EXPERT.search(name) is not None


def implied_arguments(moe_fp8: MoeFp8) -> Mapping[str, Any]:
    """What `--muon-moe-fp8` sets in Megatron's parsed arguments, by destination."""
    return {
        "fp8": RECIPES[moe_fp8].format,
        "fp8_recipe": moe_fp8,
        "te_precision_config_file": str(PRECISION_FILE),
        "moe_grouped_gemm": True,
        "moe_router_padding_for_quantization": True,
    }


def spell(dest: str, value: Any) -> str:
    """The words on a command line that set an implied argument."""
    flag = _FLAGS.get(dest, f"--{dest.replace('_', '-')}")
    return flag if value is True else f"{flag} {value}"


def config_settings(moe_fp8: MoeFp8) -> dict[str, Any]:
    """What a training loop without Megatron's flags gives its `TransformerConfig`; `fp8_param=True` may be added."""
    from megatron.core.quantization.utils import load_quantization_recipe

    settings = dict(implied_arguments(moe_fp8))
    settings["quant_recipe"] = load_quantization_recipe(settings.pop("te_precision_config_file"))
    return settings


def prepare_model(
    module: nn.Module,
    moe_fp8: MoeFp8,
    *,
    emulate: Callable[[nn.Module, str, str], object] | None = None,
    machine: Fp8Machine | None = None,
) -> None:
    """Sees to it that a model's FP8 is what was asked for, before DDP wraps it. Issues no collective.

    Args:
        module: The model chunk, with Megatron's `config`. Mutated by `emulate` alone.
        moe_fp8: The setting.
        emulate: The CPU backend's function for models without Transformer Engine; None without that backend.
        machine: What to check against; None asks this machine.

    Raises:
        ValueError: If the model's config, or the shape of an expert's weight, does not fit.
        RuntimeError: If another layer than an expert's would be FP8, an expert would not, or the machine cannot.
    """
    config: Any = getattr(module, "config", None)
    if moe_fp8 == "off":
        if getattr(config, "fp8", None):
            check_names("TransformerConfig.fp8", config.fp8, "TransformerConfig.fp8_recipe", config.fp8_recipe)
            recipe = getattr(config.fp8_recipe, "value", config.fp8_recipe)
            flag = f"TransformerConfig.fp8_recipe {recipe}"
            check_machine(recipe, flag, machine or this_machine(), device=emulate is None)
        return
    if not getattr(config, "num_moe_experts", None):
        raise ValueError(
            f"moe_fp8: got {moe_fp8!r}, expected 'off' for a model without experts; omit it, or use "
            "TransformerConfig.fp8 for the whole model"
        )
    if emulate is not None and not any(_overrides_precision(m) for m in module.modules()):
        _check_shapes(module, moe_fp8)
        emulate(module, moe_fp8, RECIPES[moe_fp8].format)
        return
    check_machine(moe_fp8, f"moe_fp8 {moe_fp8}", machine or this_machine(), device=emulate is None)
    for name, expected in config_settings(moe_fp8).items():
        got = getattr(config, name, None)
        # What a recipe of the loop's own does is checked below.
        fits = got is not None if name == "quant_recipe" else getattr(got, "value", got) == expected
        if not fits:
            wanted = PRECISION_FILE.name if name == "quant_recipe" else repr(expected)
            raise ValueError(
                f"TransformerConfig.{name}: got {got!r}, expected {wanted} with moe_fp8 {moe_fp8!r}; build the "
                "model with TransformerConfig(**config_settings(...)) of megatron_muon.megatron.model.expert_fp8"
            )
    _check_linears(module, moe_fp8)
    _check_shapes(module, moe_fp8)


def _overrides_precision(module: nn.Module) -> bool:
    """Whether it is one of Megatron's Transformer Engine linears, which alone have a precision of their own."""
    return hasattr(module, "will_execute_quantized")


def _check_linears(module: nn.Module, moe_fp8: str) -> None:
    from megatron.core.fp8_utils import is_float8tensor

    for name, linear in module.named_modules():
        if not _overrides_precision(linear):
            continue
        expert = is_expert(name)
        # Within the layer's autocast, which Megatron leaves out where --first-last-layers-bf16 says so.
        if linear.will_execute_quantized(True) != expert:
            raise RuntimeError(
                f"{name}: got {'bf16' if expert else 'FP8'}, expected {'FP8' if expert else 'bf16'} with moe_fp8 "
                f"{moe_fp8!r}; {PRECISION_FILE.name} does not fit this model: please report it, or omit the setting"
            )
        for weight_name, weight in linear.named_parameters(recurse=False):
            if not expert and is_float8tensor(weight):
                raise RuntimeError(
                    f"{name}.{weight_name}: got an FP8 weight, expected bf16 with moe_fp8 {moe_fp8!r}; omit "
                    "--fp8-param-gather"
                )


def _check_shapes(module: nn.Module, moe_fp8: str) -> None:
    for name, weight in module.named_parameters():
        # A shared expert's gate is no linear of its own: one row, in bf16.
        if is_expert(name) and weight.dim() >= 2 and "linear_fc" in name:
            for numel in weight.shape[-2:]:
                check_dimension(name, numel, moe_fp8, f"moe_fp8 {moe_fp8}")


def layer_name(name: str | None, layer_number: int) -> str:
    """The name of a transformer layer, for `moe_fp8.yaml` to match while the layer is built.

    Megatron-Core 0.19's `TransformerBlock` names no layer; the model names all linears once they are built, which is
    early enough for the forward pass, but too late for their weights: with FP8 weights attention's would be FP8 too.
    """
    return name if name is not None else f"decoder.layers.{layer_number}"
