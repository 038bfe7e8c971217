"""Times the whole optimizer step against Megatron-Core's own Muon on the same model and layout, over Gloo on a CPU.

    python benchmarks/step.py [--layouts dp2 tp2 ...] [--repeats 7] [--growth] [--output DIR]

Each rank builds the model twice: once with Megatron's layer-wise Muon (emerging-optimizers; `--optimizer muon` with
the distributed optimizer), once with Distributed Muon. Both get the same gradients, coefficients, steps, scale and
decay, train in bf16 (in fp32 Megatron's fails to start with the distributed optimizer) with fp32 main parameters,
momentum, exchange and Newton-Schulz, and cut the same logical matrices; after the first step their weights are
compared. Then their steps alternate, gathering of parameters included: the table has medians over repeats of the
slowest rank's milliseconds, and of the ratio within a repeat. What else the machine does falls on both. AdamW, with
the same distributed optimizer and gradients, is timed in the same turns.

`--growth` instead varies the model's width and the number of ranks, and adds the memory that a step allocates at its
peak, and the planner's time. Writes step.{md,json,png} or growth.{md,json,png}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from benchmarks.devices import DeviceType, milliseconds, peak_bytes, start_rank

RESULTS = Path(__file__).resolve().parent / "results"
LR, WEIGHT_DECAY, NS_STEPS = 0.01, 0.1, 5

Optimizer = Literal["ours", "theirs", "adamw"]
OPTIMIZERS: tuple[Optimizer, ...] = ("ours", "theirs", "adamw")

# Relative to the update. On a CPU: float32 sums in other orders through five steps whose slope at zero is 485. On a GPU
# both iterate on bf16 products, with errors of 2^-8 each; an update that is wrong differs by about 1.
PRECISION: dict[DeviceType, str] = {
    "cpu": "exchange and Newton-Schulz; one thread a rank",
    "cuda": "bf16 exchange and Newton-Schulz, Megatron's with bf16 products",
}
AGREEMENT: dict[DeviceType, float] = {"cpu": 2e-3, "cuda": 0.3}


@dataclass(frozen=True)
class Case:
    """A model under a layout, and how the two compute.

    Attributes:
        name: In the table.
        model: `dense` or `moe`.
        ranks: Processes.
        tp: Tensor-parallel size.
        ep: Expert-parallel size.
        tp_mode: Megatron's `--muon-tp-mode`: who orthogonalizes a matrix that tensor parallelism cuts.
        ns_method: Of Distributed Muon.
        hidden: Width of the model.
        target: The ratio to reach, 0 where none is set.
    """

    name: str
    model: str = "dense"
    ranks: int = 1
    tp: int = 1
    ep: int = 1
    tp_mode: str = "duplicated"
    ns_method: str = "auto"
    hidden: int = 512
    target: float = 0.0


CASES = (
    Case("1 rank, standard", ns_method="standard", target=1.0),
    Case("1 rank", target=1.4),
    Case("dp2", ranks=2, target=1.4),
    Case("dp4", ranks=4, target=1.35),
    Case("tp2 duplicated", ranks=2, tp=2, target=2.2),
    Case("tp2 distributed", ranks=2, tp=2, tp_mode="distributed"),
    Case("tp4 duplicated", ranks=4, tp=4, target=4.0),
    Case("tp2 dp2", ranks=4, tp=2, target=1.9),
    Case("moe, 1 rank", model="moe", hidden=256),
    Case("moe, ep2 dp2", model="moe", hidden=256, ranks=4, ep=2, target=1.2),
)
GROWTH = (
    *(Case(f"dp2, width {hidden}", ranks=2, hidden=hidden) for hidden in (128, 256, 512, 768)),
    *(Case(f"dp{ranks}, width 256", ranks=ranks, hidden=256) for ranks in (1, 2, 4, 8)),
)


def model_config(case: Case) -> Any:
    """A decoder of 4 layers; with experts, the first is dense."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts: dict[str, Any] = dict(
        num_moe_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=case.hidden,
        moe_layer_freq=[0, 1, 1, 1],
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
    )
    return TransformerConfig(
        num_layers=4,
        hidden_size=case.hidden,
        ffn_hidden_size=2 * case.hidden,
        num_attention_heads=8,
        tensor_model_parallel_size=case.tp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=1 if case.model == "moe" else case.tp,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        **(experts if case.model == "moe" else {}),
    )


