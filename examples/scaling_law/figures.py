"""The study's figures: loss against FLOPs with both fits, loss against learning rate, the ratio with its band."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from scaling_law import schedule
from scaling_law.fit import Comparison
from scaling_law.ladder import OPTIMIZERS
from scaling_law.study import Study

COLORS = {"adamw": "tab:gray", "muon": "tab:red", "muon_tuned": "tab:orange"}
LABELS = {"adamw": "AdamW", "muon": "Muon, AdamW's learning rate", "muon_tuned": "Muon, its own best learning rate"}
PAPER_RATIO = 0.52


def loss_against_flops(study: Study) -> Figure:
    """Every seed as a point, the power laws as lines; both axes logarithmic, as in Moonlight's figure 3."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes: Any = figure.subplots()
    comparisons = study.comparisons
    for key, curve in study.curves().items():
        for number, (flops, losses) in enumerate(curve.values()):
            label = LABELS[key] if number == 0 else None
            axes.plot([flops] * len(losses), losses, "o", color=COLORS[key], markersize=4, alpha=0.6, label=label)
    for key in ("adamw", "muon", "muon_tuned"):
        found = comparisons.get(("muon" if key == "adamw" else key, "power", False))
        if found is not None:
            law = found.adamw if key == "adamw" else found.muon
            flops = [value for value, _ in study.curves()[key].values()]
            x = np.geomspace(min(flops), max(flops), 50)
            axes.plot(x, law.loss(x), "-", color=COLORS[key], linewidth=1)
            end = f" {law.a:.3g} C^-{law.b:.3f}"
            axes.annotate(end, (x[-1], law.loss(x[-1])), color=COLORS[key], fontsize="small", va="center")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="PFLOP/s-days of forward and backward passes",
        ylabel="validation loss, nats/token",
    )
    axes.margins(x=0.18)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.25, which="both")
    return figure


def loss_against_rate(study: Study) -> Figure:
    """The learning-rate sweeps of every size, best rates marked."""
    models = study.ladder.models
    columns = min(3, len(models))
    rows = math.ceil(len(models) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows), layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(models) :]:
        axes.axis("off")
    for model, axes in zip(models, grid.flat, strict=False):
        for optimizer in OPTIMIZERS:
            found = schedule.sweep(study.ladder, model, optimizer, study.losses)
            points = {rate: loss for rate, loss in found.losses.items() if math.isfinite(loss)}
            axes.plot(list(points), list(points.values()), "o-", color=COLORS[optimizer], markersize=3)
            if found.best is not None:
                axes.plot(
                    [found.best], [points[found.best]], "o", color=COLORS[optimizer], markersize=8, fillstyle="none"
                )
        axes.set(xscale="log", title=f"{model.name}: {model.parameters:,}")
        axes.grid(alpha=0.25)
    grid[-1][0].set(xlabel="learning rate", ylabel="validation loss")
    figure.legend(
        handles=[axes.plot([], [], color=COLORS[name], label=LABELS[name].split(",")[0])[0] for name in OPTIMIZERS],
        loc="outside upper right",
        ncols=2,
        fontsize="small",
    )
    return figure


def ratio(comparisons: Mapping[Any, Comparison]) -> Figure:
    """Muon's FLOPs over AdamW's at equal loss, with its 95 % band, for both forms of law."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for (key, form, total), found in comparisons.items():
        if key != "muon" or total:
            continue
        color = {"power": "tab:red", "irreducible": "tab:blue"}[form]
        x = [found.adamw.flops(loss) for loss in found.losses]
        axes.plot(x, [band.value for band in found.ratio], color=color, label=f"{form} law")
        axes.fill_between(
            x, [band.low for band in found.ratio], [band.high for band in found.ratio], color=color, alpha=0.15
        )
    axes.axhline(PAPER_RATIO, color="black", linestyle="--", linewidth=1, label="Moonlight: about 0.52")
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set(xscale="log", xlabel="AdamW's PFLOP/s-days", ylabel="Muon's FLOPs / AdamW's at equal loss")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.25)
    return figure


def write(study: Study, directory: Path) -> list[Path]:
    """Writes all figures that the results allow, as PNG files; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    comparisons = study.comparisons
    figures = {"rates": loss_against_rate(study)}
    if any(study.curves().values()):
        figures["loss"] = loss_against_flops(study)
    if comparisons:
        figures["ratio"] = ratio(comparisons)
    out = []
    for name, figure in figures.items():
        path = directory / f"scaling_law_{name}.png"
        figure.savefig(path, dpi=110)
        out.append(path)
    return out
