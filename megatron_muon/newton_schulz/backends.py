"""Back ends of `orthogonalize`: PyTorch's products, or kernels of other packages where they are installed.

A back end is chosen by name and never replaced by another one: what is not available raises, with the remedy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType, ModuleType
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from megatron_muon.newton_schulz.coefficients import Scaling, Schedule, check_schedule
from megatron_muon.newton_schulz.cost import Method, check_method, restart_segments
from megatron_muon.newton_schulz.iterations import normalize, orthogonalize

BackendName = Literal["torch", "emerging", "gram-newton-schulz"]

BACKEND_DTYPES: Mapping[str, tuple[torch.dtype, ...]] = MappingProxyType(
    {
        "torch": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        "emerging": (torch.bfloat16,),
        "gram-newton-schulz": (torch.float16, torch.bfloat16),
    }
)
"""Data types in which each back end iterates."""


class NewtonSchulzBackend(Protocol):
    """Something that orthogonalizes; the contract is that of the function `orthogonalize`."""

    @property
    def name(self) -> BackendName:
        """The name by which `load_backend` knows it."""
        ...

    def orthogonalize(
        self,
        x: Tensor,
        schedule: Schedule,
        *,
        eps: float = 1e-7,
        method: Method = "auto",
        scaling: Scaling = "frobenius",
    ) -> Tensor:
        """Returns U p(S) V^T for each matrix of x; raises ValueError for what this back end does not do."""
        ...


class TorchBackend:
    """PyTorch's own matrix products; runs everywhere."""

    name: BackendName = "torch"

    def orthogonalize(
        self,
        x: Tensor,
        schedule: Schedule,
        *,
        eps: float = 1e-7,
        method: Method = "auto",
        scaling: Scaling = "frobenius",
    ) -> Tensor:
        """Calls `orthogonalize`."""
        return orthogonalize(x, schedule, eps=eps, method=method, scaling=scaling)


class EmergingSyrkBackend:
    """The standard iteration on emerging-optimizers' Triton kernel for symmetric products (bfloat16, CUDA).

    Written against ``newton_schulz_step_tsyrk(X, a, b, c)`` of emerging-optimizers 0.3. The step is called rather
    than the package's ``newton_schulz``, which takes the kernel only if the process-wide float32 matmul precision is
    "medium". Not run on a GPU here: the tests put a stand-in in place of the kernel.
    """

    name: BackendName = "emerging"

    def __init__(self, step: Callable[[Tensor, float, float, float], Tensor]) -> None:
        """Takes the step, a function (X, a, b, c) -> (a I + b X X^T + c (X X^T)^2) X on one bfloat16 matrix."""
        self._step = step

    @torch.no_grad()
    def orthogonalize(
        self,
        x: Tensor,
        schedule: Schedule,
        *,
        eps: float = 1e-7,
        method: Method = "auto",
        scaling: Scaling = "frobenius",
    ) -> Tensor:
        """Runs the standard iteration, one matrix after the other: the kernel takes 2-D input."""
        _refuse(self.name, x, method, ("auto", "standard"), scaling)
        check_schedule(schedule, scaling)
        result = normalize(x, eps=eps)
        tall = x.size(-2) > x.size(-1)
        for matrix in result.view(-1, *x.shape[-2:]):
            y = matrix.mT if tall else matrix
            for a, b, c in schedule:
                y = self._step(y, a, b, c)
            matrix.copy_(y.mT if tall else y)
        return result


class GramPackageBackend:
    """Dao-AILab's gram-newton-schulz: Gram iteration in float16 on CuTe symmetric kernels (Hopper, Blackwell).

    Written against the class ``GramNewtonSchulz`` of gram-newton-schulz 0.1.6. The package iterates in float16
    whatever it is given, so float32 input is refused rather than rounded; bfloat16 input is scaled first and keeps
    all its bits. Not run on a GPU here: the tests put a stand-in in place of the package.
    """

    name: BackendName = "gram-newton-schulz"

    def __init__(self, factory: Callable[..., Callable[[Tensor], Tensor]]) -> None:
        """Takes the factory, the class ``GramNewtonSchulz`` or what stands in for it."""

        # One object per schedule and method: it builds its closures when it is made.
        @lru_cache(maxsize=32)
        def build(schedule: Schedule, eps: float, gram: bool) -> Callable[[Tensor], Tensor]:
            return factory(
                ns_epsilon=eps,
                ns_use_kernels=True,
                ns_coefficients=[list(step) for step in schedule],
                use_gram_newton_schulz=gram,
                gram_newton_schulz_reset_iterations=list(accumulate(restart_segments(len(schedule))))[:-1],
                # The package's default captures CUDA graphs, whose output the next call overwrites.
                compile_kwargs=None,
            )

        self._build = build

    @torch.no_grad()
    def orthogonalize(
        self,
        x: Tensor,
        schedule: Schedule,
        *,
        eps: float = 1e-7,
        method: Method = "auto",
        scaling: Scaling = "frobenius",
    ) -> Tensor:
        """Runs the package's Gram iteration, or its standard one for square matrices or if asked to."""
        _refuse(self.name, x, method, get_args(Method), scaling)
        check_schedule(schedule, scaling)
        # Normalized here first, for the package's epsilon is absolute; the second time only restores rounding.
        scaled = normalize(x, eps=0.0).view(-1, *x.shape[-2:])
        return self._build(schedule, eps, method != "standard")(scaled).view(x.shape)


def _refuse(
    name: str,
    x: Tensor,
    method: Method,
    methods: Sequence[str],
    scaling: Scaling,
) -> None:
    check_method(method)
    dtypes = BACKEND_DTYPES[name]
    if x.dim() < 2 or x.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"Newton-Schulz back end {name!r}: got shape {tuple(x.shape)} in {x.dtype}, expected (..., M, N) in "
            f"{expected}; set the Newton-Schulz dtype accordingly, or take the back end 'torch'"
        )
    if method not in methods:
        raise ValueError(
            f"Newton-Schulz back end {name!r}: got method {method!r}, expected one of {', '.join(methods)}; take the "
            "back end 'torch' for the other"
        )
    if scaling != "frobenius":
        raise ValueError(
            f"Newton-Schulz back end {name!r}: got scaling {scaling!r}, expected 'frobenius'; take the back end "
            "'torch' for the 'aol' coefficients"
        )


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


def load_backend(name: str, device_type: str) -> NewtonSchulzBackend:
    """Returns the back end of that name, or says why this host cannot run it.

    Args:
        name: A `BackendName`.
        device_type: ``torch.device.type`` of the tensors it will be given.

    Raises:
        ValueError: If the name is not known.
        RuntimeError: If the package is missing or too old, or the device is not one it runs on.
    """
    if name == "torch":
        return TorchBackend()
    if name not in get_args(BackendName):
        raise ValueError(f"Newton-Schulz back end: got {name!r}, expected one of {', '.join(get_args(BackendName))}")
    if device_type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(
            f"Newton-Schulz back end {name!r}: got device type {device_type!r} and torch.cuda.is_available() = "
            f"{torch.cuda.is_available()}, expected a CUDA device; take the back end 'torch'"
        )
    if name == "emerging":
        return EmergingSyrkBackend(_load_syrk_step())
    return GramPackageBackend(_load_gram_package())


def _load_syrk_step() -> Callable[[Tensor, float, float, float], Tensor]:
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
