"""One page about a run, or about several side by side: a summary first, then charts and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_muon.observe.metric_names import by_layer_kind, layer_kind
from megatron_muon.observe.page import Charts, details, items, page, paragraph, section, table, text
from megatron_muon.observe.timing.shown import SHOWN
from megatron_muon.profile import charts as draw
from megatron_muon.profile.merge import Merged, shown_spans
from megatron_muon.profile.run_files import LOSSES, RunFiles
from megatron_muon.profile.stands_out import short_name, stands_out

# Metric -> heading, what it says.
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

Section = tuple[str, str, str]
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
    sections = [*_loss_sections(runs, charts), *_metric_sections(runs, charts), *_rank_sections(runs, charts)]
    for number, run in enumerate(runs):
        if run.profile is not None:
            sections.append(_profile_section(run, run.profile, number, len(runs) > 1, step, charts))
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


# -- losses and metrics ----------------------------------------------------------------------------------------------


def _loss_sections(runs: Sequence[RunFiles], charts: Charts) -> list[Section]:
    several = len(runs) > 1
    series = {
        title: [
            draw.Series(run.name if several else title.split()[0].lower(), _points(run.losses[title]))
            for run in runs
            if title in run.losses
        ]
        for title in LOSSES.values()
    }
    if not any(series.values()):
        return []
    if several:
        shown = [f"<h3>{title}</h3>{charts.add(draw.lines(title, own))}" for title, own in series.items() if own]
    else:
        both = [line for own in series.values() for line in own]
        shown = [charts.add(draw.lines("loss", both))]
    return [_section("loss", "Loss", *shown)]


def _points(curve: Mapping[int, float]) -> dict[int, tuple[float, float, float]]:
    return {step: (value, value, value) for step, value in curve.items() if math.isfinite(value)}


def _section(key: str, heading: str, *content: str) -> Section:
    return key, heading, section(key, heading, *content)


def _metric_sections(runs: Sequence[RunFiles], charts: Charts) -> list[Section]:
    out = []
    for metric, (heading, meaning) in _METRICS.items():
        by_kind = {run.name: _by_kind(run.records, metric) for run in runs}
        by_kind = {name: kinds for name, kinds in by_kind.items() if kinds}
        if by_kind:
            shown = _compared(by_kind, heading, runs, metric, charts) if len(runs) > 1 else _alone(
                next(iter(by_kind.values())), heading, runs[0], metric, charts
            )  # fmt: skip
            out.append(_section(metric, heading, paragraph(meaning), *shown))
    return out


Points = dict[int, tuple[float, float, float]]


def _by_kind(records: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Points]:
    """Kind of layer -> step -> (mean, least, largest) over layers and experts."""
    out: dict[str, Points] = {}
    for record in records:
        for kind, values in by_layer_kind(record["matrices"], metric).items():
            out.setdefault(kind, {})[record["step"]] = (math.fsum(values) / len(values), min(values), max(values))
    return dict(sorted(out.items()))


def _expected(runs: Sequence[RunFiles], metric: str) -> Any:
    """What the settings aim at, if it is the same in all runs that say it."""
    found = {str(e): e for run in runs if run.records and (e := run.records[-1]["expected"].get(metric)) is not None}
    return next(iter(found.values())) if len(found) == 1 else None


def _alone(kinds: Mapping[str, Points], heading: str, run: RunFiles, metric: str, charts: Charts) -> list[str]:
    series = [draw.Series(short_name(kind), points) for kind, points in kinds.items()]
    chart = charts.add(draw.lines(heading, series, expected=_expected([run], metric)))
    last = run.records[-1]
    rows = _extremes(last, metric)
    if not rows:
        return [chart]
    numbers = ("matrices", "least", "mean", "largest")
    cells = table(("kind of layer", *numbers, "matrix with the largest"), rows, numbers=numbers)
    return [chart, details(f"Values of step {last['step']}", cells)]


def _extremes(record: Mapping[str, Any], metric: str) -> list[tuple[str, int, str, str, str, str]]:
    named: dict[str, list[tuple[float, str]]] = {}
    for name, values in record["matrices"].items():
        if metric in values and math.isfinite(values[metric]):
            named.setdefault(layer_kind(name), []).append((values[metric], name))
    rows = []
    for kind, found in sorted(named.items()):
        mean = math.fsum(value for value, _ in found) / len(found)
        (least, _), (most, which) = min(found), max(found)
        rows.append((kind, len(found), f"{least:.4g}", f"{mean:.4g}", f"{most:.4g}", which))
    return rows


def _compared(
    by_run: Mapping[str, Mapping[str, Points]], heading: str, runs: Sequence[RunFiles], metric: str, charts: Charts
) -> list[str]:
    """The mean over all kinds of each run, and below it a small chart for each kind."""
    expected = _expected(runs, metric)
    means = []
    for name, kinds in by_run.items():
        steps = sorted({step for points in kinds.values() for step in points})
        at = {step: [points[step][0] for points in kinds.values() if step in points] for step in steps}
        means.append(draw.Series(name, _points({step: math.fsum(v) / len(v) for step, v in at.items()})))
    whole = charts.add(draw.lines(f"{heading}, mean", means, expected=expected))
    small = []
    for kind in sorted({kind for kinds in by_run.values() for kind in kinds}):
        series = [draw.Series(name, kinds[kind]) for name, kinds in by_run.items() if kind in kinds]
        chart = charts.add(draw.lines(short_name(kind), series, expected=expected, height=130))
        small.append(f"<div><h3>{text(kind)}</h3>{chart}</div>")
    return [whole, details("Each kind of layer", f'<div class="grid">{"".join(small)}</div>')]


def _rank_sections(runs: Sequence[RunFiles], charts: Charts) -> list[Section]:
    """Attention logits, and what the slowest rank spent."""
    out = []
    names = {name for run in runs for record in run.records for name in record["run"]}
    logits = sorted(name for name in names if name.partition("/")[0] == _LOGITS)
    if logits:
        series = []
        for run in runs:
            for name in logits if len(runs) == 1 else [_LOGITS]:
                if curve := _curve(run, name):
                    label = run.name if len(runs) > 1 else name.partition("/")[2] or "all"
                    series.append(draw.Series(_layer(label), _points(curve)))
        meaning = "Largest finite logit of all layers since the last logged step, and of each attention layer."
        if series:
            out.append(
                _section(
                    "logits", "Largest attention logits", paragraph(meaning), charts.add(draw.lines("logit", series))
                )
            )
    others = sorted(name for name in names if "/" not in name and name not in logits)
    small = []
    for name in others:
        series = [
            draw.Series(run.name if len(runs) > 1 else "", _points(curve))
            for run in runs
            if (curve := _curve(run, name))
        ]
        if series:
            title = name.replace("_", " ")
            small.append(f"<div><h3>{text(title)}</h3>{charts.add(draw.lines(title, series, height=110))}</div>")
    if small:
        meaning = "What the slowest or busiest rank spent in a logged step, and its ratio to the mean of all ranks."
        out.append(
            _section("ranks", "Ranks in logged steps", paragraph(meaning), f'<div class="grid">{"".join(small)}</div>')
        )
    return out


def _layer(label: str) -> str:
    return label.removeprefix("decoder.").removesuffix(".self_attention").removesuffix(".core_attention")


def _curve(run: RunFiles, name: str) -> dict[int, float]:
    return {r["step"]: r["run"][name] for r in run.records if name in r["run"] and math.isfinite(r["run"][name])}


# -- profile ---------------------------------------------------------------------------------------------------------


def _profile_section(
    run: RunFiles, profile: Merged, number: int, several: bool, step: int | None, charts: Charts
) -> Section:
    from megatron_muon.observe.timing.steps import median_step
    from megatron_muon.observe.timing.table import COLUMNS, NUMBERS, phase_rows, step_notes, step_title

    summary = median_step(profile.summaries())
    rows = phase_rows(summary, profile.facts)
    phases = table(COLUMNS, list(rows.values()), numbers=NUMBERS, colors=[SHOWN[name].color for name in rows])
    shown = _shown_step(profile, step)
    records = profile.records[shown]
    times = [
        (f"rank {rank}", name, ms)
        for rank, record in sorted(records.items())
        for name in SHOWN
        if (ms := record.numbers.get(f"{name}_ms")) is not None
    ]
    heading = f"Where the time of a step goes: {run.name}" if several else "Where the time of a step goes"
    return _section(
        f"profile{number}" if several else "profile",
        heading,
        paragraph(f"{step_title(summary)}. Colors are those of the charts below."),
        phases,
        items(step_notes(summary)),
        f"<h3>Timeline of step {shown}</h3>",
        paragraph(
            "An exchange is hidden while its bar lies below Newton-Schulz's; gray is time in which the rank waits. "
            "Ranks of different hosts are aligned at the all-gather after each step."
        ),
        charts.add(draw.timeline(shown_spans(profile, shown))),
        f"<h3>The ranks in step {shown}</h3>",
        paragraph("A rank that waits long waits for one that computes long, or for the links."),
        charts.add(draw.stacked(times)),
        details("Numbers of each rank, in its last profiled step", _ranks_table(profile)),
    )


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
    return table(columns, rows, numbers=[column for column in columns if column != "host"])
