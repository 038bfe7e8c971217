"""Newton-Schulz orthogonalization: coefficient tables, iterations, costs and back ends.

Given ``x = U S V^T``, a Newton-Schulz schedule replaces each singular value by an odd polynomial of it and
leaves the singular vectors alone: ``orthogonalize(x, schedule) = U p(S / |x|) V^T``, where ``p`` is the
composition of the schedule's quintics ``a s + b s^3 + c s^5`` and is near one wherever ``s`` is not tiny.

This package imports nothing else of the project and knows no ranks.
"""

from megatron_muon.newton_schulz.backends import (
    BACKEND_DTYPES,
    BackendName,
    EmergingSyrkBackend,
    GramPackageBackend,
    NewtonSchulzBackend,
    TorchBackend,
    load_backend,
)
from megatron_muon.newton_schulz.coefficients import (
    ALIASES,
    AOL_SIGMA_MAX,
    CoefficientSet,
    Scaling,
    Schedule,
    check_schedule,
    coefficients,
    evaluate,
    scaling_for,
)
from megatron_muon.newton_schulz.cost import (
    Method,
    choose_method,
    newton_schulz_bytes,
    newton_schulz_flops,
    restart_segments,
    symmetric_blocks,
)
from megatron_muon.newton_schulz.iterations import accumulation_dtype, normalize, orthogonalize

__all__ = [
    "ALIASES",
    "AOL_SIGMA_MAX",
    "BACKEND_DTYPES",
    "BackendName",
    "CoefficientSet",
    "EmergingSyrkBackend",
    "GramPackageBackend",
    "Method",
    "NewtonSchulzBackend",
    "Scaling",
    "Schedule",
    "TorchBackend",
    "accumulation_dtype",
    "check_schedule",
    "choose_method",
    "coefficients",
    "evaluate",
    "load_backend",
    "newton_schulz_bytes",
    "newton_schulz_flops",
    "normalize",
    "orthogonalize",
    "restart_segments",
    "scaling_for",
    "symmetric_blocks",
]
