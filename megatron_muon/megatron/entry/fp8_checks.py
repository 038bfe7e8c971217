"""Checks, before anything is built, what FP8 needs of a run's settings and machine.

Megatron ignores some of these problems (`TransformerConfig(fp8="e5m2")` trains in bf16 without Transformer Engine), and
others appear only in the first forward pass.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron_muon.config import MoeFp8
from megatron_muon.megatron.entry.checks import Refusal, flag_of, refuse

FORMATS = ("e4m3", "hybrid")


@dataclass(frozen=True)
class Fp8Machine:
    """What a rank's machine has for FP8.

    Attributes:
        te_version: Version of Transformer Engine; None where it is not installed.
        capability: Compute capability of this rank's CUDA device; None where there is none.
    """

    te_version: str | None
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class Fp8Recipe:
    """What an FP8 recipe of Transformer Engine needs.

    Attributes:
        format: Default format: hybrid has gradients in e5m2, e4m3 has everything in e4m3.
        block: Number of which both dimensions of a weight on a rank are multiples: the block with one scale, or what
            FP8 matrix products need.
        te_version: First Transformer Engine with which Megatron-Core uses the recipe for grouped products of experts.
        capability: Lowest compute capability.
        capability_end: First compute capability that no longer has it.
    """

    format: str
    block: int
    te_version: str
    capability: tuple[int, int]
    capability_end: tuple[int, int] | None = None

    def runs_on(self, capability: tuple[int, int] | None) -> bool:
        """Whether a CUDA device of this compute capability has the recipe; None stands for no device."""
        return capability is not None and self.capability <= capability < (self.capability_end or (99, 0))


# Sources: versions from megatron-core 0.19.2, fp8_utils.get_fp8_recipe and TransformerConfig; capabilities from
# Transformer Engine 2.20.2, quantization.py (_compute_*_support); blocks from its assert_dim_for_fp8_exec and
# is_quantizable; formats are its recipes' defaults.
RECIPES: Mapping[str, Fp8Recipe] = MappingProxyType(
    {
        "delayed": Fp8Recipe("hybrid", 16, "1.11.0", (8, 9)),
        "tensorwise": Fp8Recipe("hybrid", 16, "2.2.0", (8, 9)),
        "blockwise": Fp8Recipe("e4m3", 128, "2.3.0", (9, 0)),
        "mxfp8": Fp8Recipe("e4m3", 32, "2.1.0", (10, 0), (12, 0)),
    }
)

# Settings that contradict --muon-moe-fp8.
_FUSED = "fused layers take no precision of their own, so that dense ones would be FP8 as well"
_CONTRADICTIONS = (
    Refusal("fp8", "it makes all linears FP8, not the experts' alone", None, ValueError, "--fp8-format"),
    Refusal("fp4", "a run has one low-precision format", None, ValueError, "--fp4-format"),
    Refusal("fp8_output_proj", "the head stays in bf16", error=ValueError),
    Refusal("te_precision_config_file", "the flag brings such a file itself", None, ValueError),
    *(
        Refusal(f"use_{name}", _FUSED)
        for name in ("transformer_engine_op_fuser", "grouped_gemm_for_shared_expert", "grouped_gemm_for_dense_mlp")
    ),
)


def this_machine() -> Fp8Machine:
    """Looks for Transformer Engine and this rank's CUDA device, as Megatron does. Imports Transformer Engine."""
    import torch
    from megatron.core.utils import get_te_version

    version = get_te_version()
    capability = None
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")))
    return Fp8Machine(None if version.release == (0, 0, 0) else str(version), capability)


