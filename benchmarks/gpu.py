"""Benchmarks on the GPUs of one node: `make bench-gpu` writes one page with tables and pictures.

    python benchmarks/gpu.py [--device cuda] [--ranks N] [--hidden 4096] [--repeats 7] [--output DIR]

1. Newton-Schulz: each back end that is installed, on matrices of usual shapes, in bf16 (the Gram iteration in fp16).
2. The step beside Megatron-Core's own Muon and AdamW, on one GPU and in the layouts that the node has room for.
3. Overlap: how much of the exchange is hidden behind Newton-Schulz.
4. Links: what the plan's transfers and collectives reach between the GPUs, from `megatron_muon.profile links`.

Nobody has run this on a GPU yet. `--device cpu` runs the same code over Gloo with small sizes, as the tests do; its
figures mean nothing. Writes gpu.md, gpu.json, gpu_step.png, gpu_overlap.png and links.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import overlap, step
from benchmarks.devices import DeviceType, milliseconds
from megatron_muon.newton_schulz import BackendName, Iteration, coefficients, load_backend, newton_schulz_flops
from megatron_muon.newton_schulz import orthogonalize as torch_orthogonalize

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
STEPS = 5
SHAPES = ((1408, 2048), (2048, 2048), (4096, 4096), (4096, 14336), (8192, 28672))
"""Rows and columns: an expert and an attention matrix of Moonlight 16B, then matrices of Llama 3 8B and 70B."""


@dataclass(frozen=True)
class Entry:
    """A way to orthogonalize: a back end of `--muon-ns-backend`, its iteration and data type."""

    backend: BackendName
    iteration: Iteration
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.backend}, {self.iteration}, {str(self.dtype).removeprefix('torch.')}"


ENTRIES = (
    Entry("torch", "standard", torch.bfloat16),
    Entry("torch", "gram", torch.float16),
    Entry("emerging", "standard", torch.bfloat16),
    Entry("gram-newton-schulz", "standard", torch.bfloat16),
    Entry("gram-newton-schulz", "gram", torch.float16),
)


def newton_schulz_rows(shapes: Sequence[tuple[int, int]], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Median milliseconds of every entry on every shape, and TFLOP/s of the standard iteration's products.

    An entry that this machine cannot run has the reason instead.
    """
    out = []
    for entry in ENTRIES:
        row: dict[str, Any] = {"name": entry.name}
        out.append(row)
        try:
            run = torch_orthogonalize if entry.backend == "torch" else load_backend(entry.backend, device.type)
            row["shapes"] = [_timed(run, entry, shape, repeats, device) for shape in shapes]
        except (RuntimeError, ValueError, ImportError) as error:
            row["reason"] = str(error)
    return out


def _timed(
    run: Callable[..., Tensor], entry: Entry, shape: tuple[int, int], repeats: int, device: torch.device
) -> dict[str, Any]:
    rows, cols = shape
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(device)
    x = (x / x.norm()).to(entry.dtype)
    schedule = coefficients("keller", STEPS)

    def once() -> Tensor:
        return run(x, schedule, iteration=entry.iteration, scaling="frobenius")

    # Kernels are compiled and tuned in the first two runs.
    for _ in range(2):
        once()
    median = statistics.median(milliseconds(once, device) for _ in range(repeats))
    flops = newton_schulz_flops(rows, cols, STEPS, "standard")
    return {"rows": rows, "cols": cols, "ms": median, "tflops_per_s": flops / median / 1e9}


def step_cases(ranks: int, hidden: int) -> list[step.Case]:
    """One rank, all ranks in data, tensor and expert parallelism, as far as the ranks go."""
    base = step.Case("1 rank", hidden=hidden)
    cases = [base, replace(base, name="1 rank, 8 experts", model="moe")]
    if ranks > 1:
        half = ranks // 2
        cases += [
            replace(base, name=f"dp{ranks}", ranks=ranks),
            replace(base, name=f"tp2 dp{half}", ranks=2 * half, tp=2),
            replace(base, name=f"8 experts, ep2 dp{half}", model="moe", ranks=2 * half, ep=2),
        ]
    return cases


def links(ranks: int, device_type: DeviceType, output: Path) -> str:
    """What `megatron_muon.profile links` prints; writes links.json.

    Raises:
        RuntimeError: If it fails; the message has the end of its output.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m", "megatron_muon.profile"]
    command = [*launch, "links", "--json", str(output / "links.json")]
    command += ["--backend", "gloo", "-e", "65536", "-n", "2"] if device_type == "cpu" else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def page(report: dict[str, Any]) -> str:
    """The report as one Markdown page."""
    shapes = [f"{rows} x {cols}" for rows, cols in report["shapes"]]
    lines = [
        "# One node's GPUs",
        "",
        f"{report['ranks']} x {report['device']}, torch {report['torch']}. Medians over {report['repeats']} repeats.",
        "",
        "## Newton-Schulz",
        "",
        "Five steps on one GPU, ms (TFLOP/s by the operations of the standard iteration).",
        "",
        "| back end | " + " | ".join(shapes) + " |",
        "|---|" + "---:|" * len(shapes),
    ]
    for row in report["newton_schulz"]:
        cells = [f"{s['ms']:.3f} ({s['tflops_per_s']:.0f})" for s in row.get("shapes", ())]
        lines.append(f"| {row['name']} | " + " | ".join(cells or [f"not run: {row['reason']}"]) + " |")
    lines += ["", "#" + step.markdown(report["step"]), "![times of the step](gpu_step.png)", ""]
    if report["overlap"]:
        lines += ["#" + overlap.markdown(report["overlap"]).replace("(overlap.png)", "(gpu_overlap.png)")]
    if report["links"]:
        lines += ["## Links", "", "```", report["links"].strip(), "```", ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all four parts and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, help="GPUs (default: all of this node)")
    parser.add_argument("--hidden", type=int, default=4096, help="width of the model that is stepped")
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES], help="ROWSxCOLS")
    parser.add_argument("--matrices", type=int, default=32, help="matrices of the overlap benchmark, HIDDEN x HIDDEN")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench-gpu: skipped, since there is no CUDA device; --device cpu only tries the code")
        return
    ranks = args.ranks or (torch.cuda.device_count() if args.device == "cuda" else 2)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    shapes = [tuple(map(int, text.split("x"))) for text in args.shapes]
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [step.run(case, args.repeats, args.device) for case in step_cases(ranks, args.hidden)]
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if args.device == "cuda" else "CPU process",
        "ranks": ranks,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "shapes": shapes,
        "newton_schulz": newton_schulz_rows(shapes, args.repeats, device),
        "step": {
            **step.report_of(rows, args.repeats, "The optimizer step"),
            "precision": step.PRECISION[args.device],
        },
        "overlap": overlap.run(ranks, args.matrices, args.hidden, 1024, 5, args.device) if ranks > 1 else None,
        "links": links(ranks, args.device, args.output) if ranks > 1 else None,
    }
    (args.output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output / "gpu.md").write_text(page(report))
    step.draw(report["step"], args.output / "gpu_step.png")
    if report["overlap"]:
        overlap.draw(report["overlap"], args.output / "gpu_overlap.png")
    print(f"wrote {args.output / 'gpu.md'}")


if __name__ == "__main__":
    main()
