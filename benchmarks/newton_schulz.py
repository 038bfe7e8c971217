"""Times Newton-Schulz alone against torch.optim.Muon's and emerging-optimizers', in float32 on one CPU thread.

    python benchmarks/newton_schulz.py [--sides 128 256 512] [--aspects 1 2 4 8] [--repeats 15] [--output DIR]

All four orthogonalize the same matrix with the same coefficients (keller) and five steps. A repeat runs them one
after the other, so that what else the machine does falls on all of them; the table has the median over repeats of
each one's milliseconds, and of the ratio within a repeat. torch.optim.Muon's function rounds its input to bfloat16;
here it is given one whose ``bfloat16()`` is a copy in float32, and is otherwise torch's own code.

Writes newton_schulz.md and newton_schulz.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz as emerging_newton_schulz
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from megatron_muon.newton_schulz import choose_iteration, coefficients, newton_schulz_flops, orthogonalize

STEPS = 5
KELLER = (3.4445, -4.7750, 2.0315)
OURS = ("standard", "gram", "auto")
OTHERS = ("torch.optim.Muon", "emerging-optimizers")


class _Float32(Tensor):
    """A float32 tensor that stays float32 where torch.optim.Muon casts to bfloat16."""

    def bfloat16(self, *_: Any, **__: Any) -> Tensor:
        """Returns a float32 copy, as the cast would be a copy."""
        return self.as_subclass(Tensor).clone()


def implementations(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Returns what is compared, by name; each orthogonalizes x, of shape (M, N) in float32."""
    schedule = coefficients("keller", STEPS)
    single = x.as_subclass(_Float32)
    return {
        "torch.optim.Muon": lambda: _zeropower_via_newtonschulz(single, KELLER, STEPS, 1e-7),
        "emerging-optimizers": lambda: emerging_newton_schulz(x, STEPS, "simple"),
        "standard": lambda: orthogonalize(x, schedule, iteration="standard"),
        "gram": lambda: orthogonalize(x, schedule, iteration="gram"),
        "auto": lambda: orthogonalize(x, schedule),
    }


def measure(rows: int, columns: int, repeats: int) -> dict[str, Any]:
    """Times one shape and returns its row of the report.

    Raises:
        RuntimeError: If the implementations do not agree.
    """
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    functions = implementations(x)
    results = {name: function() for name, function in functions.items()}
    for name, result in results.items():
        # Float32 rounding through five steps, whose slope at zero is 485.
        error = float((result - results["standard"]).norm() / results["standard"].norm())
        if error > 1e-4 or result.dtype != torch.float32:
            raise RuntimeError(f"{name} at {rows} x {columns}: differs by {error:.1e} in {result.dtype}, expected 1e-4")
    # Short calls are repeated within a measurement, to stay above the clock's and the scheduler's grain.
    inner = max(1, round(1e8 / newton_schulz_flops(rows, columns, STEPS, "standard")))
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = clock()
            for _ in range(inner):
                function()
            seconds[name].append((clock() - start) / inner)
    return {
        "rows": rows,
        "columns": columns,
        "chosen": choose_iteration(rows, columns, STEPS, "fp32", "cpu"),
        "median_ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "median_speedup": {
            ours: {other: statistics.median(b / a for a, b in zip(seconds[ours], seconds[other])) for other in OTHERS}
            for ours in OURS
        },
    }


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as a table; "x" columns are how many times faster ours is than the other."""
    lines = [
        "# Newton-Schulz alone",
        "",
        f"float32, {report['threads']} thread(s), {report['clock']} time, {report['processor']}, "
        f"torch {report['torch']}; keller, {STEPS} steps; medians over {report['repeats']} interleaved repeats. "
        "x: times faster than the other.",
        "",
        "| shape | torch.optim ms | emerging ms | standard ms | gram ms | auto ms | auto is "
        "| standard x emerging | gram x emerging | auto x emerging | auto x torch.optim |",
        "|---|" + "---:|" * 5 + "---|" + "---:|" * 4,
    ]
    for row in report["shapes"]:
        times = [f"{row['median_ms'][name]:.2f}" for name in (*OTHERS, *OURS)]
        pairs = [(ours, "emerging-optimizers") for ours in OURS] + [("auto", "torch.optim.Muon")]
        speedups = [f"{row['median_speedup'][ours][other]:.2f}" for ours, other in pairs]
        cells = [f"{row['rows']} x {row['columns']}", *times, row["chosen"], *speedups]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the benchmark and writes its two files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256, 512], help="shorter sides")
    parser.add_argument("--aspects", type=int, nargs="+", default=[1, 2, 4, 8], help="longer side / shorter side")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for side in arguments.sides:
        for aspect in arguments.aspects:
            rows.append(measure(side, aspect * side, arguments.repeats))
            print(f"{side} x {aspect * side}: {rows[-1]['median_ms']}", flush=True)
    report = {
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": arguments.threads,
        "clock": "CPU" if arguments.threads == 1 else "wall",
        "steps": STEPS,
        "repeats": arguments.repeats,
        "shapes": rows,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "newton_schulz.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.output / "newton_schulz.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
