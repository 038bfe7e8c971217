"""Draws plans.png and newton_schulz.png from the JSON files that `plans.py` and `newton_schulz.py` wrote.

python benchmarks/plots.py [DIR]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw_plans(content: dict[str, Any], path: Path) -> None:
    """Over the number of ranks, for each model: the slowest rank's Newton-Schulz over the ideal, and padding."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    load, padding = figure.subplots(1, 2)
    ours, upstream = content["schemes"]["ours"], content["schemes"]["upstream"]
    models = list(dict.fromkeys(row["model"] for row in content["rows"]))
    for index, model in enumerate(models):
        rows = [row for row in content["rows"] if row["model"] == model]
        ranks, color = [row["ranks"] for row in rows], f"C{index}"
        for scheme, style in ((ours, "o-"), (upstream, "x:")):
            load.plot(ranks, [row[scheme]["max_over_ideal"] for row in rows], style, color=color, markersize=4)
        padding.plot(
            ranks, [1 + row[upstream]["padding"] for row in rows], "x:", color=color, label=model, markersize=4
        )
    padding.axhline(1.0, color="black", linewidth=1, label="megatron_muon, all models")
    load.set_title("Newton-Schulz FLOPs, slowest rank / ideal\n(solid: megatron_muon; dotted: Megatron-Core's)")
    padding.set_title("buffer elements / parameters")
    for axes in (load, padding):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
    padding.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_newton_schulz(report: dict[str, Any], path: Path) -> None:
    """For each shape, how many times faster than the other two implementations."""
    rows = report["shapes"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for offset, other in ((-0.2, "emerging-optimizers"), (0.2, "torch.optim.Muon")):
        places = [place + offset for place in range(len(rows))]
        axes.bar(places, [row["median_speedup"]["auto"][other] for row in rows], 0.4, label=f"against {other}")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks(range(len(rows)), [f"{row['rows']}\nx {row['columns']}" for row in rows], fontsize=8)
    axes.set_ylabel("times faster")
    axes.set_title("Newton-Schulz alone, float32")
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Draws both; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).resolve().parent / "results"
    parser.add_argument("directory", type=Path, nargs="?", default=results)
    directory = parser.parse_args().directory
    for stem, draw in (("plans", draw_plans), ("newton_schulz", draw_newton_schulz)):
        draw(json.loads((directory / f"{stem}.json").read_text(encoding="utf-8")), directory / f"{stem}.png")


if __name__ == "__main__":
    main()
