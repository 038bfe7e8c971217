"""Stock Megatron-Core and `megatron.training` on a machine without CUDA, over Gloo.

For development, continuous integration and demonstrations: `install()` replaces, in this process, the few functions
of torch and Megatron that need CUDA. Importing this package changes nothing.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_muon.megatron.entry.patching import Patch, apply_patches, mismatch_error

from .flags import REQUIRED_FLAGS, cpu_arguments

__all__ = ["REQUIRED_FLAGS", "all_patches", "cpu_arguments", "emulate_fp8", "install", "is_installed"]

VERIFIED_MEGATRON_CORE = ("0.18.2", "0.19.2")
_WHAT = "the CPU backend"
_REMEDY = (
    f"it is verified with megatron-core {' and '.join(VERIFIED_MEGATRON_CORE)}: pip install "
    f"megatron-core=={VERIFIED_MEGATRON_CORE[-1]}, or install a version of megatron_muon that was made for it"
)

# Whether `install` has run in this process; it alone sets it.
_installed = False


def is_installed() -> bool:
    """Whether `install()` has run in this process."""
    return _installed


def all_patches() -> list[Patch]:
    """Everything that `install()` replaces, each with its reason. Imports megatron.core."""
    from . import adam, collectives, devices, modules, runtime

    return [*devices.patches(), *collectives.PATCHES, *modules.patches(), *adam.PATCHES, *runtime.patches()]


def emulate_fp8(model: nn.Module, recipe: str, fp8_format: str) -> list[str]:
    """`fp8.emulate_fp8`: experts in emulated FP8. Imports megatron.core."""
    from .fp8 import emulate_fp8

    return emulate_fp8(model, recipe, fp8_format)


def install() -> None:
    """Makes torch and Megatron in this process work without CUDA. A second call does nothing.

    Call it before process groups and models are made, and once `sys.path` is final: it imports megatron.core, and
    megatron.training where that is installed. It needs no process group, and processes forked later inherit it.

    Raises:
        RuntimeError: If CUDA works here, or if a function to be replaced is missing or has changed in the installed
            Megatron-Core (its version is in the message). Nothing has been replaced then.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            f"the CPU backend is for machines without CUDA, but torch {torch.__version__} finds "
            f"{torch.cuda.device_count()} CUDA device(s). Run without it (no --device cpu), "
            "or hide the devices: CUDA_VISIBLE_DEVICES= (empty)."
        )
    try:
        table = all_patches()
        from .products import has_bf16_products, install_fp32_products
        from .runtime import quiet_rng_tracker
    except ImportError as error:
        # Modules of Megatron that this package builds on, imported by its own.
        if error.name is None or error.name.partition(".")[0] != "megatron":
            raise
        raise mismatch_error(_WHAT, str(error), _REMEDY) from error
    apply_patches(table, _WHAT, _REMEDY)
    quiet_rng_tracker()
    if not has_bf16_products():
        install_fp32_products()
    _installed = True
