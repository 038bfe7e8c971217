"""One page about a run, or about several side by side: a summary first, then charts and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_muon.observe.metric_names import by_layer_kind, layer_kind
from megatron_muon.observe.page import Charts, details, html_table, items, page, paragraph, section, text
from megatron_muon.observe.timing.shown import SHOWN
from megatron_muon.profile import charts as draw
from megatron_muon.profile.merge import Merged, shown_spans
from megatron_muon.profile.run_files import RunFiles
from megatron_muon.profile.stands_out import short_name, stands_out

# Metric -> heading, explanation.
_METRICS: Mapping[str, tuple[str, str]] = {
    "update_rms": (
        "Update RMS",
        "Root mean square of the updates before the learning rate. Kinds of layers far below the dotted line have "
        "gradients with few directions, which Newton-Schulz does not lift completely.",
    ),
    "orthogonality_error": (
        "Orthogonality error",
        "Norm of O Oᵀ - I over the root of the short side. The band is what the polynomial of the coefficient set "
        "leaves by design; 1 is a matrix of zeros.",
    ),
    "update_to_weight": (
        "Share of the weights replaced in a step",
        "Norm of learning rate times update, over the norm of the weight. Kinds should be alike, and settle.",
    ),
    "weight_rms": ("Weight RMS", "Root mean square of the weights. Without weight decay it keeps growing."),
    "svd_entropy": (
        "Spectral entropy of weights",
        "Entropy of the squared singular values of sampled weights; 1 if all are equal. Moonlight's paper finds "
        "more of it with Muon than with AdamW.",
    ),
    "stable_rank": ("Stable rank of weights", "Squared norm over the squared largest singular value, of samples."),
    "momentum_norm": ("Momentum norm", "Norm of the momentum. A spike shows a bad batch before the loss does."),
}
_LOGITS = "max_attention_logit"

PageSection = tuple[str, str, str]
"""Anchor, heading and HTML."""


def make_page(runs: Sequence[RunFiles], *, step: int | None = None) -> str:
    """The page.

    Args:
        runs: At least one; their names differ.
        step: Profiled step to show in detail; None takes one of median length.

    Raises:
        ValueError: If `step` was not profiled, or charts cannot be made.
    """
    charts = Charts()
    sections = list(_curve_sections(runs, charts))
    for number, run in enumerate(runs):
        if run.profile is not None:
            key, name = (f"profile{number}", f": {run.name}") if len(runs) > 1 else ("profile", "")
            heading = f"Where the time of a step goes{name}"
            sections.append((key, heading, section(key, heading, *_profile(run.profile, step, charts))))
    if step is not None and all(run.profile is None for run in runs):
        raise ValueError(f"--step: got {step}, expected a run that was trained with --muon-profile")
    title = " and ".join(run.name for run in runs)
    steps = sorted({step for run in runs for step in run.steps})
    subtitle = f"Distributed Muon; steps {steps[0]} to {steps[-1]}"
    return page(title, subtitle, _summary(runs), sections, charts)


# -- summary ---------------------------------------------------------------------------------------------------------


def _summary(runs: Sequence[RunFiles]) -> str:
    blocks = []
    for run in runs:
        name = f"<h3>{text(run.name)}</h3>" if len(runs) > 1 else ""
        found = [*stands_out(run), *run.notes] or ["Nothing: all values are where they are expected."]
        blocks.append(
            f"<div>{name}<h3>What ran</h3>{items(_what_ran(run))}<h3>What stands out</h3>{items(found)}"
            f"{_bottleneck(run)}</div>"
        )
    content = "".join(blocks) if len(runs) == 1 else f'<div class="grid">{"".join(blocks)}</div>'
    return f'<div class="summary"><h2>Summary</h2>{content}</div>'


def _what_ran(run: RunFiles) -> list[str]:
    out = []
    steps = run.steps
    logged = f", {len(run.records)} with metrics" if run.records else ""
    profiled = f", {len(run.profile.records)} profiled" if run.profile else ""
    out.append(f"Steps {steps[0]} to {steps[-1]}{logged}{profiled}.")
    if run.profile is not None:
        facts = run.profile.facts
        settings = facts.settings
        out.append(
            f"{facts.world_size} ranks of {facts.device_name}; Newton-Schulz: {settings.get('coefficients')}, "
            f"{settings.get('ns_steps')} steps in {settings.get('ns_dtype')}; exchange in "
            f"{settings.get('exchange_dtype')}, {facts.rounds} {'round' if facts.rounds == 1 else 'rounds'}."
        )
    for title, curve in run.losses.items():
        last = max(curve)
        out.append(f"{title}: {curve[min(curve)]:.4g} at step {min(curve)}, {curve[last]:.4g} at step {last}.")
    if run.records:
        last_record = run.records[-1]
        ranges = []
        for metric in ("update_rms", "orthogonality_error"):
            values = [v for of_kind in by_layer_kind(last_record["matrices"], metric).values() for v in of_kind]
            if values:
                ranges.append(f"{_METRICS[metric][0].lower()} {min(values):.3g} to {max(values):.3g}")
        if ranges:
            out.append(f"At step {last_record['step']}: {', '.join(ranges)}.")
    return out


def _bottleneck(run: RunFiles) -> str:
    if run.profile is None:
        return ""
    from megatron_muon.observe.timing.steps import median_step
    from megatron_muon.observe.timing.table import found_lines

    summary = median_step(run.profile.summaries())
    took = f"The optimizer step takes {summary['wall_ms'].largest:.1f} ms on the slowest rank."
    found = items([took, *found_lines(summary, run.profile.facts)])
    return f"<h3>Where the time goes, and what to do</h3>{found}"


# -- curves ----------------------------------------------------------------------------------------------------------

Curves = Mapping[str, draw.Points]
"""Label -> points of a line, at least one."""


def _curve_sections(runs: Sequence[RunFiles], charts: Charts) -> Iterator[PageSection]:
    """Losses, metrics of matrices, attention logits and ranks, each if there is something to show.

    A run alone has a chart with a line for each label; of several runs, each label has a chart with a line for each.
    """
    several = len(runs) > 1
    losses = {run.name: _points(run.losses) for run in runs}
    if several:
        chart = _grid(losses, charts, height=220)
    else:
        named = [(title.split()[0].lower(), points) for title, points in losses[runs[0].name].items()]
        chart = _lines("loss", named, charts)
    yield from _section("loss", "Loss", "", chart)
    for metric, (heading, meaning) in _METRICS.items():
        kinds = {run.name: _by_kind(run.records, metric) for run in runs}
        expected = _expected(runs, metric)
        if several:
            means = [(name, _mean(own)) for name, own in kinds.items() if own]
            chart = _lines(f"{heading}, mean", means, charts, expected)
            more = details("Each kind of layer", _grid(kinds, charts, expected))
        else:
            named = [(short_name(kind), points) for kind, points in kinds[runs[0].name].items()]
            chart, more = _lines(heading, named, charts, expected), _extremes(runs[0].records, metric)
        yield from _section(metric, heading, meaning, chart, more)
    spent = {run.name: _points(_of_runs(run.records)) for run in runs}
    logits = [
        (run if several else _layer(label), points)
        for run, curves in spent.items()
        for label, points in curves.items()
        if label == _LOGITS or (not several and label.startswith(f"{_LOGITS}/"))
    ]
    meaning = "Largest finite logit of all layers since the last logged step, and of each attention layer."
    yield from _section("logits", "Largest attention logits", meaning, _lines("logit", logits, charts))
    others = {
        run: {label.replace("_", " "): p for label, p in curves.items() if "/" not in label and label != _LOGITS}
        for run, curves in spent.items()
    }
    meaning = "What the slowest or busiest rank spent in a logged step, and its ratio to the mean of all ranks."
    yield from _section("ranks", "Ranks in logged steps", meaning, _grid(others, charts, height=110))


def _section(key: str, heading: str, meaning: str, charts: str, more: str = "") -> Iterator[PageSection]:
    """A section, unless it has no charts."""
    if charts:
        content = paragraph(meaning) if meaning else ""
        yield key, heading, section(key, heading, content, charts, more)


def _lines(
    title: str, curves: Sequence[tuple[str, draw.Points]], charts: Charts, expected: Any = None, height: int = 220
) -> str:
    """A chart with a line for each (label, points); empty without any."""
    return charts.add(draw.lines(title, curves, expected=expected, height=height)) if curves else ""


def _grid(by_run: Mapping[str, Curves], charts: Charts, expected: Any = None, height: int = 130) -> str:
    """A chart for each label, with a line for each run; empty without any."""
    shown = []
    for label in sorted({label for curves in by_run.values() for label in curves}):
        own = [(run if len(by_run) > 1 else "", curves[label]) for run, curves in by_run.items() if label in curves]
        chart = _lines(short_name(label), own, charts, expected, height)
        shown.append(f"<div><h3>{text(label)}</h3>{chart}</div>")
    return f'<div class="grid">{"".join(shown)}</div>' if shown else ""


def _points(curves: Mapping[str, Mapping[int, float]]) -> Curves:
    """Label -> points of the finite values, where there are any."""
    finite = {
        label: {step: (value, value, value) for step, value in curve.items() if math.isfinite(value)}
        for label, curve in curves.items()
    }
    return {label: points for label, points in finite.items() if points}


def _by_kind(records: Sequence[Mapping[str, Any]], metric: str) -> Curves:
    """Kind of layer -> step -> (mean, least, largest) over layers and experts."""
    out: dict[str, dict[int, tuple[float, float, float]]] = {}
    for record in records:
        for kind, values in by_layer_kind(record["matrices"], metric).items():
            out.setdefault(kind, {})[record["step"]] = (math.fsum(values) / len(values), min(values), max(values))
    return dict(sorted(out.items()))


def _mean(kinds: Curves) -> draw.Points:
    """The mean over all kinds that have a step."""
    at: dict[int, list[float]] = {}
    for points in kinds.values():
        for step, (value, *_) in points.items():
            at.setdefault(step, []).append(value)
    return {step: (math.fsum(v) / len(v),) * 3 for step, v in sorted(at.items())}


def _of_runs(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Name of a number of the whole run -> step -> value."""
    out: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record["run"].items():
            out.setdefault(name, {})[record["step"]] = value
    return dict(sorted(out.items()))


