"""What logged metrics are called and how they are grouped. Without torch: reports may be drawn on other machines."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

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


def kind(name: str) -> str:
    """What parts of the same kind in different layers share: the name after the layer's number, experts as one."""
    tail = re.split(r"(?:^|\.)layers\.\d+\.", name)[-1]
    tail = re.sub(r"\blocal_experts\.\d+", "local_experts", tail)
    return re.sub(r"\bweight\d+\b", "weight", tail)


def by_kind(metrics: Mapping[str, Mapping[str, float]], metric: str) -> dict[str, list[float]]:
    """Kind -> the values of a metric over layers and experts, in the order of names."""
    out: dict[str, list[float]] = {}
    for name, values in metrics.items():
        if metric in values and math.isfinite(values[metric]):
            out.setdefault(kind(name), []).append(values[metric])
    return out
