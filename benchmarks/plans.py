"""Compares Distributed Muon's plans with upstream's layer-wise layout and Moonlight's all-gather, 8 to 4096 ranks.

    python benchmarks/plans.py

Nothing is run or timed: shapes, Megatron-Core's own layout functions and the plugin's own planner decide everything,
so that the result is the same on every machine. Writes `plans.json` and `plans.md` into `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_muon.config import MuonConfig
from megatron_muon.estimate.estimates import (
    MOONLIGHT,
    OURS,
    SCHEMES,
    UPSTREAM,
    ModelEstimate,
    StageEstimate,
    estimate_model,
    mean,
)
from megatron_muon.estimate.groups import PlanSettings
from megatron_muon.estimate.models import BUILT_IN
from megatron_muon.estimate.shapes import load_model
from megatron_muon.estimate.stages import Layout

RANKS = tuple(2**n for n in range(3, 13))
REFERENCE_LAYOUTS = {
    "moonlight-16b": ((1, 4, 8), (1, 1, 8)),
    "kimi-k2": ((1, 16, 16),),
    "deepseek-v3": ((1, 16, 64), (1, 16, 16)),
    "qwen3-30b-a3b": ((1, 4, 8), (1, 1, 8)),
    "qwen3-8b": ((1, 1, 1),),
    "llama3-8b": ((1, 4, 1), (1, 1, 1)),
    "llama3-70b": ((8, 16, 1), (8, 4, 1), (8, 1, 1)),
    "llama3-405b": ((8, 16, 1),),
}
"""(tp, pp, ep) of each built-in model in order of preference; the rest is data parallel, and expert tp is 1.

Sources: kimi-k2: arXiv 2507.20534 (16-way pipeline, 16-way experts); deepseek-v3: arXiv 2412.19437 (16-way pipeline,
64-way experts); llama3-405b: arXiv 2407.21783, table 4 (tp 8, pp 16). The others are common choices.
"""

RESULTS = Path(__file__).resolve().parent / "results"

HEADER = """# Plans

The worst pipeline stage of each built-in model under a usual layout, by `python benchmarks/plans.py`; JSON beside it.
Computed from shapes, nothing measured.

- **NS max/ideal**: Newton-Schulz FLOPs of the most loaded rank over the share it would have if every logical matrix
  were orthogonalized once and the load were level.
- **talk**: the same for the busiest rank with what its teams' messages are worth in FLOPs: what the planner makes
  least. **flops**: NS max/ideal of the plan that `--muon-balance flops` makes, where messages do not count.
- **padding**: of Muon's gradient and parameter buffers, over the parameters.
- **sent**: what a rank sends beyond AdamW's reduce-scatter (4 B) and all-gather (2 B) of the same parameters, as a
  share of those; mean, and the most loaded rank. `-`: no data parallelism, so AdamW sends nothing.
- **up.**: Megatron-Core's LayerWiseDistributedOptimizer, its own layout, `--muon-tp-mode duplicated`.
  **Moonl.**: Moonlight's all-gather. **matrices/rank**: logical matrices of a stage over its ranks, the least.
"""
COLUMNS = (
    "model",
    "ranks",
    "dp tp pp ep",
    "matrices/rank",
    "NS max/ideal",
    "talk",
    "flops",
    "up.",
    "Moonl.",
    "padding %",
    "up.",
    "sent % mean / max",
    "up. max",
    "Moonl. max",
)


def reference_layout(model: str, ranks: int) -> Layout | None:
    """The first of a model's layouts that fits a number of ranks; None if none does."""
    for tp, pp, ep in REFERENCE_LAYOUTS[model]:
        dp, rest = divmod(ranks, tp * pp)
        if dp and not rest and dp * tp % ep == 0:
            return Layout(dp=dp, tp=tp, pp=pp, ep=ep, etp=1 if ep > 1 else None)
    return None


def plan_table(models: Sequence[str], ranks: Sequence[int], settings: PlanSettings) -> list[dict[str, Any]]:
    """A row for each model and number of ranks that it fits: the worst value over the stages, for each scheme."""
    rows = []
    for model in models:
        for size in ranks:
            layout = reference_layout(model, size)
            if layout is not None:
                rows.append(_row(estimate_model(load_model(model), layout, settings)))
    return rows


def _row(plan: ModelEstimate) -> dict[str, Any]:
    layout = plan.layout
    return {
        "model": plan.model.name,
        **layout.sizes,
        "stage_ranks": layout.stage_ranks,
        "logical_matrices_per_rank": min(s.num_logical_matrices for s in plan.stages) / layout.stage_ranks,
        **{scheme: _worst(plan, scheme) for scheme in SCHEMES},
    }


def _worst(plan: ModelEstimate, scheme: str) -> dict[str, float | None] | None:
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
    buffer_numel = estimate.buffer_bytes / settings.buffer_bytes
    # Without data parallelism AdamW sends nothing, and there is no share of nothing.
    adamw = stage.adamw_bytes
    return {
        "max_over_ideal": max(estimate.flops) / stage.ideal_flops,
        "busiest_over_ideal": estimate.busiest / stage.ideal_flops,
        "padding": buffer_numel / sum(stage.param_numel) - 1.0,
        "sent_over_adamw_mean": mean(estimate.sent_bytes) / adamw if adamw else None,
        "sent_over_adamw_max": max(estimate.sent_bytes) / adamw if adamw else None,
        "sent_bytes_max": max(estimate.sent_bytes),
        "momentum_bytes": float(max(estimate.momentum_bytes)),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `plan_table` as a Markdown document."""
    lines = [HEADER, f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * 3}{' ---: |' * (len(COLUMNS) - 3)}"]
    for row in rows:
        ours, upstream, moonlight = (row[scheme] for scheme in SCHEMES)
        cells = (
            row["model"],
            row["ranks"],
            f"{row['dp']} {row['tp']} {row['pp']} {row['ep']}",
            f"{row['logical_matrices_per_rank']:.1f}",
            f"{ours['max_over_ideal']:.2f}",
            f"{ours['busiest_over_ideal']:.2f}",
            f"{row['flops_max_over_ideal']:.2f}",
            f"{upstream['max_over_ideal']:.2f}",
            f"{moonlight['max_over_ideal']:.2f}",
            f"{100 * ours['padding']:.2f}",
            f"{100 * upstream['padding']:.0f}",
            f"{_percent(ours['sent_over_adamw_mean'])} / {_percent(ours['sent_over_adamw_max'])}",
            _percent(upstream["sent_over_adamw_max"]),
            _percent(moonlight["sent_over_adamw_max"]),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the comparison; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(BUILT_IN), default=list(BUILT_IN))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory (default: benchmarks/results)")
    args = parser.parse_args(argv)
    rows = plan_table(args.models, args.ranks, PlanSettings())
    for row, level in zip(
        rows, plan_table(args.models, args.ranks, PlanSettings(muon=MuonConfig(balance="flops"))), strict=True
    ):
        row["flops_max_over_ideal"] = level[OURS]["max_over_ideal"]
    args.output.mkdir(parents=True, exist_ok=True)
    content = {"version": 1, "schemes": {"ours": OURS, "upstream": UPSTREAM, "moonlight": MOONLIGHT}, "rows": rows}
    (args.output / "plans.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (args.output / "plans.md").write_text(markdown(rows), encoding="utf-8")
    print(f"{len(rows)} plans -> {args.output / 'plans.md'}")


if __name__ == "__main__":
    main()
