"""Shows a model's estimate: tables for people, and a dictionary for programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from megatron_muon.estimate.collectives import exchange_ms
from megatron_muon.estimate.estimates import MOONLIGHT, OURS, SCHEMES, UPSTREAM, ModelEstimate, StageEstimate, mean
from megatron_muon.estimate.groups import PlanSettings
from megatron_muon.estimate.schemes import PER_RANK, SchemeDemand
from megatron_muon.observe import units
from megatron_muon.observe.console import print_list, table
from megatron_muon.plan.machines import (
    COMPUTE_EFFICIENCY,
    GPU_MODELS,
    GPUS_PER_NODE,
    LINK_EFFICIENCY,
    MEMORY_EFFICIENCY,
    GpuModel,
)

JSON_VERSION = 2
TITLES = {OURS: "Distributed Muon", UPSTREAM: "Megatron layer-wise", MOONLIGHT: "Moonlight all-gather"}
_COLUMNS = [TITLES[scheme] for scheme in SCHEMES]
_TIMES = ("exchange", "Newton-Schulz", "memory")


def print_estimate(plan: ModelEstimate, console: Console) -> None:
    """Prints an estimate: the model and its layout, two tables for each distinct stage, and what the numbers count.

    Args:
        plan: The estimate.
        console: Console of at least 80 columns.
    """
    layout, model = plan.layout, plan.model
    console.print(
        f"{model.name}: {len(model.layers)} layers, {units.count(model.numel)} parameters, "
        f"{units.count(model.matrix_numel)} of them Muon's"
    )
    console.print(
        f"{layout.num_ranks} ranks: dp {layout.dp}, tp {layout.tp}, pp {layout.pp}, ep {layout.ep}, "
        f"expert tp {layout.expert_tp}, expert dp {layout.expert_dp}, instances {layout.instances}"
    )
    for stage in plan.stages:
        console.print()
        console.print(_stage_title(plan, stage), style="bold")
        console.print(_demands(stage))
        console.print(_times(stage, plan.settings))
    console.print("Notes")
    print_list(console, (*plan.notes, *_legend(plan)))


def _stage_title(plan: ModelEstimate, stage: StageEstimate) -> str:
    dense, experts = stage.param_numel
    which = f"Stage {stage.stages[0]}" if len(stage.stages) == 1 else f"Stages {_runs(stage.stages)}, each"
    parameters = f"{units.count(dense)} dense" + (f" + {units.count(experts)} expert" if experts else "")
    return (
        f"{which}: {stage.num_layers} layers, {stage.num_logical_matrices} logical matrices on "
        f"{plan.layout.stage_ranks} ranks; Muon parameters on a rank: {parameters}"
    )


class _Measure(NamedTuple):
    """A line of the first table: its label, its unit, the unit's size, and the value; None where it does not exist."""

    label: str
    unit: str
    scale: float
    value: Callable[[StageEstimate, SchemeDemand], float | None]


_MEASURES = (
    _Measure("Newton-Schulz, busiest rank", "TFLOP", 1e12, lambda _, demand: max(demand.flops)),
    _Measure("Newton-Schulz, mean", "TFLOP", 1e12, lambda _, demand: mean(demand.flops)),
    _Measure("Newton-Schulz, ideal", "TFLOP", 1e12, lambda stage, _: stage.ideal_flops),
    _Measure("busiest / ideal", "", 1, lambda stage, demand: max(demand.flops) / stage.ideal_flops),
    _Measure("busiest / ideal with messages of teams", "", 1, lambda stage, demand: demand.busiest / stage.ideal_flops),
    _Measure("sent beyond AdamW, mean", "MB", 1e6, lambda _, demand: mean(demand.sent_bytes)),
    _Measure("sent beyond AdamW, busiest rank", "MB", 1e6, lambda _, demand: max(demand.sent_bytes)),
    _Measure(
        "the same over what AdamW sends",
        "%",
        0.01,
        lambda stage, demand: max(demand.sent_bytes) / stage.adamw_bytes if stage.adamw_bytes else None,
    ),
    _Measure("sent within teams, busiest rank", "MB", 1e6, lambda _, demand: max(demand.team_bytes)),
    _Measure("collectives beyond AdamW's", "", 1, lambda _, demand: demand.num_collectives),
    _Measure("momentum, largest", "MB", 1e6, lambda _, demand: max(demand.momentum_bytes)),
    _Measure("momentum, mean", "MB", 1e6, lambda _, demand: mean(demand.momentum_bytes)),
    _Measure("exchange buffers, largest", "MB", 1e6, lambda _, demand: max(demand.exchange_buffer_bytes)),
    _Measure("gradient and parameter buffers", "MB", 1e6, lambda _, demand: demand.buffer_bytes),
    _Measure("padding, dense", "%", 0.01, lambda _, demand: demand.padding[0]),
    _Measure("padding, expert", "%", 0.01, lambda _, demand: demand.padding[1]),
)