def check_arguments_fp8(
    args: argparse.Namespace, moe_fp8: MoeFp8, *, cpu: bool = False, machine: Fp8Machine | None = None
) -> None:
    """Checks everything FP8 in the parsed arguments of a run with `--distributed-muon`, before `validate_args`.

    Args:
        args: Megatron's arguments, before the flags that `--muon-moe-fp8` implies are set.
        moe_fp8: The value of `--muon-moe-fp8`.
        cpu: Whether the CPU backend is active; the device is not checked then.
        machine: What to check against; None asks this machine.

    Raises:
        ValueError: If settings contradict each other.
        NotImplementedError: If a valid setting is not supported with `--muon-moe-fp8`.
        RuntimeError: If this machine cannot run the recipe.
    """
    recipe, flag = moe_fp8, f"--muon-moe-fp8 {moe_fp8}"
    emulated = is_emulated(args, moe_fp8, cpu=cpu)
    if moe_fp8 == "off":
        if args.fp8 is None:
            if getattr(args, "fp8_param_gather", False):
                raise ValueError(
                    "--fp8-param-gather: got True, expected False without FP8; add --muon-moe-fp8 or --fp8-format, or "
                    "omit it"
                )
            return
        check_names("--fp8-format", args.fp8, "--fp8-recipe", args.fp8_recipe)
        recipe, flag = args.fp8_recipe, f"--fp8-recipe {args.fp8_recipe}"
    else:
        _check_contradictions(args, moe_fp8)
    if getattr(args, "first_last_layers_bf16", False) and recipe == "delayed":
        raise ValueError(
            f"--first-last-layers-bf16: got True, expected False with {flag}, which updates scales once for all "
            "layers; omit it, or choose another recipe"
        )
    _check_dispatcher(args, flag, implied=moe_fp8 != "off" and not emulated)
    if recipe in RECIPES:
        for name, numel in _dimensions(args, dense=moe_fp8 == "off"):
            check_dimension(name, numel, recipe, flag)
    if emulated:
        if getattr(args, "fp8_param_gather", False):
            raise NotImplementedError(
                "--fp8-param-gather: got True, expected False on a CPU, where --muon-moe-fp8 emulates the products and "
                "keeps weights as they are; omit it"
            )
        return
    if moe_fp8 != "off":
        _check_transformer_engine_layers(args, flag)
    check_machine(recipe, flag, machine or this_machine(), device=not cpu)


def is_emulated(args: argparse.Namespace, moe_fp8: MoeFp8, *, cpu: bool) -> bool:
    """Whether the CPU backend emulates the experts' FP8, which needs no Transformer Engine and none of its flags."""
    return moe_fp8 != "off" and cpu and bool(args.transformer_impl == "local")


def check_names(format_name: str, fp8_format: Any, recipe_name: str, recipe: Any) -> None:
    """Checks the names of a format and of a recipe, which Megatron's config does not.

    Raises:
        ValueError: If one is unknown.
    """
    if fp8_format not in FORMATS:
        raise ValueError(
            f"{format_name}: got {fp8_format!r}, expected {' or '.join(map(repr, FORMATS))}: gradients may be e5m2 "
            "(hybrid), weights and activations may not; correct it"
        )
    known = (*RECIPES, "custom")
    # Megatron's own Fp8Recipe is an Enum of these strings.
    if getattr(recipe, "value", recipe) not in known:
        raise ValueError(f"{recipe_name}: got {recipe!r}, expected one of {', '.join(map(repr, known))}; correct it")


def check_machine(recipe: str, flag: str, machine: Fp8Machine, *, device: bool = True) -> None:
    """Checks that Transformer Engine is there and, with `device`, that the device has the recipe.

    Args:
        recipe: Name of the recipe; with `custom` only Transformer Engine itself is checked.
        flag: Flag or setting that asks for it, for the message.
        machine: What the machine has.
        device: Whether the device is checked.

    Raises:
        RuntimeError: If not.
    """
    from packaging.version import Version

    needs = RECIPES.get(recipe, RECIPES["delayed"])
    if machine.te_version is None or Version(machine.te_version) < Version(needs.te_version):
        got = "none" if machine.te_version is None else machine.te_version
        raise RuntimeError(
            f"{flag}: got Transformer Engine {got}, expected {needs.te_version} or later; "
            "pip install 'megatron-muon[te]', or omit it"
        )
    if device and recipe in RECIPES and not needs.runs_on(machine.capability):
        end = needs.capability_end
        got = "no CUDA device" if machine.capability is None else f"compute capability {_dotted(machine.capability)}"
        others = [name for name, other in RECIPES.items() if other.runs_on(machine.capability)]
        remedy = f"choose {' or '.join(others)}" if others else "omit it"
        raise RuntimeError(
            f"{flag}: got {got}, expected {_dotted(needs.capability)} or later"
            f"{f', below {_dotted(end)}' if end else ''}; {remedy}"
        )


