"""Draws the Newton-Schulz load of each rank, upstream's and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_muon.estimate.estimates import MOONLIGHT, OURS, UPSTREAM, ModelEstimate, StageEstimate
from megatron_muon.estimate.report import TITLES

MAX_STAGES = 4


def plot_load(plan: ModelEstimate, path: Path) -> None:
    """Writes a picture with one panel per distinct stage; beyond `MAX_STAGES`, those where upstream is least level.

    Args:
        plan: The plan.
        path: The file; matplotlib takes the format from its suffix.

    Raises:
        ValueError: If matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ValueError("--plot: needs matplotlib; run pip install matplotlib, or leave --plot out") from error

    stages = _chosen(plan)
    figure = Figure(figsize=(8, 2.6 * len(stages) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(stages), 1, squeeze=False)[:, 0]
    for panel, stage in zip(panels, stages, strict=True):
        _draw(panel, stage, plan.layout.stage_ranks)
    panels[-1].set_xlabel("ranks of the stage, most loaded first")
    left_out = len(plan.stages) - len(stages)
    layout = plan.layout
    figure.suptitle(
        f"{plan.model.name}: dp {layout.dp}, tp {layout.tp}, pp {layout.pp}, ep {layout.ep}, etp {layout.expert_tp}"
        + (f" ({left_out} more kinds of stage not shown)" if left_out else "")
    )
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot: cannot write {path}: {error}") from error


def _chosen(plan: ModelEstimate) -> list[StageEstimate]:
    worst = sorted(plan.stages, key=lambda s: -(s.imbalance(UPSTREAM) or s.imbalance(MOONLIGHT) or 0.0))
    return sorted(worst[:MAX_STAGES], key=lambda s: s.stages)


def _draw(axes: Any, stage: StageEstimate, ranks: int) -> None:
    before = UPSTREAM if stage.schemes[UPSTREAM] is not None else MOONLIGHT
    for scheme, color in ((before, "#d1495b"), (OURS, "#00798c")):
        demand = stage.schemes[scheme]
        assert demand is not None
        load = sorted((f / stage.ideal_flops for f in demand.flops), reverse=True)
        label = f"{'before' if scheme == before else 'after'}: {TITLES[scheme]}, at most {load[0]:.2f}"
        # What both fill would mix to grey: only the first is filled.
        axes.stairs(load, fill=scheme == before, alpha=0.3 if scheme == before else 1.0, color=color, label=label)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--", label="ideal")
    axes.set_xlim(0, ranks)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("NS FLOPs / ideal")
    names = f"stage {stage.stages[0]}" + (f" and {len(stage.stages) - 1} like it" if len(stage.stages) > 1 else "")
    axes.set_title(f"{names}: {stage.num_layers} layers", loc="left", fontsize="medium")
    axes.legend(fontsize="small")
