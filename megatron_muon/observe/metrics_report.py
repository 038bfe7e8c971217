"""`python -m megatron_muon report RUN`: draws what a run logged with --muon-log-interval, as PNGs and one HTML page.

The page holds its pictures, so that it can be sent around alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_muon.observe.metric_names import FILE_NAME, by_kind
from megatron_muon.observe.metric_names import kind as kind_of
from megatron_muon.observe.page import page, plain, png, section, table

DIRECTORY = "muon_report"

# Metric -> title, what it says.
_TITLES: Mapping[str, tuple[str, str]] = {
    "update_rms": (
        "Update RMS",
        "Root mean square of updates before the learning rate. With scale mode rms it aims at --muon-update-rms; "
        "matrices whose gradients have few large singular values stay below.",
    ),
    "update_to_weight": (
        "Update to weight",
        "Norm of learning rate times update, over that of the weight. A kind far above the others trains too fast.",
    ),
    "orthogonality_error": (
        "Orthogonality error",
        "Norm of O O^T - I over the root of the short side: how far singular values of Newton-Schulz's result are from "
        "1. Keller's five steps leave 0.2 to 0.3; one is a matrix of zeros.",
    ),
    "weight_rms": (
        "Weight RMS",
        "Root mean square of weights before the step. Without weight decay it grows for as long as a run lasts.",
    ),
    "momentum_norm": ("Momentum norm", "Frobenius norm of the momentum buffer."),
    "stable_rank": (
        "Stable rank of weights",
        "Squared Frobenius norm over the squared largest singular value, of sampled weights.",
    ),
    "svd_entropy": (
        "SVD entropy of weights",
        "Entropy of squared singular values, 1 if all are equal, of sampled weights. Moonlight's paper finds "
        "more of it in Muon's weights than in AdamW's.",
    ),
}

_RANKS = (
    "What the slowest rank spent, and over the mean of all ranks. Of attention logits, the largest of all (dots) and "
    "of each layer (lines)."
)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the subcommand `report`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report", help="draw the metrics that a run logged", description=__doc__
    )
    parser.add_argument("source", metavar="RUN", type=Path, help=f"directory that has {FILE_NAME} in it, or that file")
    parser.add_argument("--out", type=Path, help=f"where to write (default: {DIRECTORY} beside the file)")
    parser.set_defaults(run=_run)
    return parser


def _run(args: argparse.Namespace) -> int:
    try:
        path = find(args.source)
        records = read(path)
    except ValueError as error:
        print(f"report: {error}")
        return 2
    written = write(records, args.out or path.parent / DIRECTORY, title=str(path.parent))
    print(f"{len(records)} logged steps: {written}")
    return 0


def find(run: Path) -> Path:
    """The file with a run's metrics.

    Raises:
        ValueError: If there is none, or there are several.
    """
    if run.is_file():
        return run
    found = sorted(run.rglob(FILE_NAME))
    if len(found) != 1:
        listed = ", ".join(map(str, found)) or "none"
        raise ValueError(
            f"RUN: got {run} with {listed}, expected one {FILE_NAME}; train with --muon-log-interval and "
            "--tensorboard-dir or --muon-metrics-dir, or name the file"
        )
    return found[0]


def read(path: Path) -> list[dict[str, Any]]:
    """The logged steps in order; of a step that a resumed run logged again, the later record.

    Raises:
        ValueError: If there is no record, or a line is none; a last line that was cut off is left out.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[int(record["step"])] = {"run": {}, "matrices": {}, **record}
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is no record: {line[:80]!r}; remove it") from None
    if not records:
        raise ValueError(f"{path}: got no record, expected at least one; the run has logged nothing yet")
    return [records[step] for step in sorted(records)]