def _demands(stage: StageEstimate) -> Table:
    """What a rank has to do, send and store: a line for each measure that exists, a column for each scheme."""
    rows: list[list[object]] = []
    for measure in _MEASURES:
        demands = (stage.schemes[scheme] for scheme in SCHEMES)
        values = [None if demand is None else measure.value(stage, demand) for demand in demands]
        if values != [None] * len(values):
            cells = (None if value is None else _number(value / measure.scale) for value in values)
            rows.append([measure.label, measure.unit, *cells])
    return table(("per rank and step", "unit", *_COLUMNS), rows, numbers=_COLUMNS)


def _times(stage: StageEstimate, settings: PlanSettings) -> Table:
    rows: list[list[object]] = []
    for gpu in GPU_MODELS:
        times = [None if e is None else _predicted(gpu, e, settings) for e in map(stage.schemes.get, SCHEMES)]
        adamw = exchange_ms(gpu, stage.adamw_collectives, settings.rates, settings.links)
        for part in _TIMES:
            cells = [None if t is None else _number(t[part]) for t in times]
            name = gpu.name if part == _TIMES[0] else ""
            rows.append([name, part, *cells, _number(adamw) if part == "exchange" else None])
    columns = [*_COLUMNS, "AdamW"]
    return table(("predicted ms on", "", *columns), rows, numbers=columns)


def _predicted(gpu: GpuModel, demand: SchemeDemand, settings: PlanSettings) -> dict[str, float]:
    """Milliseconds of each part of a step, as if nothing overlapped."""
    return {
        "exchange": exchange_ms(gpu, demand.collectives, settings.rates, settings.links),
        "Newton-Schulz": gpu.newton_schulz_ms(max(demand.flops)),
        "memory": gpu.memory_ms(max(demand.memory_traffic_bytes)),
    }


def _legend(plan: ModelEstimate) -> list[str]:
    settings, rates = plan.settings, plan.settings.rates
    if settings.links is None:
        links = (
            "Links: data sheets for predictions. The planner's own figures are conservative defaults, not measured: "
            f"{rates.node_bytes_per_s / 1e9:g} GB/s and {rates.node_latency_s * 1e6:g} us within a node, "
            f"{rates.bytes_per_s / 1e9:g} GB/s and {rates.latency_s * 1e6:g} us between nodes, "
            f"{rates.launch_s * 1e6:g} us for a launch. Measure them with "
            "`python -m megatron_muon.profile links --json FILE` and plan with --links FILE."
        )
    else:
        links = f"Links: as measured ({settings.links.source}); what was not measured: defaults."
    return [
        f"Newton-Schulz: {settings.muon.ns_steps} steps. Ideal: every logical matrix once, level over the ranks.",
        f"Sent: beyond AdamW's reduce-scatter ({settings.grad_bytes} B) and all-gather (2 B) of the same parameters. "
        f"Distributed Muon: all-to-alls in {settings.muon.exchange_dtype}. Megatron layer-wise: padding, and fp32 "
        "gathers over TP (--muon-tp-mode duplicated). Moonlight: bf16 gathers over DP and TP.",
        "Teams: ranks that share a matrix where that is faster. Buffers: of Muon's parameters alone.",
        "Memory: what element-wise kernels, packing and the gather of parameters read and write.",
        f"Predicted ms: nothing overlaps; {LINK_EFFICIENCY:.0%} of the nominal links, {COMPUTE_EFFICIENCY:.0%} of the "
        f"nominal bf16 rate and {MEMORY_EFFICIENCY:.0%} of the nominal memory bandwidth; {GPUS_PER_NODE} GPUs a node.",
        links,
        f"Model: {plan.model.source}.",
        *(f"{gpu.name}: {gpu.source}." for gpu in GPU_MODELS),
    ]