def check_dimension(name: str, numel: int, recipe: str, flag: str) -> None:
    """Checks one dimension of a weight as it is on a rank.

    Raises:
        ValueError: If it is no multiple of the recipe's block.
    """
    block = RECIPES[recipe].block
    if numel % block:
        smaller = [other for other, needs in RECIPES.items() if numel % needs.block == 0]
        remedy = f", or choose {' or '.join(smaller)}" if smaller else ""
        raise ValueError(
            f"{name}: got {numel} on a rank, expected a multiple of {block} with {flag}; change it or the "
            f"tensor-parallel size{remedy}"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _check_contradictions(args: argparse.Namespace, moe_fp8: str) -> None:
    if not args.num_experts:
        raise ValueError(
            f"--num-experts: got {args.num_experts}, expected at least 1 with --muon-moe-fp8, which is for experts; "
            "use --fp8-format and --fp8-recipe for a dense model"
        )
    refuse(_CONTRADICTIONS, args, "--muon-moe-fp8", remedy="omit one of the two")
    # Megatron's default is also what an unset flag reads as.
    if args.fp8_recipe not in ("delayed", moe_fp8):
        raise ValueError(
            f"--fp8-recipe: got {args.fp8_recipe!r}, expected {moe_fp8!r}, which --muon-moe-fp8 says; omit one of "
            "the two"
        )


def _check_dispatcher(args: argparse.Namespace, flag: str, *, implied: bool) -> None:
    """`implied`: the router is to pad, since --muon-moe-fp8 asks for it."""
    flags = ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8")
    given = [flag_of(name) for name in flags if getattr(args, name, False)]
    if (given or implied) and args.moe_token_dispatcher_type == "allgather":
        asked = given[0] if given else f"{flag}, which makes the router pad its tokens"
        raise ValueError(
            f"--moe-token-dispatcher-type: got 'allgather', expected 'alltoall' or 'flex' with {asked}; choose one of "
            "these"
        )


def _dimensions(args: argparse.Namespace, *, dense: bool) -> Iterator[tuple[str, int]]:
    """The dimensions, as on a rank, of the weights that become FP8: of experts, and with `dense` of dense MLPs.

    What a flag leaves to Megatron's defaults, and what does not divide, is Megatron's to find.
    """
    tensor_parallel = args.tensor_model_parallel_size
    expert_parallel = args.expert_tensor_parallel_size or tensor_parallel
    if args.hidden_size is not None:
        yield "--hidden-size", args.hidden_size
    split = []
    if dense and args.ffn_hidden_size is not None:
        split.append(("--ffn-hidden-size", args.ffn_hidden_size, tensor_parallel, "--tensor-model-parallel-size"))
    if args.num_experts:
        if args.moe_latent_size is not None:
            yield "--moe-latent-size", args.moe_latent_size
        name = "--ffn-hidden-size" if args.moe_ffn_hidden_size is None else "--moe-ffn-hidden-size"
        inner = args.moe_ffn_hidden_size or args.ffn_hidden_size
        split.append((name, inner, expert_parallel, "--expert-tensor-parallel-size"))
        shared = args.moe_shared_expert_intermediate_size
        split.append(("--moe-shared-expert-intermediate-size", shared, tensor_parallel, "--tensor-model-parallel-size"))
    for name, whole, ranks, flag in split:
        if whole is not None and whole % ranks == 0:
            yield (name if ranks == 1 else f"{name} {whole} / {flag} {ranks}"), whole // ranks


def _check_transformer_engine_layers(args: argparse.Namespace, flag: str) -> None:
    if args.transformer_impl != "transformer_engine":
        raise ValueError(
            f"--transformer-impl: got {args.transformer_impl!r}, expected 'transformer_engine' with {flag}; omit one "
            "of the two"
        )
    if not args.bf16:
        raise ValueError(f"--bf16: got False, expected True with {flag}, since all but the experts is bf16; add --bf16")
