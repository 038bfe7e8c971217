"""Names of logged metrics, how they are grouped, and what values to expect. Imports no torch: reports need none."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache

FILE_NAME = "muon_metrics.jsonl"
METRICS = (
    "update_rms",
    "update_to_weight",
    "orthogonality_error",
    "weight_rms",
    "momentum_norm",
    "stable_rank",
    "svd_entropy",
)


def layer_kind(name: str) -> str:
    """The name without the numbers of layers and experts, so that the same parts of all layers share it."""
    tail = re.split(r"(?:^|\.)layers\.\d+\.", name)[-1]
    tail = re.sub(r"\blocal_experts\.\d+", "local_experts", tail)
    return re.sub(r"\bweight\d+\b", "weight", tail)


def by_layer_kind(metrics: Mapping[str, Mapping[str, float]], metric: str) -> dict[str, list[float]]:
    """Kind of layer -> the values of a metric over layers and experts, in the order of names."""
    out: dict[str, list[float]] = {}
    for name, values in metrics.items():
        if metric in values and math.isfinite(values[metric]):
            out.setdefault(layer_kind(name), []).append(values[metric])
    return out


@cache
def orthogonality_range(coefficient_set: str, steps: int) -> tuple[float, float]:
    """The orthogonality error that a coefficient set leaves where Newton-Schulz works as it should.

    The error is the root mean square of `p(s)^2 - 1` over the singular values, where `p` is the composed polynomial.
    This is the least and the largest one over spectra that are uniform in log s over half a decade within the two
    decades below the largest value that the set's scaling allows. Spectra with more small values lie above the range.

    Args:
        coefficient_set: Name of the set, or an alias.
        steps: Number of iterations.
    """
    from megatron_muon.newton_schulz.coefficients import AOL_SIGMA_MAX, coefficients, evaluate, scaling_for

    schedule = coefficients(coefficient_set, steps)
    largest = AOL_SIGMA_MAX if scaling_for(coefficient_set) == "aol" else 1.0
    per_decade = 200
    squares = [
        (evaluate(schedule, largest * 10.0 ** (index / per_decade - 2)) ** 2 - 1) ** 2
        for index in range(2 * per_decade + 1)
    ]
    half = per_decade // 2 + 1
    errors = [math.sqrt(math.fsum(squares[at : at + half]) / half) for at in range(len(squares) - half + 1)]
    return min(errors), max(errors)
