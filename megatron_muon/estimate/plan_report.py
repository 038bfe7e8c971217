"""Shows a model's plan: tables for people, and a dictionary for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_muon.estimate.estimates import (
    MOONLIGHT,
    OURS,
    SCHEMES,
    UPSTREAM,
    ModelPlan,
    SchemeEstimate,
    StageEstimate,
    mean,
)
from megatron_muon.plan.machines import COMPUTE_EFFICIENCY, GPU_MODELS, GPUS_PER_NODE, LINK_EFFICIENCY

JSON_VERSION = 1
TITLES = {OURS: "Distributed Muon", UPSTREAM: "Megatron layer-wise", MOONLIGHT: "Moonlight all-gather"}
_NONE = "-"


def print_plan(plan: ModelPlan, console: Console) -> None:
    """Prints a plan: the model and its layout, a table for each distinct stage, and what the numbers count.

    Args:
        plan: The plan.
        console: Where to.
    """
    layout, model = plan.layout, plan.model
    console.print(
        f"[bold]{model.name}[/bold]: {len(model.layers)} layers, {_count(model.numel)} parameters, "
        f"{_count(model.matrix_numel)} of them Muon's. {model.source}"
    )
    console.print(
        f"{layout.num_ranks} ranks: dp {layout.dp}, tp {layout.tp}, pp {layout.pp}, ep {layout.ep}, "
        f"expert tp {layout.expert_tp}, expert dp {layout.expert_dp}, instances {layout.instances}"
    )
    for note in plan.notes:
        console.print(f"[yellow]Note:[/yellow] {note}")
    for stage in plan.stages:
        console.print()
        console.print(stage_table(plan, stage))
    console.print()
    console.print(_legend(plan), style="dim")


def stage_table(plan: ModelPlan, stage: StageEstimate) -> Table:
    """The table of one distinct stage: a line for each measure, a column for each scheme."""
    adamw = ", ".join(f"{m.name} {_ms(m.exchange_ms(stage.adamw_collectives))}" for m in GPU_MODELS)
    table = Table(
        title=_stage_title(plan, stage),
        title_justify="left",
        title_style="bold",
        caption=f"AdamW's own reduce-scatter and all-gather, predicted ms: {adamw}",
        caption_justify="left",
    )
    table.add_column("per rank and step")
    for scheme in SCHEMES:
        table.add_column(TITLES[scheme], justify="right")
    for label, cells in _lines(stage):
        table.add_row(label, *cells)
    table.add_section()
    for machine in GPU_MODELS:
        cells = [
            _NONE
            if e is None
            else f"{_ms(machine.exchange_ms(e.collectives))} + {_ms(machine.newton_schulz_ms(e.flops_max))}"
            for e in (stage.schemes[scheme] for scheme in SCHEMES)
        ]
        table.add_row(f"predicted ms on {machine.name}: exchange + NS", *cells)
    return table


def _stage_title(plan: ModelPlan, stage: StageEstimate) -> str:
    dense, experts = stage.param_numel
    which = f"Stage {stage.stages[0]}" if len(stage.stages) == 1 else f"Stages {_runs(stage.stages)}, each"
    parameters = f"{_count(dense)} dense" + (f" + {_count(experts)} expert" if experts else "")
    return (
        f"{which}: {stage.num_layers} layers, {stage.num_logical_matrices} logical matrices on "
        f"{plan.layout.stage_ranks} ranks; Muon parameters on a rank: {parameters}"
    )


def _lines(stage: StageEstimate) -> list[tuple[str, list[str]]]:
    estimates = [stage.schemes[scheme] for scheme in SCHEMES]

    def line(label: str, cell: Any) -> tuple[str, list[str]]:
        return label, [_NONE if e is None else cell(e) for e in estimates]

    def of_adamw(sent: float) -> str:
        share = f" ({100 * sent / stage.adamw_bytes:.2f} %)" if stage.adamw_bytes else ""
        return f"{_bytes(sent)}{share}"

    return [
        line("NS FLOPs: most loaded rank", lambda e: _flops(e.flops_max)),
        line("NS FLOPs: mean", lambda e: _flops(e.flops_mean)),
        line("NS FLOPs: ideal", lambda _: _flops(stage.ideal_flops)),
        line("most loaded / ideal", lambda e: f"{e.flops_max / stage.ideal_flops:.2f}"),
        line("busiest / ideal, teams' talk included", lambda e: f"{e.busiest / stage.ideal_flops:.2f}"),
        line(f"sent beyond AdamW's {_bytes(stage.adamw_bytes)}: mean", lambda e: of_adamw(mean(e.sent_bytes))),
        line("sent beyond AdamW's: most loaded rank", lambda e: of_adamw(max(e.sent_bytes))),
        line("sent within teams: mean / most", lambda e: f"{_bytes(mean(e.team_bytes))} / {_bytes(max(e.team_bytes))}"),
        line("momentum: most / mean", lambda e: f"{_bytes(max(e.momentum_bytes))} / {_bytes(mean(e.momentum_bytes))}"),
        line("gradient + parameter buffers", lambda e: _bytes(e.buffer_bytes)),
        line("padding: dense / expert", lambda e: " / ".join(_percent(p) for p in e.padding)),
    ]


def _legend(plan: ModelPlan) -> str:
    settings = plan.settings
    sources = "; ".join(f"{m.name}: {m.source}" for m in GPU_MODELS)
    return (
        f"NS: Newton-Schulz, {settings.muon.ns_steps} steps, as the planner counts its FLOPs; ideal: every logical "
        "matrix once, level over the stage's ranks. Megatron layer-wise: its own layout, --muon-tp-mode duplicated. "
        f"Sent: what a rank sends beyond AdamW's reduce-scatter ({settings.grad_bytes} B) and all-gather (2 B) of the "
        f"same parameters; for Distributed Muon all-to-alls in {settings.muon.exchange_dtype}, for the layer-wise "
        "layout fp32 gathers over TP and its padding's way through reduce-scatter and all-gather, for Moonlight bf16 "
        "gathers over DP and TP. Teams: ranks that share a matrix where that is faster. Buffers: Muon's parameters "
        "alone. "
        f"Predicted: bandwidth only, nothing overlapped; {LINK_EFFICIENCY:.0%} of nominal link and "
        f"{COMPUTE_EFFICIENCY:.0%} of nominal bf16 rate assumed, nodes of {GPUS_PER_NODE}. {sources}."
    )


def plan_to_json(plan: ModelPlan) -> dict[str, Any]:
    """The plan as plain values: bytes, FLOPs and milliseconds per rank and step.

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
        "layout": {
            **layout.sizes,
            "expert_dp": layout.expert_dp,
            "instances": layout.instances,
        },
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
            "gpus_per_node": GPUS_PER_NODE,
            "machines": {
                m.name: {
                    "nvlink_bytes_per_s": m.nvlink_bytes_per_s,
                    "network_bytes_per_s": m.network_bytes_per_s,
                    "bf16_flops_per_s": m.bf16_flops_per_s,
                    "source": m.source,
                }
                for m in GPU_MODELS
            },
        },
        "notes": list(plan.notes),
        "stages": [_stage_to_json(plan, stage) for stage in plan.stages],
    }


