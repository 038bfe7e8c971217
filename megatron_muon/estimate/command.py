"""`python -m megatron_muon plan`: what a step costs under a layout, before any GPU is asked for."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_muon.estimate.models import BUILT_IN

if TYPE_CHECKING:
    from megatron_muon.estimate.estimates import ModelEstimate


def add_plan_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `plan` subcommand.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.

    Returns:
        The subcommand's parser.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="Newton-Schulz balance, bytes and memory of a model under a layout, beside upstream's",
        description=(
            "Estimates, for each pipeline stage, what Distributed Muon asks of a rank under a parallel layout, and the "
            "same for Megatron-Core's layer-wise optimizer and Moonlight's all-gather. Runs on one CPU."
        ),
    )
    parser.add_argument(
        "model",
        help=f"built-in model ({', '.join(BUILT_IN)}), a Hugging Face config.json, or a YAML of shapes",
    )
    layout = parser.add_argument_group("layout")
    for flag, what in (
        ("--dp", "data-parallel times context-parallel size"),
        ("--tp", "tensor-parallel size"),
        ("--pp", "pipeline-parallel size"),
        ("--ep", "expert-parallel size"),
        ("--instances", "distributed-optimizer instances"),
    ):
        layout.add_argument(flag, type=int, default=1, help=f"{what} (default 1)")
    layout.add_argument("--etp", type=int, default=None, help="expert-tensor-parallel size (default: --tp)")
    layout.add_argument(
        "--layers-per-stage", metavar="N,N,...", default=None, help="default: as even as possible, longer stages first"
    )
    muon = parser.add_argument_group("Muon")
    muon.add_argument("--ns-steps", type=int, default=None, help="Newton-Schulz iterations")
    muon.add_argument("--exchange-dtype", default=None, help="bf16 (default) or fp32")
    muon.add_argument("--router", default=None, help="muon (default) or adam")
    muon.add_argument("--qkv-split", default=None, help="fused QKV weights: none, qkv (default), group or head")
    muon.add_argument("--mla-split", default=None, help="MLA's weights: none (default), part or head")
    muon.add_argument("--balance", default=None, help="time (default): teams' messages count; or flops alone")
    muon.add_argument("--links", type=Path, metavar="FILE", help="measured links (default: conservative figures)")
    muon.add_argument("--no-split-gated", action="store_true", help="orthogonalize gate and up as one matrix")
    megatron = parser.add_argument_group("Megatron")
    megatron.add_argument("--transformer-impl", default="transformer_engine", help="transformer_engine or local")
    megatron.add_argument("--no-overlap-grad-reduce", action="store_true", help="one bucket per buffer")
    megatron.add_argument("--ddp-bucket-size", type=int, default=None, help="elements (default: Megatron's rule)")
    megatron.add_argument("--grad-reduce-in-bf16", action="store_true", help="2 instead of 4 bytes per gradient")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON instead of tables")
    output.add_argument("--plot", type=Path, metavar="plan.png", help="draw the load of each rank, before and after")
    parser.set_defaults(run=_run)
    return parser


def _run(args: argparse.Namespace) -> int:
    """Returns 0, or 2 with a message on standard error if the input is invalid."""
    try:
        plan = _plan(args)
        if args.plot is not None:
            from megatron_muon.estimate.plot import plot_load

            plot_load(plan, args.plot)
    except (ValueError, NotImplementedError) as error:
        print(f"megatron_muon plan: {error}", file=sys.stderr)
        return 2
    _print(plan, as_json=args.json)
    if args.plot is not None:
        print(f"wrote {args.plot}", file=sys.stderr)
    return 0


def _plan(args: argparse.Namespace) -> ModelEstimate:
    # What refuses bad input comes first, without numpy.
    from megatron_muon.config import MuonConfig
    from megatron_muon.estimate.shapes import load_model
    from megatron_muon.estimate.stages import Layout
    from megatron_muon.plan.links_file import load_links

    model = load_model(args.model)

    flags = ("ns_steps", "exchange_dtype", "router", "qkv_split", "mla_split", "balance")
    given = {name: getattr(args, name) for name in flags}
    muon = MuonConfig(
        split_gated=not args.no_split_gated,
        **{name: value for name, value in given.items() if value is not None},
    )
    layout = Layout(
        dp=args.dp,
        tp=args.tp,
        pp=args.pp,
        ep=args.ep,
        etp=args.etp,
        instances=args.instances,
        layers_per_stage=_layers_per_stage(args.layers_per_stage),
    )
    from megatron_muon.estimate.estimates import estimate_model
    from megatron_muon.estimate.groups import PlanSettings

    settings = PlanSettings(
        muon=muon,
        impl=args.transformer_impl,
        overlap_grad_reduce=not args.no_overlap_grad_reduce,
        bucket_size=args.ddp_bucket_size,
        grad_bytes=2 if args.grad_reduce_in_bf16 else 4,
        links=load_links(args.links, "--links") if args.links else None,
    )
    return estimate_model(model, layout, settings)


def _layers_per_stage(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise ValueError(f"--layers-per-stage: got {text!r}, expected numbers separated by commas") from None


def _print(plan: ModelEstimate, *, as_json: bool) -> None:
    from megatron_muon.estimate.report import estimate_to_json, print_estimate
    from megatron_muon.observe.console import console

    if as_json:
        print(json.dumps(estimate_to_json(plan), indent=2))
        return
    print_estimate(plan, console())