def estimate_to_json(plan: ModelEstimate) -> dict[str, Any]:
    """The estimate as plain values: bytes, FLOPs and milliseconds per rank and step.

    Returns:
        A dictionary that `json.dumps` takes; docs/planning.md describes it.
    """
    layout, settings = plan.layout, plan.settings
    return {
        "version": JSON_VERSION,
        "model": {
            "name": plan.model.name,
            "source": plan.model.source,
            "num_layers": len(plan.model.layers),
            "numel": plan.model.numel,
            "muon_numel": plan.model.matrix_numel,
        },
        "layout": {**layout.sizes, "expert_dp": layout.expert_dp, "instances": layout.instances},
        "settings": {
            "ns_steps": settings.muon.ns_steps,
            "exchange_dtype": settings.muon.exchange_dtype,
            "transformer_impl": settings.impl,
            "overlap_grad_reduce": settings.overlap_grad_reduce,
            "bucket_size": settings.bucket_size,
            "grad_bytes": settings.grad_bytes,
        },
        "prediction": {
            "link_efficiency": LINK_EFFICIENCY,
            "compute_efficiency": COMPUTE_EFFICIENCY,
            "memory_efficiency": MEMORY_EFFICIENCY,
            "links": None if settings.links is None else settings.links.to_json(),
            "planner": asdict(settings.rates),
            "gpus_per_node": GPUS_PER_NODE,
            "machines": {gpu.name: {k: v for k, v in asdict(gpu).items() if k != "name"} for gpu in GPU_MODELS},
        },
        "notes": list(plan.notes),
        "stages": [_stage_to_json(plan, stage) for stage in plan.stages],
    }


def _stage_to_json(plan: ModelEstimate, stage: StageEstimate) -> dict[str, Any]:
    settings, schemes = plan.settings, stage.schemes.items()
    adamw = {m.name: exchange_ms(m, stage.adamw_collectives, settings.rates, settings.links) for m in GPU_MODELS}
    return {
        "stages": list(stage.stages),
        "num_layers": stage.num_layers,
        "ranks": plan.layout.stage_ranks,
        "logical_matrices": stage.num_logical_matrices,
        "muon_numel_per_rank": {"dense": stage.param_numel[0], "expert": stage.param_numel[1]},
        "ideal_flops": stage.ideal_flops,
        "adamw": {"sent_bytes": stage.adamw_bytes, "predicted_ms": adamw},
        "schemes": {name: None if e is None else _scheme_to_json(settings, stage, e) for name, e in schemes},
    }


def _scheme_to_json(settings: PlanSettings, stage: StageEstimate, demand: SchemeDemand) -> dict[str, Any]:
    flops = demand.flops
    return {
        "flops": {
            "max": max(flops),
            "mean": mean(flops),
            "max_over_ideal": max(flops) / stage.ideal_flops,
            "busiest_over_ideal": demand.busiest / stage.ideal_flops,
        },
        **{name: _range(getattr(demand, name)) for name in PER_RANK if name != "flops"},
        "buffer_bytes": demand.buffer_bytes,
        "collectives": demand.num_collectives,
        "padding": {"dense": demand.padding[0], "expert": demand.padding[1]},
        "predicted_ms": {
            gpu.name: {part.lower().replace("-", "_"): ms for part, ms in _predicted(gpu, demand, settings).items()}
            for gpu in GPU_MODELS
        },
    }


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"mean": mean(values), "max": max(values)}


def _runs(indices: Sequence[int]) -> str:
    """Ascending indices with runs joined: 0, 2-4."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _number(value: float) -> str:
    """Three significant digits, or all digits of a whole part that is longer."""
    return f"{value:.0f}" if value >= 1000 or value == 0 else f"{value:.3g}"