def _layer(label: str) -> str:
    layer = label.partition("/")[2].removeprefix("decoder.")
    return layer.removesuffix(".self_attention").removesuffix(".core_attention") or "all"


def _expected(runs: Sequence[RunFiles], metric: str) -> Any:
    """What the settings aim at, if it is the same in all runs that say it."""
    found = {str(e): e for run in runs if run.records and (e := run.records[-1]["expected"].get(metric)) is not None}
    return next(iter(found.values())) if len(found) == 1 else None


def _extremes(records: Sequence[Mapping[str, Any]], metric: str) -> str:
    """A table of the last record's values, folded away; empty without values."""
    named: dict[str, list[tuple[float, str]]] = {}
    for name, values in records[-1]["matrices"].items() if records else ():
        if metric in values and math.isfinite(values[metric]):
            named.setdefault(layer_kind(name), []).append((values[metric], name))
    rows = []
    for kind, found in sorted(named.items()):
        mean = math.fsum(value for value, _ in found) / len(found)
        (least, _), (most, which) = min(found), max(found)
        rows.append((kind, len(found), f"{least:.4g}", f"{mean:.4g}", f"{most:.4g}", which))
    numbers = ("matrices", "least", "mean", "largest")
    cells = html_table(("kind of layer", *numbers, "matrix with the largest"), rows, numbers=numbers)
    return details(f"Values of step {records[-1]['step']}", cells) if rows else ""


