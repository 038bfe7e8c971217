"""Newton-Schulz orthogonalization: coefficient tables, iterations, costs and back ends.

In: matrices (..., M, N) and a schedule of quintics. Out: for x = U S V^T, U p(S / |x|) V^T, where p is the composition
of the quintics a s + b s^3 + c s^5 and is near one wherever s is not tiny. Knows no ranks and imports no other room.
"""

from megatron_muon.newton_schulz.backends import BACKEND_DTYPES, BackendName, load_backend, shapes_problem
from megatron_muon.newton_schulz.coefficients import (
    ALIASES,
    CoefficientSet,
    Scaling,
    Schedule,
    check_schedule,
    coefficients,
    scaling_for,
)
from megatron_muon.newton_schulz.cost import (
    Iteration,
    choose_iteration,
    newton_schulz_bytes,
    newton_schulz_flops,
)
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
    "newton_schulz_bytes",
    "newton_schulz_flops",
    "normalize",
    "orthogonalize",
    "power_of_two_and_norm",
    "row_scales",
    "scaling_for",
    "shapes_problem",
]
