"""Newton-Schulz orthogonalization: coefficient tables, iterations, costs and back ends.

In: matrices (..., M, N) and a schedule of quintics. Out: for x = U S V^T, U p(S / |x|) V^T, where p is the composition
of the quintics a s + b s^3 + c s^5 and is near one wherever s is not tiny. Knows no ranks and imports no other room.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_muon.newton_schulz.coefficients import (
    ALIASES,
    CoefficientSet,
    Scaling,
    Schedule,
    check_schedule,
    coefficients,
    scaling_for,
)
from megatron_muon.newton_schulz.names import BackendName, Iteration

if TYPE_CHECKING:
    from megatron_muon.newton_schulz.backends import BACKEND_DTYPES, load_backend, shapes_problem
    from megatron_muon.newton_schulz.cost import choose_iteration, newton_schulz_flops
    from megatron_muon.newton_schulz.iterations import (
        MARGIN,
        accumulation_dtype,
        normalize,
        orthogonalize,
        power_of_two_and_norm,
        row_scales,
    )

__all__ = [
    "ALIASES",
    "BACKEND_DTYPES",
    "MARGIN",
    "BackendName",
    "CoefficientSet",
    "Iteration",
    "Scaling",
    "Schedule",
    "accumulation_dtype",
    "check_schedule",
    "choose_iteration",
    "coefficients",
    "load_backend",
    "newton_schulz_flops",
    "normalize",
    "orthogonalize",
    "power_of_two_and_norm",
    "row_scales",
    "scaling_for",
    "shapes_problem",
]


def __getattr__(name: str) -> Any:
    # The command line needs coefficient sets and names, but not torch: these modules are imported when first asked for.
    for module in ("cost", "iterations", "backends") if name in __all__ else ():
        found = vars(import_module(f"{__name__}.{module}"))
        if name in found:
            return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
