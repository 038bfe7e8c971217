"""Plans of the built-in models at many sizes, one row each: what a comparison with upstream is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megatron_muon.estimate.estimates import MOONLIGHT, OURS, UPSTREAM, ModelPlan, StageEstimate, mean, plan_model
from megatron_muon.estimate.models import BUILT_IN
from megatron_muon.estimate.schemes import PARAM_BYTES, PlanSettings
from megatron_muon.estimate.shapes import load_model
from megatron_muon.estimate.stages import Layout

REFERENCE_LAYOUTS: Mapping[str, tuple[tuple[int, int, int], ...]] = MappingProxyType(
    {
        "moonlight-16b": ((1, 4, 8), (1, 1, 8)),
        "kimi-k2": ((1, 16, 16),),
        "deepseek-v3": ((1, 16, 64), (1, 16, 16)),
        "qwen3-30b-a3b": ((1, 4, 8), (1, 1, 8)),
        "qwen3-8b": ((1, 1, 1),),
        "llama3-8b": ((1, 4, 1), (1, 1, 1)),
        "llama3-70b": ((8, 16, 1), (8, 4, 1), (8, 1, 1)),
        "llama3-405b": ((8, 16, 1),),
    }
)
"""(tp, pp, ep) of each built-in model in order of preference; the rest is data parallel, and expert tp is 1.

Sources: kimi-k2: arXiv 2507.20534 (16-way pipeline, 16-way experts); deepseek-v3: arXiv 2412.19437 (16-way pipeline,
64-way experts); llama3-405b: arXiv 2407.21783, table 4 (tp 8, pp 16). The others are common choices.
"""


def reference_layout(model: str, ranks: int) -> Layout | None:
    """The first of a built-in model's layouts that fits a number of ranks; None if none does.

    Raises:
        ValueError: If the model is not built in, or `ranks` is not positive.
    """
    if model not in REFERENCE_LAYOUTS:
        raise ValueError(f"model: got {model!r}, expected one of {', '.join(REFERENCE_LAYOUTS)}")
    if ranks < 1:
        raise ValueError(f"ranks: got {ranks}, expected a positive number")
    for tp, pp, ep in REFERENCE_LAYOUTS[model]:
        dp, rest = divmod(ranks, tp * pp)
        if dp and not rest and dp * tp % ep == 0:
            return Layout(dp=dp, tp=tp, pp=pp, ep=ep, etp=1 if ep > 1 else None)
    return None


def plan_table(
    models: Sequence[str] = tuple(BUILT_IN),
    ranks: Sequence[int] = (8, 64, 512, 4096),
    settings: PlanSettings | None = None,
) -> list[dict[str, Any]]:
    """Plans each model at each size that it fits.

    Args:
        models: Built-in models.
        ranks: Total numbers of ranks.
        settings: What else the plans depend on.

    Returns:
        One row per model and size: `model`, `ranks`, the layout's sizes, `stage_ranks`, the least
        `logical_matrices_per_rank` of any stage, and for each scheme, over the model's stages, the worst
        `max_over_ideal`, `busiest_over_ideal` (with what teams' talk is worth), `padding` (share of the parameters),
        `sent_over_adamw` (mean and most loaded rank) and `momentum_bytes` of the most loaded rank.

    Raises:
        ValueError: If a model is not built in, or a number of ranks is not positive.
    """
    rows = []
    for model in models:
        for size in ranks:
            layout = reference_layout(model, size)
            if layout is not None:
                rows.append(_row(plan_model(load_model(model), layout, settings)))
    return rows


def _row(plan: ModelPlan) -> dict[str, Any]:
    layout = plan.layout
    return {
        "model": plan.model.name,
        **layout.sizes,
        "stage_ranks": layout.stage_ranks,
        "logical_matrices_per_rank": min(s.num_logical_matrices for s in plan.stages) / layout.stage_ranks,
        **{scheme: _worst(plan, scheme) for scheme in (OURS, UPSTREAM, MOONLIGHT)},
    }


def _worst(plan: ModelPlan, scheme: str) -> dict[str, float | None] | None:
    """The largest of each measure over the stages; None where the scheme refuses the layout."""
    measures = [_measures(stage, scheme, plan.settings) for stage in plan.stages]
    present = [m for m in measures if m is not None]
    if len(present) < len(measures):
        return None
    worst: dict[str, float | None] = {}
    for key in present[0]:
        values = [m[key] for m in present]
        worst[key] = None if None in values else max(v for v in values if v is not None)
    return worst


def _measures(stage: StageEstimate, scheme: str, settings: PlanSettings) -> dict[str, float | None] | None:
    estimate = stage.schemes[scheme]
    if estimate is None:
        return None
    buffer_numel = estimate.buffer_bytes / (settings.grad_bytes + PARAM_BYTES)
    # Without data parallelism AdamW sends nothing, and there is no share of nothing.
    adamw = stage.adamw_bytes
    return {
        "max_over_ideal": estimate.flops_max / stage.ideal_flops,
        "busiest_over_ideal": estimate.busiest / stage.ideal_flops,
        "padding": buffer_numel / sum(stage.param_numel) - 1.0,
        "sent_over_adamw_mean": mean(estimate.sent_bytes) / adamw if adamw else None,
        "sent_over_adamw_max": max(estimate.sent_bytes) / adamw if adamw else None,
        "sent_bytes_max": max(estimate.sent_bytes),
        "momentum_bytes": float(max(estimate.momentum_bytes)),
    }