def bare_model(case: Case) -> nn.Module:
    """The model, not wrapped; the same weights at every call."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    torch.manual_seed(0)
    config = model_config(case)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    model = GPTModel(
        config,
        spec,
        vocab_size=512,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    model.model_type = None
    return model.bfloat16()


def optimizer_settings(**settings: Any) -> Any:
    """What both optimizers are told."""
    from megatron.core.optimizer import OptimizerConfig

    common = dict(lr=LR, min_lr=0.0, weight_decay=WEIGHT_DECAY, clip_grad=0.0)
    return OptimizerConfig(**common, **settings, bf16=True, params_dtype=torch.bfloat16)


def build(case: Case, which: Optimizer, device: torch.device) -> tuple[Any, Any]:
    """A wrapped model and its optimizer: Distributed Muon, Megatron's Muon or AdamW. Collective."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import wrap_model_chunks_with_ddp

    from megatron_muon.config import MuonConfig
    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer as get_distributed_muon

    # Megatron leaves gate and up together, and Q, K and V apart.
    muon = MuonConfig(
        ns_dtype="fp32" if device.type == "cpu" else "bf16",
        exchange_dtype="fp32" if device.type == "cpu" else "bf16",
        scale_mode="spectral",
        split_gated=False,
        ns_steps=NS_STEPS,
        ns_method=case.ns_method,  # type: ignore[arg-type]
    )
    chunks = [bare_model(case).to(device)]
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    if which == "ours":
        tag_parameters(chunks, muon)
    config = chunks[0].config
    wrapped = wrap_model_chunks_with_ddp(
        chunks, config, ddp, use_layer_wise_distributed_optimizer=which == "theirs", bucket_sizes=[None]
    )
    adam = optimizer_settings(optimizer="adam", use_distributed_optimizer=True)
    if which == "ours":
        optimizer: Any = get_distributed_muon(adam, wrapped, muon=muon)
    elif which == "adamw":
        optimizer = get_megatron_optimizer(adam, wrapped)
    else:
        settings = optimizer_settings(
            optimizer="muon",
            use_distributed_optimizer=False,
            use_layer_wise_distributed_optimizer=True,
            muon_momentum=muon.momentum,
            muon_nesterov=muon.nesterov,
            muon_coefficient_type="simple",  # what this package calls keller
            muon_num_ns_steps=NS_STEPS,
            muon_scale_mode="spectral",
            muon_tp_mode=case.tp_mode,
            muon_fp32_matmul_prec="highest" if device.type == "cpu" else "medium",
        )
        optimizer = get_megatron_optimizer(settings, wrapped)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = LR, WEIGHT_DECAY * group["wd_mult"]
    return wrapped[0], optimizer


def set_gradients(model: Any, step: int) -> None:
    """Random gradients that data-parallel ranks agree on, as they do once gradients are reduced."""
    from megatron.core import parallel_state as ps

    for name, parameter in model.named_parameters():
        key = f"{step} {name}"
        if getattr(parameter, "tensor_model_parallel", False):
            key += f" tp{ps.get_tensor_model_parallel_rank()}"
        if not getattr(parameter, "allreduce", True):
            key += f" ep{ps.get_expert_model_parallel_rank()}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))


