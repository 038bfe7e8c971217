"""Back ends of `orthogonalize`: PyTorch's products, or kernels of other packages where they are installed.

A back end is chosen by name and never replaced by another one: a choice that is not available raises an error with the
remedy. The kernels of other packages were not run on a GPU here; tests put stand-ins in their place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType, ModuleType
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from megatron_muon.newton_schulz.coefficients import Scaling, Schedule, check_schedule
from megatron_muon.newton_schulz.cost import check_iteration, restart_segments
from megatron_muon.newton_schulz.iterations import MARGIN, normalize, orthogonalize
from megatron_muon.newton_schulz.names import BackendName, Iteration

BACKEND_DTYPES: Mapping[str, tuple[torch.dtype, ...]] = MappingProxyType(
    {
        "torch": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        "emerging": (torch.bfloat16,),
        "gram-newton-schulz": (torch.float16, torch.bfloat16),
    }
)
"""Data types in which each back end iterates."""

# Both packages load tiles with the Tensor Memory Accelerator, whose rows begin at multiples of 16 bytes: 8 elements of
# 16 bits. Sources: `TensorDescriptor` in Triton's documentation; tensor map strides in the CUDA driver API.
_ROW_ELEMENTS = 8

# gram-newton-schulz 0.1.6 leaves matrices with a shorter side of up to 256 to torch's products.
_GRAM_PACKAGE_TILE = 256

Step = Callable[[Tensor, float, float, float], Tensor]


class Orthogonalize(Protocol):
    """What a back end is: a function with the contract of `orthogonalize`."""

    def __call__(
        self,
        x: Tensor,
        schedule: Schedule,
        *,
        iteration: Iteration = "auto",
        scaling: Scaling = "frobenius",
    ) -> Tensor:
        """Returns U p(S) V^T for each matrix of x; raises ValueError for arguments that the back end does not take."""
        ...


def shapes_problem(name: BackendName, shapes: Iterable[tuple[int, int]]) -> str | None:
    """Says which logical matrices the kernels of a back end cannot take. Needs neither the package nor a GPU.

    Args:
        name: The back end.
        shapes: (rows, cols) of the logical matrices.

    Returns:
        None if it can take all of them.
    """
    smallest = {"torch": None, "emerging": 1, "gram-newton-schulz": _GRAM_PACKAGE_TILE + 1}[name]
    if smallest is None:
        return None
    refused = sorted(
        {s for s in shapes if min(s) >= smallest and (s[0] % _ROW_ELEMENTS or s[1] % _ROW_ELEMENTS)}, reverse=True
    )
    if not refused:
        return None
    listed = ", ".join(f"{rows} x {cols}" for rows, cols in refused[:3]) + (", ..." if len(refused) > 3 else "")
    return (
        f"Newton-Schulz back end {name!r}: got logical matrices of {len(refused)} shapes that its kernels cannot load "
        f"({listed}), expected both sides to be multiples of {_ROW_ELEMENTS} elements, which are 16 bytes; take the "
        "back end 'torch'"
    )


def emerging_syrk(step: Step) -> Orthogonalize:
    """The standard iteration on emerging-optimizers' Triton kernel for symmetric products (bfloat16, CUDA).

    The package's step is called rather than its ``newton_schulz``, which takes the kernel only if the process-wide
    float32 matmul precision is "medium".

    Args:
        step: (X, a, b, c) -> (a I + b X X^T + c (X X^T)^2) X on one bfloat16 matrix; ``newton_schulz_step_tsyrk`` of
            emerging-optimizers 0.3.
    """

    @torch.no_grad()
    def run(
        x: Tensor,
        schedule: Schedule,
        *,
        iteration: Iteration = "auto",
        scaling: Scaling = "frobenius",
    ) -> Tensor:
        _check_arguments("emerging", x, ("auto", "standard"), iteration, scaling)
        check_schedule(schedule, scaling)
        result = normalize(x)
        tall = x.size(-2) > x.size(-1)
        # One matrix after the other: the kernel takes 2-D input.
        for matrix in result.view(-1, *x.shape[-2:]):
            y = matrix.mT if tall else matrix
            for a, b, c in schedule:
                y = step(y, a, b, c)
            matrix.copy_(y.mT if tall else y)
        return result

    return run


def gram_package(factory: Callable[..., Callable[[Tensor], Tensor]]) -> Orthogonalize:
    """Dao-AILab's gram-newton-schulz: Gram iteration in float16 on CuTe symmetric kernels (Hopper, Blackwell).

    The package iterates in float16 whatever it is given, so that float32 input is refused rather than rounded.
    bfloat16 input is normalized first and keeps all its bits.

    Args:
        factory: The class ``GramNewtonSchulz`` of gram-newton-schulz 0.1.6.
    """

    # One object per schedule and iteration: it builds its closures when it is made.
    @lru_cache(maxsize=32)
    def build(schedule: Schedule, gram: bool) -> Callable[[Tensor], Tensor]:
        return factory(
            ns_epsilon=MARGIN,
            ns_use_kernels=True,
            ns_coefficients=[list(step) for step in schedule],
            use_gram_newton_schulz=gram,
            gram_newton_schulz_reset_iterations=list(accumulate(restart_segments(len(schedule))))[:-1],
            # The package's default captures CUDA graphs, whose output the next call overwrites.
            compile_kwargs=None,
        )

    @torch.no_grad()
    def run(
        x: Tensor,
        schedule: Schedule,
        *,
        iteration: Iteration = "auto",
        scaling: Scaling = "frobenius",
    ) -> Tensor:
        _check_arguments("gram-newton-schulz", x, get_args(Iteration), iteration, scaling)
        check_schedule(schedule, scaling)
        # Normalized here first, because the package's epsilon is absolute; its own division then changes rounding only.
        scaled = normalize(x, margin=0.0).view(-1, *x.shape[-2:])
        return build(schedule, iteration != "standard")(scaled).view(x.shape)

    return run


def _check_arguments(
    name: BackendName, x: Tensor, iterations: tuple[str, ...], iteration: Iteration, scaling: Scaling
) -> None:
    check_iteration(iteration)
    problem = None
    if x.dim() < 2 or x.dtype not in BACKEND_DTYPES[name]:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in BACKEND_DTYPES[name])
        problem = (
            f"got shape {tuple(x.shape)} in {x.dtype}, expected (..., M, N) in {expected}; set the Newton-Schulz dtype "
            "accordingly"
        )
    elif iteration not in iterations:
        problem = f"got iteration {iteration!r}, expected one of {', '.join(iterations)}; choose one of them"
    elif scaling != "frobenius":
        problem = f"got scaling {scaling!r}, expected 'frobenius'; take other coefficients than 'aol'"
    if problem:
        raise ValueError(f"Newton-Schulz back end {name!r}: {problem}, or take the back end 'torch'")


def load_backend(name: str, device_type: str) -> Orthogonalize:
    """Returns the back end of that name.

    Args:
        name: A `BackendName`.
        device_type: ``torch.device.type`` of the tensors it will be given.

    Raises:
        ValueError: If the name is not known.
        RuntimeError: If the package is missing or too old, or the device is not one it runs on.
    """
    if name == "torch":
        return orthogonalize
    if name not in get_args(BackendName):
        raise ValueError(f"Newton-Schulz back end: got {name!r}, expected one of {', '.join(get_args(BackendName))}")
    if device_type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(
            f"Newton-Schulz back end {name!r}: got device type {device_type!r} and torch.cuda.is_available() = "
            f"{torch.cuda.is_available()}, expected a CUDA device; take the back end 'torch'"
        )
    return emerging_syrk(_load_syrk_step()) if name == "emerging" else gram_package(_load_gram_package())


def _import(name: BackendName, module: str, requirement: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise RuntimeError(
            f"Newton-Schulz back end {name!r}: package {error.name!r} is not installed; "
            f"`pip install '{requirement}'`, or take the back end 'torch'"
        ) from error


def _load_syrk_step() -> Step:
    requirement = "emerging-optimizers>=0.3,<0.4"
    module = _import("emerging", "emerging_optimizers.orthogonalized_optimizers.muon_utils", requirement)
    step: Any = getattr(module, "newton_schulz_step_tsyrk", None)
    kernels: Any = getattr(module, "triton_kernels", None)
    if step is None or not getattr(kernels, "HAS_TRITON_340", False):
        raise RuntimeError(
            "Newton-Schulz back end 'emerging': newton_schulz_step_tsyrk is missing or Triton is older than 3.4; "
            f"`pip install '{requirement}' 'triton>=3.4'`, or take the back end 'torch'"
        )
    return step  # type: ignore[no-any-return]


def _load_gram_package() -> Callable[..., Callable[[Tensor], Tensor]]:
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        raise RuntimeError(
            f"Newton-Schulz back end 'gram-newton-schulz': got compute capability {major}.{minor}, expected 9.0 or "
            "newer (Hopper, Blackwell); take the back end 'torch'"
        )
    module = _import("gram-newton-schulz", "gram_newton_schulz", "gram-newton-schulz>=0.1.6")
    factory: Callable[..., Callable[[Tensor], Tensor]] = module.GramNewtonSchulz
    return factory