def write(records: Sequence[Mapping[str, Any]], out: Path, *, title: str) -> Path:
    """Draws every metric and writes PNGs and `index.html`.

    Args:
        records: From `read`.
        out: Directory, made if it is missing.
        title: Of the page.

    Returns:
        The page's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for metric, (heading, text) in _TITLES.items():
        picture = _draw_metric(records, metric, heading)
        if picture is not None:
            (out / f"{metric}.png").write_bytes(picture)
            sections.append(section(heading, text, picture) + _table(records[-1], metric))
    picture = _draw_ranks(records)
    if picture is not None:
        (out / "ranks.png").write_bytes(picture)
        sections.append(section("Ranks", _RANKS, picture))
    steps = f"steps {records[0]['step']} to {records[-1]['step']}, {len(records)} logged"
    path = out / "index.html"
    path.write_text(page(title, steps, sections), encoding="utf-8")
    return path


def _draw_metric(records: Sequence[Mapping[str, Any]], metric: str, heading: str) -> bytes | None:
    """Left, by kind, the mean over layers and their range, by step; right, the last step's histogram."""
    from matplotlib.figure import Figure

    by_step = {record["step"]: by_kind(record["matrices"], metric) for record in records}
    kinds = sorted({kind for values in by_step.values() for kind in values})
    if not kinds:
        return None
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    curve, histogram = figure.subplots(1, 2, width_ratios=(2, 1))
    for kind in kinds:
        steps = [step for step in by_step if kind in by_step[step]]
        values = [by_step[step][kind] for step in steps]
        (line,) = curve.plot(steps, [sum(v) / len(v) for v in values], "o-", markersize=2.5, label=plain(kind))
        curve.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.15, linewidth=0
        )
    everything = [v for values in by_step.values() for group in values.values() for v in group]
    if min(everything) > 0 and max(everything) > 50 * min(everything):
        curve.set_yscale("log")
    # Sampled metrics have a few matrices a step: all steps then.
    last = by_step[records[-1]["step"]]
    if metric in ("stable_rank", "svd_entropy"):
        last = {kind: [v for values in by_step.values() for v in values.get(kind, [])] for kind in kinds}
    histogram.hist([last[kind] for kind in last], bins=20, stacked=True, label=[plain(kind) for kind in last])
    curve.set_xlabel("step")
    curve.set_title(heading)
    histogram.set_title("last step" if metric not in ("stable_rank", "svd_entropy") else "all samples")
    histogram.set_ylabel("matrices")
    figure.legend(*curve.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="x-small")
    return png(figure)


def _draw_ranks(records: Sequence[Mapping[str, Any]]) -> bytes | None:
    from matplotlib.figure import Figure

    names = sorted({name for record in records for name in record["run"]})
    if not names:
        return None
    # `what/where` is drawn with `what`.
    panels = sorted({name.partition("/")[0] for name in names})
    columns = 3
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        for name in (name for name in names if name.partition("/")[0] == panel):
            points = [(record["step"], record["run"][name]) for record in records if name in record["run"]]
            style: dict[str, Any] = {"linewidth": 0.5} if "/" in name else {"marker": "o", "markersize": 2.5}
            axes.plot(*zip(*points, strict=True), **style)
        axes.set_title(plain(panel.replace("_", " ")), fontsize="small")
        axes.set_ylim(bottom=0)
    return png(figure)


def _table(record: Mapping[str, Any], metric: str) -> str:
    """The last step's values: for each kind the least, the mean and the largest, with the matrix that has it."""
    rows = []
    for kind in sorted(groups := _named(record["matrices"], metric)):
        values = sorted(groups[kind])
        mean = sum(value for value, _ in values) / len(values)
        least, most = values[0][0], values[-1][0]
        rows.append((kind, str(len(values)), f"{least:.4g}", f"{mean:.4g}", f"{most:.4g}", values[-1][1]))
    if not rows:
        return ""
    cells = table(("kind", "matrices", "least", "mean", "largest", "which"), rows)
    return f"<details><summary>step {record['step']}</summary>{cells}</details>"


def _named(matrices: Mapping[str, Mapping[str, float]], metric: str) -> dict[str, list[tuple[float, str]]]:
    out: dict[str, list[tuple[float, str]]] = {}
    for name, values in matrices.items():
        if metric in values and math.isfinite(values[metric]):
            out.setdefault(kind_of(name), []).append((values[metric], name))
    return out