def largest_difference(ours: Any, theirs: Any, before: dict[str, Tensor]) -> float:
    """Between the two models' weights beyond one rounding to bf16, relative to the largest update of each parameter."""
    worst = 0.0
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        update = (b - before[name]).float().abs().max().clamp_min(1e-30)
        apart = (a.detach().float() - b.detach().float()).abs() - 2**-7 * b.detach().float().abs()
        worst = max(worst, float(apart.max() / update))
    return worst


def timed_step(optimizer: Any, device: torch.device) -> float:
    """Milliseconds of a step on the slowest rank. Collective.

    Raises:
        RuntimeError: If the step was skipped.
    """
    outcome: list[tuple[bool, Any, Any]] = []
    dist.barrier()
    elapsed = torch.tensor(milliseconds(lambda: outcome.append(optimizer.step()), device), device=device)
    if not outcome[0][0]:
        raise RuntimeError("optimizer.step skipped the update")
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)


def measure(case: Case, repeats: int, device: torch.device) -> dict[str, Any]:
    """One row. Collective; the process group is initialized.

    Raises:
        RuntimeError: If the two optimizers do not agree.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    ps.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=1 if case.model == "moe" else case.tp,
    )
    model_parallel_cuda_manual_seed(1)
    runs = {name: build(case, name, device) for name in OPTIMIZERS}
    before = {name: p.detach().clone() for name, p in runs["theirs"][0].named_parameters()}
    for model, optimizer in runs.values():
        set_gradients(model, 0)
        optimizer.step()
    difference = torch.tensor(largest_difference(runs["ours"][0], runs["theirs"][0], before), device=device)
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    expected = AGREEMENT["cuda" if device.type == "cuda" else "cpu"]
    if difference > expected:
        raise RuntimeError(f"{case.name}: the optimizers differ by {difference:.1e} of an update, expected {expected}")
    times: dict[Optimizer, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in sorted(runs, reverse=repeat % 2 == 1):
            set_gradients(runs[name][0], repeat + 1)
            times[name].append(timed_step(runs[name][1], device))
    peaks = {}
    for name, (_, optimizer) in runs.items():
        peak = torch.tensor(peak_bytes(optimizer.step, device), device=device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        peaks[name] = int(peak)
    return {
        **asdict(case),
        "difference": float(difference),
        "parameters": sum(p.numel() for p in runs["ours"][0].parameters()),
        "ours_ms": statistics.median(times["ours"]),
        "theirs_ms": statistics.median(times["theirs"]),
        "adamw_ms": statistics.median(times["adamw"]),
        "ratio": statistics.median(b / a for a, b in zip(times["ours"], times["theirs"], strict=True)),
        "peak_bytes": peaks,
    }


def _main(rank: int, case: Case, store: str, repeats: int, device_type: DeviceType) -> None:
    if device_type == "cpu":
        from megatron_muon import cpu

        cpu.install()
    device = start_rank(device_type, rank, case.ranks, store)
    row = measure(case, repeats, device)
    if rank == 0:
        Path(store + ".json").write_text(json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


def run(case: Case, repeats: int, device_type: DeviceType = "cpu") -> dict[str, Any]:
    """A case on processes of its own."""
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        multiprocessing.spawn(_main, (case, store, repeats, device_type), nprocs=case.ranks)
        row: dict[str, Any] = json.loads(Path(store + ".json").read_text())
    print(
        f"{case.name}: {row['ours_ms']:.0f} ms, Megatron's {row['theirs_ms']:.0f} ms: {row['ratio']:.2f} x", flush=True
    )
    return row


def planning_times() -> list[dict[str, Any]]:
    """Seconds to plan the worst stage's matrices of Kimi K2, by number of ranks."""
    from megatron_muon.estimate.estimates import estimate_model
    from megatron_muon.estimate.shapes import load_model
    from megatron_muon.estimate.stages import Layout

    rows = []
    for ranks in (256, 512, 1024, 2048, 4096):
        start = time.perf_counter()
        estimate_model(load_model("kimi-k2"), Layout(dp=ranks // 16, pp=16, ep=16, etp=1))
        rows.append({"ranks": ranks, "seconds": time.perf_counter() - start})
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as a document."""
    lines = [
        f"# {report['title']}",
        "",
        f"bf16 model, fp32 main parameters, {report.get('precision', PRECISION['cpu'])}; "
        f"{report['cores']} cores, {report['processor']}, torch {report['torch']}, megatron-core {report['megatron']}, "
        f"emerging-optimizers {report['emerging']}; medians over {report['repeats']} alternating steps of the slowest "
        "rank; ratio: Megatron's time over ours in a pair. Peak: what a step allocates at most on a rank, MiB. Ranks "
        "beyond the number of cores share them, so that a ratio there compares work, not balance.",
        "",
        "| case | parameters a rank | ours ms | Megatron's ms | AdamW's ms | ratio | target | peak ours | "
        "peak Megatron's | weights differ by |",
        "|---|" + "---:|" * 9,
    ]
    for row in report["rows"]:
        peaks = [f"{row['peak_bytes'][name] / 2**20:.1f}" for name in ("ours", "theirs")]
        target = f"{row['target']:.2f}" if row["target"] else ""
        cells = [row["name"], f"{row['parameters']:,}", f"{row['ours_ms']:.1f}", f"{row['theirs_ms']:.1f}"]
        cells += [
            f"{row['adamw_ms']:.1f}" if "adamw_ms" in row else "",
            f"{row['ratio']:.2f}",
            target,
            *peaks,
            f"{row['difference']:.0e} of an update",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if report["planning"]:
        lines += ["", "Planning Kimi K2 (all its stages, ours and the two it is compared with):", ""]
        lines += ["| ranks | seconds |", "|---:|---:|"]
        lines += [f"| {row['ranks']} | {row['seconds']:.2f} |" for row in report["planning"]]
    return "\n".join(lines) + "\n"


def report_of(rows: list[dict[str, Any]], repeats: int, title: str) -> dict[str, Any]:
    """The rows with what they were measured on."""
    import importlib.metadata

    return {
        "title": title,
        "torch": torch.__version__,
        "megatron": importlib.metadata.version("megatron-core"),
        "emerging": importlib.metadata.version("emerging-optimizers"),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "repeats": repeats,
        "rows": rows,
        "planning": [],
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars: both times of each case, the ratio above."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.bar([p - 0.2 for p in places], [r["theirs_ms"] for r in rows], 0.4, label="Megatron-Core's", color="tab:gray")
    axes.bar([p + 0.2 for p in places], [r["ours_ms"] for r in rows], 0.4, label="megatron_muon", color="tab:red")
    for place, row in zip(places, rows, strict=True):
        axes.annotate(f"{row['ratio']:.2f} x", (place, max(row["theirs_ms"], row["ours_ms"])), ha="center", va="bottom")
    axes.set_xticks(list(places), [r["name"].replace(", ", "\n").replace(" ", "\n") for r in rows], fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("optimizer step, ms")
    axes.set_title(report["title"])
    axes.legend()
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", help="names of cases (default: all)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--growth", action="store_true", help="vary width and ranks instead of the layout")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory (default: benchmarks/results)")
    args = parser.parse_args(argv)
    cases = GROWTH if args.growth else CASES
    known = [case.name for case in cases]
    for name in args.layouts or ():
        if name not in known:
            parser.error(f"--layouts: got {name!r}, expected some of {', '.join(map(repr, known))}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of megatron-core's own, at every import
    rows = [run(case, args.repeats) for case in cases if args.layouts is None or case.name in args.layouts]
    title = "Cost as the work grows" if args.growth else "The optimizer step against Megatron-Core's Muon"
    report = report_of(rows, args.repeats, title)
    if args.growth:
        report["planning"] = planning_times()
    stem = args.output / ("growth" if args.growth else "step")
    args.output.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    draw(report, stem.with_suffix(".png"))
    print(markdown(report))


if __name__ == "__main__":
    main()