# -- profile ---------------------------------------------------------------------------------------------------------


def _profile(profile: Merged, step: int | None, charts: Charts) -> Iterator[str]:
    from megatron_muon.observe.timing.steps import median_step
    from megatron_muon.observe.timing.table import COLUMNS, NUMBERS, phase_rows, step_notes, step_title

    summary = median_step(profile.summaries())
    rows = phase_rows(summary, profile.facts)
    yield paragraph(f"{step_title(summary)}. Colors are those of the charts below.")
    yield html_table(COLUMNS, list(rows.values()), numbers=NUMBERS, colors=[SHOWN[name].color for name in rows])
    yield items(step_notes(summary))
    shown = _shown_step(profile, step)
    yield f"<h3>Timeline of step {shown}</h3>"
    yield paragraph(
        "An exchange is hidden while its bar lies below Newton-Schulz's; gray is time in which the rank waits. "
        "Ranks of different hosts are aligned at the all-gather after each step."
    )
    yield charts.add(draw.bars("What each rank did in one step", shown_spans(profile, shown)))
    yield f"<h3>The ranks in step {shown}</h3>"
    yield paragraph("A rank that waits long waits for one that computes long, or for the links.")
    times: list[dict[str, Any]] = []
    for rank, record in sorted(profile.records[shown].items()):
        at = 0.0
        for name in SHOWN:
            ms = record.numbers.get(f"{name}_ms", 0.0)
            times += [{"lane": f"rank {rank}", "phase": name, "start": at, "stop": at + ms}] if ms else []
            at += ms
    yield charts.add(draw.bars("Where the time of each rank goes", times, begins=False))
    yield details("Numbers of each rank, in its last profiled step", _ranks_table(profile))


def _shown_step(profile: Merged, step: int | None) -> int:
    """The step asked for, or the one of median length, of those that most ranks have profiled."""
    if step is None:
        lengths = {summary.step: summary["wall_ms"].largest for summary in profile.summaries() if summary.step > 1}
        if not lengths:
            return max(profile.records)
        middle = statistics.median_low(lengths.values())
        return next(step for step, length in lengths.items() if length == middle)
    if step not in profile.records:
        profiled = ", ".join(map(str, sorted(profile.records)[:8]))
        raise ValueError(f"--step: got {step}, expected a profiled step: {profiled}, ...")
    return step


def _ranks_table(profile: Merged) -> str:
    last = {rank: record for _, of_step in sorted(profile.records.items()) for rank, record in of_step.items()}
    rows: list[tuple[object, ...]] = []
    for rank, record in sorted(last.items()):
        n = record.numbers
        times = f"{n['wall_ms']:.2f}", f"{n['ns_ms']:.2f}", f"{n['ns_flops'] / 1e9:.4g}"
        sent = (f"{n[key]:.0f}" for key in ("sent_bytes", "planned_bytes", "team_bytes", "planned_team_bytes"))
        rows.append((rank, profile.traces[rank].info.get("host"), record.step, *times, *sent))
    columns = (
        "rank", "host", "step", "step, ms", "Newton-Schulz, ms", "GFLOP", "sent, bytes", "planned, bytes",
        "teams sent, bytes", "teams planned, bytes",
    )  # fmt: skip
    return html_table(columns, rows, numbers=[column for column in columns if column != "host"])