def _stage_to_json(plan: ModelPlan, stage: StageEstimate) -> dict[str, Any]:
    return {
        "stages": list(stage.stages),
        "num_layers": stage.num_layers,
        "ranks": plan.layout.stage_ranks,
        "logical_matrices": stage.num_logical_matrices,
        "muon_numel_per_rank": {"dense": stage.param_numel[0], "expert": stage.param_numel[1]},
        "ideal_flops": stage.ideal_flops,
        "adamw": {
            "sent_bytes": stage.adamw_bytes,
            "predicted_ms": {m.name: m.exchange_ms(stage.adamw_collectives) for m in GPU_MODELS},
        },
        "schemes": {name: None if e is None else _scheme_to_json(stage, e) for name, e in stage.schemes.items()},
    }


def _scheme_to_json(stage: StageEstimate, estimate: SchemeEstimate) -> dict[str, Any]:
    return {
        "flops": {
            "max": estimate.flops_max,
            "mean": estimate.flops_mean,
            "max_over_ideal": estimate.flops_max / stage.ideal_flops,
            "busiest_over_ideal": estimate.busiest / stage.ideal_flops,
        },
        "sent_bytes": {"mean": mean(estimate.sent_bytes), "max": max(estimate.sent_bytes)},
        "team_bytes": {"mean": mean(estimate.team_bytes), "max": max(estimate.team_bytes)},
        "momentum_bytes": {"mean": mean(estimate.momentum_bytes), "max": max(estimate.momentum_bytes)},
        "buffer_bytes": estimate.buffer_bytes,
        "padding": {"dense": estimate.padding[0], "expert": estimate.padding[1]},
        "predicted_ms": {
            m.name: {
                "exchange": m.exchange_ms(estimate.collectives),
                "newton_schulz": m.newton_schulz_ms(estimate.flops_max),
            }
            for m in GPU_MODELS
        },
    }


def _runs(indices: Sequence[int]) -> str:
    """Ascending indices with runs joined: 0, 2-4."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _scaled(value: float, units: Sequence[str]) -> str:
    at = 0
    while at < len(units) - 1 and value >= 1000:
        value, at = value / 1000, at + 1
    return f"{value:.4g}{units[at]}"


def _bytes(value: float) -> str:
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def _flops(value: float) -> str:
    return _scaled(value, ("", " k", " M", " G", " T", " P"))


def _count(value: float) -> str:
    return _scaled(value, ("", "k", "M", "B", "T"))


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{100 * share:.1f} %"
